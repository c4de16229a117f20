"""Ranges from histograms, by order statistics and by divergence, against their definitions."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_clipping import SHAPES, candidates_by_hand, error_of, normal

from calibquant.errors import QuantizationError
from calibquant.numerics.clipping import (
    kl_range_of,
    minmax_range,
    mse_range,
    mse_range_of,
    percentile_range,
    percentile_range_of,
)
from calibquant.numerics.grid import Granularity, Grid, PerChannel, PerTensor
from calibquant.numerics.histogram import Histogram


@pytest.mark.parametrize(
    "kind", ["normal", "heavy tails", "skewed", "relu", "negative", "an outlier", "constant", "tiny"]
)
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, False), (8, True)])
def test_histogram_search_is_within_one_percent_of_the_optimum(kind: str, bits: int, symmetric: bool) -> None:
    x, grid = SHAPES[kind](normal(2, 20_000, seed=5)), Grid(bits)
    best = error_of(x, *mse_range(x, grid, symmetric, PerTensor()), grid, symmetric)
    found = error_of(x, *mse_range_of(Histogram.empty().add(x), grid, symmetric), grid, symmetric)
    assert found <= best * 1.01 + 1e-40


def test_histogram_search_of_eight_bits_two_sided() -> None:
    x = normal(200_000) ** 3
    best = error_of(x, *mse_range(x, Grid(8), False, PerTensor()), Grid(8), False)
    found = error_of(x, *mse_range_of(Histogram.empty().add(x), Grid(8), False), Grid(8), False)
    assert found <= best * 1.01


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(sorted(SHAPES)), bits=st.sampled_from([2, 3]), seed=st.integers(0, 10**6))
def test_histogram_search_is_the_best_of_the_family_on_bins(kind: str, bits: int, seed: int) -> None:
    x, grid = SHAPES[kind](normal(2, 100, seed=seed)), Grid(bits)
    h = Histogram.empty().add(x)
    used = h.counts > 0
    points = h.centers[used].clamp(h.minimum, h.maximum)
    repeated = points.repeat_interleave(h.counts[used]).float()
    side = "pos" if h.minimum >= 0 else "neg" if h.maximum <= 0 else "no"
    family = candidates_by_hand(x.numpy(), grid, False, side)
    best = min(error_of(repeated, torch.tensor(a), torch.tensor(b), grid, False) for a, b in family)
    assert error_of(repeated, *mse_range_of(h, grid, False), grid, False) <= best * (1 + 1e-4) + 1e-37


# ---------------------------------------------------------------------------------------------- min-max and percentiles


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1)])
def test_minmax(granularity: Granularity) -> None:
    x = normal(4, 6, 3)
    axes = None if isinstance(granularity, PerTensor) else tuple({0, 1, 2} - {granularity.axis})
    low, high = minmax_range(x, granularity)
    assert np.array_equal(low.numpy(), x.numpy().min(axes))
    assert np.array_equal(high.numpy(), x.numpy().max(axes))


@pytest.mark.parametrize("percent", [60.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_percentile_by_order_statistics(percent: float, granularity: Granularity) -> None:
    x = normal(2, 501)
    rows = [x.reshape(-1)] if isinstance(granularity, PerTensor) else list(x)
    low, high = (v.reshape(-1) for v in percentile_range(x, granularity, percent))
    for i, row in enumerate(rows):
        v = sorted(row.tolist())
        for end, q in ((low[i], (100 - percent) / 200), (high[i], (100 + percent) / 200)):
            at = q * (len(v) - 1)
            j = min(int(at), len(v) - 2)
            assert float(end) == pytest.approx(v[j] + (at - j) * (v[j + 1] - v[j]), abs=1e-5)


SPARSE: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda r: r.standard_normal(3000),
    "Student 2": lambda r: r.standard_t(2, 3000),
    "log-normal": lambda r: np.exp(2 * r.standard_normal(3000)),
    "relu": lambda r: r.standard_normal(500).clip(0),
    "negative": lambda r: -r.exponential(size=200),
    "an outlier": lambda r: np.append(r.standard_normal(3000), 1000),
    "two outliers": lambda r: np.append(r.standard_normal(3000), [1000, -4000]),
    "two values": lambda r: np.array([0.0, 1.0]),
    "one value": lambda r: np.array([-5.0]),
    "constant": lambda r: np.full(7, 0.3),
    "denormal": lambda r: r.standard_normal(9) * 1e-42,
    "huge": lambda r: r.standard_normal(30) * 1e37,
}


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9, 99.99, 99.9999, 100.0])
@pytest.mark.parametrize("kind", SPARSE)
def test_percentile_of_a_histogram_is_off_by_less_than_one_bin(percent: float, kind: str) -> None:
    x = SPARSE[kind](np.random.default_rng(0)).astype(np.float32)
    h = Histogram.empty().add(torch.from_numpy(x))
    expected = np.quantile(x.astype(np.float64), [(100 - percent) / 200, (100 + percent) / 200])
    found = np.array([float(end) for end in percentile_range_of(h, percent)])
    assert (np.abs(found - expected) <= 2.0**h.exponent + 1e-7 * np.abs(expected)).all()
    assert (found >= h.minimum).all()
    assert (found <= h.maximum).all()
    assert percent < 100 or (found == [h.minimum, h.maximum]).all()


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.1])
def test_percent_must_be_a_share(percent: float) -> None:
    with pytest.raises(ValueError, match="percent"):
        percentile_range(torch.zeros(3), PerTensor(), percent)


# ------------------------------------------------------------------------------------------------------- KL divergence


def kl_by_hand(counts: list[float], levels: int, two_sided: bool) -> int:
    """Threshold in bins, by plain loops and scipy's entropy; `counts` are by distance from zero, or centered."""
    reach = len(counts) // 2 if two_sided else len(counts)
    scores = {}
    for t in range(levels // 2 if two_sided else levels, reach + 1):
        start, stop = (reach - t, reach + t) if two_sided else (0, t)
        inside = counts[start:stop]
        p = list(inside)
        p[0] += sum(counts[:start])
        p[-1] += sum(counts[stop:])
        q = [0.0] * len(p)
        for level in range(levels):
            members = [j for j in range(len(p)) if j * levels // len(p) == level]
            filled = [j for j in members if p[j] > 0]
            for j in filled:
                q[j] = sum(inside[m] for m in members) / len(filled) or 1e-4
        scores[t] = scipy.stats.entropy(p, q) if sum(inside) else np.inf
    return min(scores, key=scores.__getitem__, default=reach) if min(scores.values(), default=1) < np.inf else reach


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", ["pos", "neg", "no"])
def test_kl_threshold_by_hand(bits: int, seed: int, side: str) -> None:
    rng = np.random.default_rng(seed)
    size = 40
    counts = np.maximum(rng.poisson(200 * np.exp(-np.arange(size) / 8)), rng.random(size) < 0.5)
    counts[-1] = 1
    if side == "no":
        h = Histogram(0, -size, torch.from_numpy(np.concatenate([counts[::-1], counts])), -size + 0.5, size - 0.5)
        threshold = kl_by_hand([*counts[::-1].tolist(), *counts.tolist()], 2**bits, True)
        expected = (max(-threshold, h.minimum), min(threshold, h.maximum))
    else:
        flat = counts.tolist()
        flat[0] = flat[1]
        threshold = kl_by_hand(flat, 2**bits, False)
        if side == "pos":
            h = Histogram(0, 0, torch.from_numpy(counts), 0.0, size - 0.5)
            expected = (0.0, min(threshold, h.maximum))
        else:
            h = Histogram(0, -size, torch.from_numpy(counts[::-1].copy()), -size + 0.5, -0.5)
            expected = (max(-threshold, h.minimum), 0.0)
    low, high = kl_range_of(h, Grid(bits))
    assert (float(low), float(high)) == expected


def test_kl_clips_far_outliers_and_keeps_uniform_values() -> None:
    x = normal(50_000).abs()
    x[0] = 100.0
    assert 2 < float(kl_range_of(Histogram.empty().add(x), Grid(8))[1]) < 50
    low, high = kl_range_of(Histogram.empty().add(torch.rand(50_000) * 2 - 1), Grid(8))
    assert float(high) > 0.9
    assert float(low) < -0.9


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
@pytest.mark.parametrize("bits", [4, 16])
def test_kl_of_a_constant_keeps_it(value: float, bits: int) -> None:
    low, high = kl_range_of(Histogram.empty().add(torch.full((10,), value)), Grid(bits))
    assert (float(low), float(high)) == (min(value, 0), max(value, 0))


def test_kl_ignores_how_many_exact_zeros_a_relu_makes() -> None:
    x = normal(50_000).relu()
    more = torch.cat([x, torch.zeros(100_000)])
    assert kl_range_of(Histogram.empty().add(x), Grid(4)) == kl_range_of(Histogram.empty().add(more), Grid(4))


@pytest.mark.parametrize(
    "search",
    [
        lambda h: kl_range_of(h, Grid(4)),
        lambda h: mse_range_of(h, Grid(4), False),
        lambda h: percentile_range_of(h, 99.0),
    ],
)
def test_an_empty_histogram_has_no_range(search: Callable[[Histogram], object]) -> None:
    with pytest.raises(QuantizationError, match="histogram is empty"):
        search(Histogram.empty())
