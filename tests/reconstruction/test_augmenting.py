"""Images changed at random: what they are changed into, found by trying everything."""

from __future__ import annotations

import numpy as np
import torch

from calibquant.reconstruction.augmenting import PATCH, PATCHED, SHIFT, flipped_and_shifted, patched


def test_each_image_is_one_of_all_its_mirrored_shifts() -> None:
    torch.manual_seed(0)
    images = torch.randn(40, 2, 16, 24)
    changed, seen = flipped_and_shifted(images).numpy(), set()
    for image, result in zip(images.numpy(), changed, strict=True):
        found = []
        for mirrored in (False, True):
            base = image[:, :, ::-1] if mirrored else image
            wide = np.pad(base, ((0, 0), (16 // SHIFT,) * 2, (24 // SHIFT,) * 2), mode="reflect")
            for y in range(2 * (16 // SHIFT) + 1):
                for x in range(2 * (24 // SHIFT) + 1):
                    if np.array_equal(wide[:, y : y + 16, x : x + 24], result):
                        found.append((mirrored, y, x))
        assert len(found) == 1
        seen.add(found[0])
    assert {mirrored for mirrored, _, _ in seen} == {False, True}
    assert len(seen) > 20


def test_a_patch_is_a_rectangle_of_another_image_at_the_same_place() -> None:
    torch.manual_seed(1)
    n, height, width = 400, 12, 16
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 3, height, width).contiguous()
    whole = 0
    for own, result in enumerate(patched(images)):
        assert torch.equal(result[0], result[1])
        assert torch.equal(result[0], result[2])
        other = (result[0] != own).numpy()
        rows, columns = other.any(1), other.any(0)
        assert np.array_equal(other, np.outer(rows, columns))
        if not other.any():
            whole += 1
            continue
        assert len(result[0][torch.from_numpy(other)].unique()) == 1
        for side, marks in ((height, rows), (width, columns)):
            at = np.flatnonzero(marks)
            assert at[-1] - at[0] + 1 == len(at)
            assert round(PATCH[0] * side) <= len(at) <= round(PATCH[1] * side)
    assert abs(whole / n - (1 - PATCHED)) < 4 * np.sqrt(0.25 / n)
