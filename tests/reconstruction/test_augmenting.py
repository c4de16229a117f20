"""Images changed at random: what becomes of them, and how far it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from calibquant.reconstruction.augmenting import (
    COLOR,
    CONTRAST,
    PATCH,
    PATCHED,
    SHIFT,
    TURN,
    ZOOM,
    patched,
    random_warps,
    recolored,
    versions,
    warped,
)

IMAGES = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
QUARTER = [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("warp", "wanted"),
    [
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], lambda x: x),
        ([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], lambda x: x[:, :, ::-1]),
        (QUARTER, lambda x: np.rot90(x, axes=(1, 2))),
        # a quarter of the side, 2 of 8 pixels, to the left; on the right the border is reflected
        ([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]], lambda x: np.concatenate([x[:, :, 2:], x[:, :, :5:-1]], axis=2)),
    ],
    ids=["none", "mirrored", "turned", "shifted"],
)  # fmt: skip
def test_an_image_is_seen_through_its_map(warp: list[list[float]], wanted: Callable[[Any], Any]) -> None:
    found = warped(IMAGES, torch.tensor([warp] * len(IMAGES)))
    for image, result in zip(IMAGES.numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(result, wanted(image), atol=1e-5)


def test_random_maps_turn_zoom_mirror_and_shift_within_their_bounds() -> None:
    torch.manual_seed(0)
    maps = random_warps(2000).double().numpy()
    turns = maps[:, :, :2]
    determinants = np.linalg.det(turns)
    zooms = np.sqrt(np.abs(determinants))
    rotations = turns / zooms[:, None, None]
    np.testing.assert_allclose(
        rotations @ rotations.transpose(0, 2, 1), np.broadcast_to(np.eye(2), (2000, 2, 2)), atol=1e-6
    )
    assert 0.45 < (determinants < 0).mean() < 0.55
    assert np.exp(-ZOOM) <= zooms.min() < 0.8
    assert 1.25 < zooms.max() <= np.exp(ZOOM) * (1 + 1e-6)
    angles = np.abs(np.arctan2(rotations[:, 0, 1], rotations[:, 1, 1]))
    assert 0.9 * TURN < angles.max() <= TURN + 1e-6
    assert 1.9 * SHIFT < np.abs(maps[:, :, 2]).max() <= 2 * SHIFT


def test_colors_move_by_a_factor_and_a_shift_for_each_channel() -> None:
    torch.manual_seed(0)
    images = torch.randn(50, 3, 6, 6) * 2 + 1
    for image, result in zip(images.double().numpy(), recolored(images).double().numpy(), strict=True):
        factors = [np.polyfit(a.ravel(), b.ravel(), 1) for a, b in zip(image, result, strict=True)]
        stretch, shifts = np.array(factors).T
        assert np.ptp(stretch) < 1e-4
        assert abs(stretch[0] - 1) <= CONTRAST + 1e-6
        assert np.abs(shifts).max() <= COLOR * float(images.std()) + 1e-4
        np.testing.assert_allclose(image * stretch[:, None, None] + shifts[:, None, None], result, atol=1e-4)


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


def test_versions_begin_with_the_image_and_are_mirrored_or_shifted_pieces_of_it() -> None:
    """Each version's middle is found in the image or its mirror image, pixel by pixel."""
    images = torch.randn(5, 2, 16, 24, generator=torch.Generator().manual_seed(1))
    found = versions(images, 7, seed=3)
    assert found.shape == (35, 2, 16, 24)
    assert torch.equal(found[:5], images)
    places = set()
    for number, version in enumerate(found[5:].numpy()):
        middle = version[:, 2:-2, 3:-3]  # a shift of at most an eighth of a side does not reach it
        image = images[number % 5].numpy()
        for mirrored, source in enumerate((image, image[:, :, ::-1])):
            for top in range(5):
                for left in range(7):
                    if np.array_equal(source[:, top : top + 12, left : left + 18], middle):
                        places.add((number, mirrored, top, left))
    assert {number for number, *_ in places} == set(range(30))
    assert len({tuple(rest) for _, *rest in places}) > 15
    assert torch.equal(versions(images, 7, seed=3), found)
    assert not torch.equal(versions(images, 7, seed=4), found)
    assert versions(images, 1, seed=3) is images


def test_the_border_of_a_version_is_reflected() -> None:
    image = torch.arange(64.0).view(1, 1, 1, 64).expand(1, 1, 8, 64)
    for version in versions(image, 20, seed=0)[1:, 0, 0]:
        row = version.flip(0) if version[30] > version[31] else version
        start = int(row[32]) - 32
        expected = np.abs(np.arange(64) + start)
        expected = np.where(expected > 63, 126 - expected, expected)
        np.testing.assert_array_equal(row.numpy(), expected)
