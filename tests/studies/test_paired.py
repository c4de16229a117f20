"""Statistics against scipy, closed forms, brute force and numbers made by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from calibquant.metrics import mcnemar
from calibquant.studies.paired import Spread, over_images, over_seeds, spread


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


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 5), (10, 2), (3, 30), (200, 150), (900, 100)])
def test_over_images_of_one_seed_is_mcnemar(only_a: int, only_b: int) -> None:
    a = np.array([True] * only_a + [False] * only_b + [True] * 7)
    b = np.array([False] * only_a + [True] * only_b + [True] * 7)
    assert over_images(a.astype(np.int64) - b) == pytest.approx(mcnemar(a, b), rel=1e-6, abs=1e-14)


def test_over_images_of_many_is_near_the_normal_approximation() -> None:
    differences = np.random.default_rng(0).integers(-3, 4, 20_000)
    differences[:300] = 1
    z = differences.sum() / math.sqrt((differences**2).sum())
    assert over_images(differences) == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), rel=0.01)
