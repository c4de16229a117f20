"""Statistics against scipy, closed forms, brute force and numbers made by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats

from calibquant.metrics import mcnemar
from calibquant.studies.paired import Spread, holm, over_images, over_seeds, spread


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5], Spread(1, 0.5, None)),
        ([0.25, 0.75], Spread(2, 0.5, math.sqrt(0.125))),
        ([3.0, 3.0, 3.0], Spread(3, 3.0, 0.0)),
        ([1.0, 2.0, 3.0, 4.0, 5.0], Spread(5, 3.0, math.sqrt(2.5))),
    ],
)
def test_spread_by_hand(values: list[float], expected: Spread) -> None:
    assert spread(values) == expected


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("shift", [-0.5, 0.0, 2.0])
def test_over_seeds_equals_scipy(n: int, shift: float) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(shift, 1, n), rng.normal(0, 1, n)
    test, known = over_seeds((a - b).tolist()), scipy.stats.ttest_rel(a, b)
    interval = known.confidence_interval(0.95)
    assert test.p == pytest.approx(known.pvalue, rel=1e-12)
    assert test.interval == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert test.difference.sd == pytest.approx(np.std(a - b, ddof=1))
    assert (test.verdict == "not shown") == (known.pvalue >= 0.05)


@pytest.mark.parametrize(
    ("differences", "verdict", "interval"),
    [
        # t(0.975, 1) = 12.706, t(0.975, 2) = 4.3027; standard errors 0.01 and 0.01/√3
        ([0.01, 0.03], "not shown", (0.02 - 0.12706, 0.02 + 0.12706)),
        ([0.02, 0.03, 0.04], "better", (0.03 - 0.024841, 0.03 + 0.024841)),
        ([-0.02, -0.03, -0.04], "worse", (-0.03 - 0.024841, -0.03 + 0.024841)),
        ([0.5], "not shown", None),
        ([0.5, 0.5, 0.5], "not shown", None),
        ([0.3 - 0.1, 0.2, 0.2], "not shown", None),  # equal but for the rounding of floats
        ([0.0, 0.0], "not shown", None),
    ],
)
def test_a_verdict_needs_an_interval_that_excludes_0(
    differences: list[float], verdict: str, interval: tuple[float, float] | None
) -> None:
    test = over_seeds(differences)
    assert test.verdict == verdict
    assert (test.interval is None) == (test.p is None) == (interval is None)
    if interval is not None:
        assert test.interval == pytest.approx(interval, abs=1e-5)


def flips(differences: np.ndarray) -> float:
    """Share of all sign flips whose sum is at least as far from 0."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    sums = np.abs(signs @ differences)
    return float((sums >= abs(differences.sum())).mean())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_over_images_equals_all_flips(seeds: int, seed: int) -> None:
    differences = np.random.default_rng(seed).integers(-seeds, seeds + 1, 10)
    assert over_images(differences) == pytest.approx(flips(differences), abs=1e-12)
    assert over_images(-differences) == pytest.approx(over_images(differences), abs=1e-12)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 5), (10, 2), (3, 30), (200, 150), (900, 100),
                                                (4000, 3500), (30_000, 31_000)])  # fmt: skip
def test_over_images_of_one_seed_is_mcnemar(only_a: int, only_b: int) -> None:
    a = np.array([True] * only_a + [False] * only_b + [True] * 7)
    b = np.array([False] * only_a + [True] * only_b + [True] * 7)
    assert over_images(a.astype(np.int64) - b) == pytest.approx(mcnemar(a, b), rel=1e-9)


def of_counts(counts: dict[int, int]) -> np.ndarray:
    """So many images of each difference."""
    return np.repeat(list(counts), list(counts.values()))


def exact(counts: dict[int, int]) -> float:
    """The sign-flip test in whole numbers: the ways to reach each sum, by polynomials whose digits are Python's."""
    total = sum(abs(d) * n for d, n in counts.items())
    positive = sum(d * n for d, n in counts.items() if d > 0)
    digit = sum(counts.values()) + 1  # bits that hold any number of ways
    ways = 1
    for size in {abs(d) for d in counts} - {0}:
        images = sum(n for d, n in counts.items() if abs(d) == size)
        ways *= sum(math.comb(images, k) << (digit * size * k) for k in range(images + 1))
    tail = sum((ways >> (digit * k)) & ((1 << digit) - 1) for k in range(min(positive, total - positive) + 1))
    images = sum(n for d, n in counts.items() if d)
    return float(min(Fraction(1), Fraction(2 * tail, 2**images)))


@pytest.mark.parametrize(
    "counts",
    [
        {1: 300, -1: 200, 2: 90, -2: 40, 3: 20, -3: 5},
        {1: 5, -1: 2, 2: 400, -2: 250, 0: 3000},
        {-3: 150, 3: 20, -1: 60, 1: 40},
        {5: 120},
        {1: 40, -1: 40, 2: 7, -2: 7},
    ],
)
def test_over_images_keeps_its_digits_in_the_tails(counts: dict[int, int]) -> None:
    expected = exact(counts)
    assert over_images(of_counts(counts)) == pytest.approx(expected, rel=1e-10)
    assert over_images(-of_counts(counts)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("won", "lost"), [(1800, 1300), (2500, 900), (1900, 1850), (400, 3700)])
def test_over_images_and_mcnemar_of_thousands_are_those_of_whole_numbers(won: int, lost: int) -> None:
    n = won + lost
    expected = float(Fraction(2 * sum(math.comb(n, k) for k in range(min(won, lost) + 1)), 2**n))
    assert over_images(of_counts({1: won, -1: lost, 0: 50})) == pytest.approx(expected, rel=1e-10)
    assert mcnemar([True] * won + [False] * lost, [False] * won + [True] * lost) == pytest.approx(expected, rel=1e-10)


def test_over_images_of_tens_of_thousands() -> None:
    """More differing images of several seeds than an FFT resolves; the normal tail gives the size of log p."""
    counts = {1: 9000, -1: 8000, 2: 3000, -2: 2500, 3: 900, -3: 700}
    mean, sd = sum(d * n for d, n in counts.items()), math.sqrt(sum(d * d * n for d, n in counts.items()))
    p = over_images(of_counts(counts))
    assert 0 < p < 1e-25
    assert math.log(p) == pytest.approx(math.log(2) + scipy.stats.norm.logsf(mean / sd), rel=0.02)


def test_holm_takes_the_largest_so_far_and_leaves_the_order() -> None:
    p = [0.0, 1e-300, 0.5, 0.02, 0.5, 1.0]
    assert holm(p) == pytest.approx([0.0, 5e-300, 1.0, 0.08, 1.0, 1.0])
    assert holm([]) == []
    assert holm([0.3]) == [0.3]


def test_over_images_of_many_is_near_the_normal_approximation() -> None:
    differences = np.random.default_rng(0).integers(-3, 4, 20_000)
    differences[:300] = 1
    z = differences.sum() / math.sqrt((differences**2).sum())
    assert over_images(differences) == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), rel=0.01)
