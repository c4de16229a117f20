"""The growth of the error: sums of squares of features, large and small."""

from __future__ import annotations

import pytest
import torch

from calibquant.reconstruction import accumulation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_of_large_features_are_summed_image_by_image(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    values = torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = float(values.double().square().sum())
    assert accumulation._squares(values) == whole
    copied: list[int] = []
    double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda self: copied.append(self.numel()) or double(self))
    monkeypatch.setattr(accumulation, "MOST_SQUARED", values.numel() - 1)
    assert accumulation._squares(values) == pytest.approx(whole, rel=1e-14)
    assert copied == [147] * 5
