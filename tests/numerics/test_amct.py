"""ARQ, IFMR and HFMG against computations that follow their descriptions value by value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibquant.errors import QuantizationError
from calibquant.numerics.affine import affine_from_range, quantize
from calibquant.numerics.amct import arq_range, hfmg_range_of, ifmr_range_of
from calibquant.numerics.grid import Grid, PerChannel, PerTensor
from calibquant.numerics.histogram import Histogram

WIDTH = 2.0**-9  # of the bins of values whose largest magnitude is in [4, 8)
KINDS = ["relu", "normal", "laplace", "negative", "spread"]


def values_of(kind: str, count: int = 20_000) -> np.ndarray:
    """Values at the centers of bins, so that a histogram loses nothing; the largest magnitude is in [4, 8)."""
    g = np.random.default_rng(1)
    x = {
        "relu": lambda: g.normal(size=count).clip(min=0),
        "normal": lambda: g.normal(0.3, 1.0, count),
        "laplace": lambda: g.laplace(0, 0.5, count),
        "negative": lambda: -np.abs(g.laplace(0, 0.5, count)),
        "spread": lambda: g.uniform(-1, 5, count),
    }[kind]()
    x[0] = -6.3 if kind == "negative" else 6.3
    return ((np.floor(x.clip(-7.9, 7.9) / WIDTH) + 0.5) * WIDTH).astype(np.float32)


def histogram_of(x: np.ndarray) -> Histogram:
    h = Histogram.empty().add(torch.from_numpy(x))
    assert h.exponent == -9
    return h


# --- ARQ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1)])
def test_arq_codes_are_those_of_its_scale(bits: int, granularity: PerTensor | PerChannel) -> None:
    w = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits))
    w[0], w[1], w[2] = w[0].abs(), -w[1].abs(), 0
    axis = granularity.axis if isinstance(granularity, PerChannel) else None
    rows = w.reshape(1, -1) if axis is None else w.movedim(axis, 0).flatten(1)
    expected = []
    for row in rows.numpy().astype(np.float64):
        larger_negative = abs(row.min()) > abs(row.max())
        expected.append(np.abs(row).max() / (2 ** (bits - 1) - (0 if larger_negative else 1)))
    for symmetric in (True, False):
        grid = Grid(bits, signed=symmetric)
        low, high = arq_range(w, grid, symmetric, granularity)
        assert low.shape == high.shape == (() if axis is None else (w.shape[axis],))
        scale, zero = affine_from_range(low, high, grid, symmetric)
        np.testing.assert_allclose(scale.reshape(-1), np.maximum(expected, 1e-8), rtol=3e-7)
        alive = np.array(expected) > 0
        assert (zero.reshape(-1).numpy()[alive] == (0 if symmetric else 2 ** (bits - 1))).all()
        codes = quantize(w, scale, zero, grid, granularity).long() - zero.reshape(
            [-1 if i == axis else 1 for i in range(4)]
        )
        codes = codes.reshape(1, -1) if axis is None else codes.movedim(axis, 0).flatten(1)
        for row, code, s in zip(rows.numpy(), codes.numpy(), expected, strict=True):
            exact = (row / s if s else row).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            np.testing.assert_array_less(np.abs(code - exact), 0.5 + 1e-4)


# --- IFMR -------------------------------------------------------------------------------------------------------------


def ifmr_by_hand(x: np.ndarray, bits: int, symmetric: bool) -> tuple[float, float]:
    """Order statistics and ratios on all values; the score is that of the quantizer's own grid."""
    kept = max(len(x) - int(0.999999 * len(x)), 1)
    ordered = np.sort(x)
    low, high = min(ordered[kept - 1], 0), max(ordered[-kept], 0)
    best = (np.inf, 0.0, 0.0)
    for i in range(61):
        ratio = np.float32((70 + i) / 100)
        end = np.float32(max(-low, high) if symmetric else high) * ratio
        start = -end if symmetric else np.float32(low)
        if symmetric:
            step, zero = np.float32(end / np.float32((2**bits - 1) / 2)), 2 ** (bits - 1)
        else:
            step = np.float32((end - start) / np.float32(2**bits - 1))
            zero = int(np.clip(-np.rint(start / step), 0, 2**bits - 1))
        shown = (np.clip(np.rint(x / step) + zero, 0, 2**bits - 1) - zero) * step
        error = float(((shown - x).astype(np.float64) ** 2).mean())
        if error < best[0] * (1 - 1e-9):
            best = (error, float(start), float(end))
    return best[1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ifmr_is_the_search_on_all_values(kind: str, bits: int, symmetric: bool) -> None:
    x = values_of(kind)
    low, high = ifmr_range_of(histogram_of(x), Grid(bits), symmetric)
    assert low.shape == high.shape == ()
    assert (float(low), float(high)) == pytest.approx(ifmr_by_hand(x, bits, symmetric), rel=1e-6)


def test_ifmr_starts_from_its_percentile() -> None:
    """Of 3 million values a few outliers lie beyond 0.999999, and 1.3 times that percentile is the widest range."""
    x = np.concatenate([np.linspace(0, 4, 3_000_000), [100.0, 100.0]]).astype(np.float32)
    h = Histogram.empty().add(torch.from_numpy(x))
    _, high = ifmr_range_of(h, Grid(8), False)
    assert 0.99 * 4 < float(high) <= 1.3 * 4 * 1.01
    _, high = ifmr_range_of(h.add(torch.full((10,), 100.0)), Grid(8), False)
    assert float(high) >= 0.7 * 100


# --- HFMG -------------------------------------------------------------------------------------------------------------


def positions_by_hand(counts: list[int]) -> list[tuple[int, int]]:
    """Every range that the search passes, bin by bin."""
    left, right = 0, len(counts) - 1
    step = max(-(-sum(counts) // 100_000), 1)
    found = [(left, right)]
    while right - left > -(-len(counts) // 4):
        a, dropped = left, 0
        while a < right and dropped < step:
            dropped, a = dropped + counts[a], a + 1
        b, dropped = right, 0
        while a < b and dropped < step:
            dropped, b = dropped + counts[b], b - 1
        left, right = (left, b) if right - b >= a - left else (a, right)
        found.append((left, right))
    return found


def cells_error(x: np.ndarray, weights: np.ndarray, low: float, high: float, bits: int) -> float:
    width = (high - low) / 2**bits
    cell = np.floor((x - low) / width).clip(0, 2**bits - 1)
    return float((weights * (low + (cell + 0.5) * width - x) ** 2).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hfmg_finds_the_best_of_its_positions(kind: str, bits: int) -> None:
    """Each bin is split into 20 points; of its positions every seventh is scored."""
    h = histogram_of(values_of(kind))
    edges, counts = h.edges.numpy(), h.counts.numpy()
    used = counts > 0
    x = (edges[:-1][used, None] + (np.arange(20) + 0.5) / 20 * WIDTH).reshape(-1)
    weights = np.repeat(counts[used] / 20, 20)
    low, high = (float(v) for v in hfmg_range_of(h, Grid(bits)))
    ranges = [(edges[a], edges[b + 1]) for a, b in positions_by_hand(counts.tolist())]
    cut = [(max(a, h.minimum), min(b, h.maximum)) for a, b in ranges]
    assert (low, high) in cut
    found = cells_error(x, weights, *ranges[cut.index((low, high))], bits)
    for a, b in ranges[::7]:
        assert found <= cells_error(x, weights, a, b, bits) * (1 + 1e-3)


def test_hfmg_clips_outliers_and_keeps_a_uniform_range() -> None:
    g = np.random.default_rng(0)
    bulk, outlier = g.normal(size=100_000).astype(np.float32), np.array([60.0], dtype=np.float32)
    h = Histogram.empty().add(torch.from_numpy(np.concatenate([bulk, outlier])))
    low, high = hfmg_range_of(h, Grid(4))
    assert float(low) > -5
    assert float(high) < 20  # a quarter of the bins is the narrowest range
    low, high = hfmg_range_of(Histogram.empty().add(torch.linspace(-1, 5, 50_000)), Grid(8))
    assert (float(low), float(high)) == pytest.approx((-1, 5), abs=0.02)


@pytest.mark.parametrize("values", [[0.0], [2.0, 2.0], [-3.0, 0.0], [1e-40, 3e38]])
def test_few_values(values: list[float]) -> None:
    h = Histogram.empty().add(torch.tensor(values))
    for low, high in (hfmg_range_of(h, Grid(4)), ifmr_range_of(h, Grid(4), False)):
        assert low.isfinite()
        assert high.isfinite()
        assert float(low) <= float(high)


def test_no_values_are_a_one_line_error() -> None:
    with pytest.raises(QuantizationError, match="histogram is empty; add"):
        hfmg_range_of(Histogram.empty(), Grid(4))
    with pytest.raises(QuantizationError, match="histogram is empty; add"):
        ifmr_range_of(Histogram.empty(), Grid(4), False)
    with pytest.raises(QuantizationError, match="NaN"):
        arq_range(torch.tensor([torch.nan]), Grid(4, signed=True), True, PerTensor())
