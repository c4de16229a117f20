"""An ONNX file as a network: batches of any size, also through files of a fixed batch size."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from calibquant.data import TensorImages
from calibquant.evaluation import evaluate
from calibquant.evaluation.onnx_network import OnnxNetwork


class Sums:
    """Sums of channels, for batches of one size or of any."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch
        self.sizes: list[int] = []

    @property
    def inputs(self) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
        return (("x", (self.batch, 3, 2, 2)),)

    def run(self, *images: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        (x,) = images
        assert self.batch in (None, len(x))
        self.sizes.append(len(x))
        return [x.sum(axis=(2, 3))]


@pytest.mark.parametrize(("batch", "sizes"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 2]), (5, [5]), (8, [8])])
def test_every_image_is_run_once_in_order(batch: int | None, sizes: list[int]) -> None:
    session, images = Sums(batch), torch.rand(5, 3, 2, 2)
    assert np.allclose(OnnxNetwork(session)(images).numpy(), images.sum(dim=(2, 3)).numpy())
    assert session.sizes == sizes


def test_it_is_evaluated_as_a_torch_network_is() -> None:
    images = TensorImages(torch.rand(7, 3, 2, 2), labels=[0, 1, 2, 0, 1, 2, 0])
    got = evaluate(OnnxNetwork(Sums(4)), images, batch_size=3)
    want = evaluate(lambda x: x.sum(dim=(2, 3)), images, batch_size=3)
    assert np.array_equal(got.predictions, want.predictions)
    assert got.scores == want.scores
