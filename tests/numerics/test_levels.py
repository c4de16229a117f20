"""Level sets against their papers, clusterings and scales against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibquant.numerics.levels import (
    TOP,
    apot_levels,
    best_scale,
    binary_levels,
    cluster,
    gathered,
    nearest_codes,
    power_of_two_levels,
    ternary_levels,
)

# The sets of powers from which the APoT paper's released code takes one each, by bits of magnitude; zero is in all.
PUBLISHED = {
    2: [[-1, -2, -3]],
    3: [[-1, -2, -4], [-3]],
    4: [[-1, -3, -5], [-2, -4, -6]],
    5: [[-1, -3, -6], [-2, -4, -7], [-5]],
}


@pytest.mark.parametrize("magnitude", PUBLISHED)
def test_apot_levels_are_the_papers(magnitude: int) -> None:
    options = [[0.0, *(2.0**p for p in powers)] for powers in PUBLISHED[magnitude]]
    values = np.array(sorted({sum(choice) for choice in itertools.product(*options)}))
    found = np.array(apot_levels(magnitude + 1))
    positive = found[found >= 0]
    assert positive / positive.max() == pytest.approx(values / values.max(), rel=1e-12)
    assert np.array_equal(found, -found[::-1])
    assert len(found) == 2 ** (magnitude + 1) - 1


@pytest.mark.parametrize(
    ("bits", "width", "expected"),
    [
        (2, 1, [-1, 0, 1]),
        (2, 2, [-1, 0, 1]),
        (4, 1, list(range(-7, 8))),  # k = 1 is uniform
        (4, 3, power_of_two_levels(4)),  # one term is powers of two
    ],
)
def test_the_ends_of_apot_are_uniform_and_powers_of_two(bits: int, width: int, expected: list[int]) -> None:
    assert apot_levels(bits, width) == expected


@pytest.mark.parametrize(("bits", "width"), [(1, 2), (7, 2), (6, 3), (5, 4)])
def test_apot_that_does_not_fit(bits: int, width: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        apot_levels(bits, width)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_powers_of_two_halve(bits: int) -> None:
    levels = power_of_two_levels(bits)
    positive = [v for v in levels if v > 0]
    assert positive == [2**k for k in range(2 ** (bits - 1) - 1)]
    assert levels == sorted([-v for v in positive] + [0] + positive)


@pytest.mark.parametrize("bases", [1, 2, 3, 7])
def test_binary_bases_are_sums_of_signs(bases: int) -> None:
    signs = itertools.product((-1, 1), repeat=bases)
    assert binary_levels(bases) == sorted(sum(s * 2**k for k, s in enumerate(each)) for each in signs)


def test_all_levels_fit_eight_bits() -> None:
    sets = [apot_levels(b) for b in range(2, 7)] + [power_of_two_levels(b) for b in (2, 3, 4)]
    sets += [binary_levels(b) for b in range(1, 8)] + [ternary_levels()]
    assert all(max(levels) <= TOP and sorted(set(levels)) == levels for levels in sets)


@given(
    st.lists(st.integers(-127, 127), min_size=1, max_size=9, unique=True).map(sorted),
    st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=9),
)
def test_codes_are_of_the_nearest_level(levels: list[int], values: list[float]) -> None:
    codes = nearest_codes(torch.tensor(values), torch.tensor(levels))
    for value, code in zip(values, codes.tolist(), strict=True):
        assert abs(levels[code] - value) == pytest.approx(min(abs(v - value) for v in levels), abs=1e-4)


def error(values: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> float:
    return float((weights * ((values[:, None] - levels) ** 2).min(1)).sum())


def brute(values: np.ndarray, weights: np.ndarray, count: int, whole: bool) -> float:
    """The least error of all ways to cut the sorted values into at most `count` runs."""
    order = np.argsort(values)
    v, w = values[order], weights[order]
    least = np.inf
    for k in range(1, min(count, len(v)) + 1):
        for cuts in itertools.combinations(range(1, len(v)), k - 1):
            total = 0.0
            for a, b in itertools.pairwise((0, *cuts, len(v))):
                mean = np.average(v[a:b], weights=w[a:b])
                level = np.rint(mean) if whole else mean
                total += float((w[a:b] * (v[a:b] - level) ** 2).sum())
            least = min(least, total)
    return least


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_clusters_are_those_of_brute_force(seed: int, whole: bool) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_normal(9) * 4 + random.choice([0, 1e4])
    if seed % 3 == 0:
        values = np.rint(values)  # repeated values
    weights, count = random.random(9) + 0.1, int(random.integers(1, 6))
    levels = cluster(values, weights, count, whole)
    assert 1 <= len(levels) <= count
    assert error(values, weights, levels) == pytest.approx(brute(values, weights, count, whole), rel=1e-6, abs=1e-6)
    if whole:
        assert np.array_equal(levels, np.rint(levels))


def lloyd(values: np.ndarray, weights: np.ndarray, count: int, random: np.random.Generator) -> float:
    levels = np.sort(random.choice(values, count, replace=False))
    for _ in range(200):
        owner = np.abs(values[:, None] - levels).argmin(1)
        mass = np.bincount(owner, weights=weights, minlength=count)
        moved = np.where(mass > 0, np.bincount(owner, weights=weights * values, minlength=count), levels * 0)
        new = np.where(mass > 0, moved / np.maximum(mass, 1e-30), levels)
        if np.array_equal(new, levels):
            break
        levels = new
    return error(values, weights, levels)


@pytest.mark.parametrize("count", [2, 4, 8, 13])
def test_no_start_of_lloyd_beats_the_exact_clusters(count: int) -> None:
    random = np.random.default_rng(count)
    values, weights = random.laplace(size=300), random.random(300) + 0.5
    exact = error(values, weights, cluster(values, weights, count))
    starts = [lloyd(values, weights, count, random) for _ in range(20)]
    assert exact <= min(starts) * (1 + 1e-9)


def test_fewer_values_than_levels_are_all_levels() -> None:
    assert cluster(np.array([2.0, -1.0, 2.0]), np.ones(3), 5).tolist() == [-1.0, 2.0]


def test_gathering_keeps_mass_and_mean_and_hardly_changes_levels() -> None:
    values, weights = np.random.default_rng(0).laplace(size=20_000), np.ones(20_000)
    few, mass = gathered(values, weights)
    assert len(few) <= 4096
    assert (mass.sum(), (few * mass).sum()) == pytest.approx((20_000, values.sum()))
    sample = values[:4000]
    exact = error(sample, np.ones(4000), cluster(sample, np.ones(4000), 4))
    rough_values, rough_mass = np.unique(np.round(sample, 2), return_counts=True)
    rough = error(sample, np.ones(4000), cluster(rough_values, rough_mass.astype(float), 4))
    assert rough == pytest.approx(exact, rel=1e-3)


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8).filter(lambda v: max(map(abs, v)) > 1e-3))
@settings(max_examples=60)
def test_the_ternary_scale_is_the_best(values: list[float]) -> None:
    x = np.array(values)
    sets = [np.abs(x)[list(c)] for k in range(1, len(x) + 1) for c in itertools.combinations(range(len(x)), k)]
    least = min(loss(x, np.array([-1, 0, 1]), float(chosen.mean())) for chosen in sets if chosen.any())
    assert loss(x, np.array([-1, 0, 1]), best_scale(x, [-1, 0, 1])) == pytest.approx(least, rel=1e-9, abs=1e-9)


def loss(x: np.ndarray, levels: np.ndarray, scale: float, weights: np.ndarray | float = 1.0) -> float:
    """Squared error of the nearest levels, in float64."""
    middles = (levels[1:] + levels[:-1]) / 2
    return float((weights * (levels[np.searchsorted(middles, x / scale)] * scale - x) ** 2).sum())


SETS = {
    **{f"apot {bits}": apot_levels(bits) for bits in range(2, 7)},
    **{f"power-of-two {bits}": power_of_two_levels(bits) for bits in (2, 3, 4)},
    **{f"binary {bits}": binary_levels(bits) for bits in range(1, 8)},
    "ternary": ternary_levels(),
    "apot 6, not negative": [level for level in apot_levels(6) if level >= 0],
}
DRAWS = {
    "normal": lambda r, n: r.standard_normal(n) * 1e-3, "uniform": lambda r, n: r.uniform(-30, 30, n),
    "Laplace": lambda r, n: r.laplace(size=n), "Student 2": lambda r, n: r.standard_t(2, n),
    "log-normal": lambda r, n: np.exp(r.standard_normal(n)),
    "an outlier": lambda r, n: np.append(r.standard_normal(n - 1), 50.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("name", SETS)
def test_no_scale_of_a_dense_search_is_better(name: str, kind: str) -> None:
    """1,500 scales over the whole useful interval: from 1/20 of the one that clips nothing to the last level's."""
    levels, random = np.array(SETS[name], dtype=np.float64), np.random.default_rng(len(name))
    for size in (1, 9, 100):
        x = DRAWS[kind](random, size)
        x = np.abs(x) if levels[0] == 0 else x
        top = float(np.abs(x).max()) / levels[-1]
        widest = levels[-1] / np.abs(levels)[levels != 0].min()
        dense = min(loss(x, levels, top * share) for share in np.geomspace(0.05, 2 * widest, 1500))
        assert loss(x, levels, best_scale(x, levels)) <= dense * (1 + 1e-9) + 1e-25


def test_weights_count_as_repetitions() -> None:
    random = np.random.default_rng(0)
    x, many = random.standard_normal(40), random.integers(0, 5, 40)
    once = best_scale(x, apot_levels(4), many.astype(np.float64))
    assert once == pytest.approx(best_scale(np.repeat(x, many), apot_levels(4)), rel=1e-12)


@pytest.mark.parametrize("name", ["apot 6", "power-of-two 4", "binary 3", "ternary"])
def test_the_scale_of_many_values_is_as_good(name: str) -> None:
    """100,000 different magnitudes are joined where they agree in 11 bits, also where one is far off."""
    levels, x = np.array(SETS[name], dtype=np.float64), np.random.default_rng(1).standard_normal(100_000)
    for values in (x, np.append(x, 300.0)):
        top = float(np.abs(values).max()) / levels[-1]
        dense = min(loss(values, levels, top * share) for share in np.geomspace(1e-3, 5, 300))
        assert loss(values, levels, best_scale(values, levels)) <= dense * (1 + 1e-5)


@pytest.mark.parametrize("levels", [apot_levels(6), binary_levels()], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 3.4e38])
def test_the_scale_of_equal_values(levels: list[int], value: float) -> None:
    scale = best_scale(np.full(5, value), levels)
    assert (scale == 0) == (value == 0)
    if value:
        assert loss(np.full(5, value), np.array(levels, dtype=float), scale) <= 5 * (1e-12 * value) ** 2
