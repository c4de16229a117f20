"""Pixel statistics against what plain arithmetic, scipy and numpy give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from scipy.stats import entropy, gmean

from calibquant.selection.pixels import BINS, PIXEL_VALUES, pixel_values

IMAGES = torch.rand(5, 3, 12, 9, generator=torch.Generator().manual_seed(3)) * 4 - 2
GREY = IMAGES.mean(1).double().numpy()


def shares(grey: np.ndarray, low: float, high: float) -> np.ndarray:
    clipped = np.clip(grey.ravel(), low, high)
    return np.histogram(clipped, BINS, (low, high))[0] / grey.size


def reference(grey: np.ndarray, low: float, high: float) -> dict[str, float]:
    found = shares(grey, low, high)
    smoothed = (found * grey.size + 1) / (grey.size + BINS)
    steps = np.concatenate([np.abs(np.diff(grey, axis=axis)).ravel() for axis in (0, 1)])
    mean, square = (uniform_filter(g, 3)[1:-1, 1:-1] for g in (grey, grey**2))
    return {
        "entropy": entropy(found, base=2),
        "flatness": gmean(smoothed) / smoothed.mean(),
        "variation": steps.mean(),
        "variance": (square - mean**2).mean(),
        "brightness": grey.mean(),
        "contrast": grey.std(),
    }


@pytest.mark.parametrize("name", PIXEL_VALUES)
@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (-0.5, 0.25)])
def test_each_statistic_is_what_scipy_gives(name: str, bounds: tuple[float, float]) -> None:
    found = pixel_values(IMAGES, *bounds)[name]
    expected = [reference(grey, *bounds)[name] for grey in GREY]
    assert found.numpy() == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_a_flat_histogram_and_an_even_image_are_the_extremes() -> None:
    ramp = torch.linspace(0, 1 - 1e-6, 64 * 64).reshape(1, 1, 64, 64)
    even = torch.full((1, 1, 64, 64), 0.5)
    assert float(pixel_values(ramp, 0, 1)["entropy"]) == pytest.approx(6, abs=1e-3)
    assert float(pixel_values(ramp, 0, 1)["flatness"]) == pytest.approx(1, abs=1e-3)
    found = pixel_values(even, 0, 1)
    assert [float(found[name]) for name in ("entropy", "variation", "variance", "contrast")] == [0, 0, 0, 0]
    assert float(found["flatness"]) < 0.1


def test_bounds_that_are_equal_divide_by_nothing() -> None:
    assert float(pixel_values(torch.zeros(1, 1, 4, 4), 0, 0)["entropy"]) == 0
