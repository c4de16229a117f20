"""Judging: random sets are rated as random ones, bad sets below them, matched sets above; figures by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calibquant.selection import Pool, judge, select

N = 1000
_RANDOM = np.random.default_rng(2)
CLASSES = _RANDOM.integers(0, 5, N)
_LEVEL = (1 + 0.3 * CLASSES + _RANDOM.exponential(0.5, N))[:, None, None]
POOL = Pool(
    np.arange(N), CLASSES, {}, ("a", "b"), (_RANDOM.standard_normal((N, 2, 8)) + _LEVEL).astype(np.float32),
    (_RANDOM.chisquare(5, (N, 2, 8)) * _LEVEL**2).astype(np.float32),
    (_RANDOM.exponential(size=(N, 12)) * _LEVEL[:, 0]).astype(np.float32), np.repeat([0, 1], 6),
    ("a", "x", "b"), _RANDOM.uniform(1, 3, (N, 3)).astype(np.float32),
)  # fmt: skip


def part(rows: np.ndarray | list[int]) -> Pool:
    return POOL.take([int(row) for row in rows])


def test_random_sets_have_percentiles_all_over() -> None:
    draws = [judge(POOL, part(_RANDOM.permutation(N)[:100]), seed).percentile for seed in range(40)]
    assert 30 < np.mean(draws) < 70
    assert min(draws) < 25
    assert max(draws) > 75


@pytest.mark.parametrize(
    "rows",
    [np.flatnonzero(CLASSES == 2)[:100], np.argsort(_LEVEL.ravel())[:100], np.repeat(np.arange(10), 10)],
    ids=["one class", "only small values", "copies of ten"],
)
def test_bad_sets_fall_below_random_ones(rows: np.ndarray) -> None:
    found = judge(POOL, part(rows), 0)
    assert found.percentile < 5
    assert found.score < -0.3


def test_a_matched_set_is_better_than_random_ones() -> None:
    found = judge(POOL, part(select(POOL, 100, "moments", 0).rows), 0)
    assert found.percentile > 95
    assert found.score > 0.3


def test_the_figures_of_a_set_by_hand() -> None:
    rows = np.arange(0, 60)
    given = part(rows)
    found = judge(POOL, given, 0, distinct=58)
    assert POOL.squares is not None
    assert given.squares is not None
    assert POOL.peaks is not None
    want, got = (p.mean(0) for p in (POOL.squares, given.squares))
    errors = [np.linalg.norm(got[i] - want[i]) / np.linalg.norm(want[i]) for i in range(2)]
    assert [row.moment_error for row in found.layers] == pytest.approx(errors, rel=1e-5)
    reached = np.minimum(POOL.peaks[rows].max(0) / np.quantile(POOL.peaks, 0.99, axis=0), 1)
    assert [row.coverage for row in found.layers] == pytest.approx([reached[:6].mean(), reached[6:].mean()], rel=1e-5)
    shares = [np.bincount(c, minlength=5) / len(c) for c in (CLASSES[rows], CLASSES)]
    assert found.class_distance == pytest.approx(np.abs(shares[0] - shares[1]).sum() / 2)
    assert (found.images, found.distinct) == (60, 58)


def test_a_missing_class_is_named_and_proposed() -> None:
    rows = np.flatnonzero(CLASSES != 4)[:200]
    found = judge(POOL, part(rows), 0)
    assert found.missing_classes == (4,)
    assert (CLASSES[list(found.add)] == 4).sum() >= 5


def test_what_is_proposed_brings_the_set_nearer() -> None:
    rows = [*np.argsort(_LEVEL.ravel())[:100]]
    before, after = (judge(POOL, part([*rows, *more]), 0) for more in ([], judge(POOL, part(rows), 0).add))
    assert after.moment_error < before.moment_error


def test_an_image_that_makes_a_range_wide_is_named_with_the_place() -> None:
    given = part(range(50))
    assert judge(POOL, given, 0).stretching == ()  # at most three times where the median is two
    assert POOL.tops is not None
    assert given.tops is not None
    given.tops[7, 1], given.tops[30, 2], given.tops[30, 0] = 9, 600, 40
    usual = np.median(POOL.tops, 0)
    found = [(s.row, s.node, s.times) for s in judge(POOL, given, 0).stretching]
    assert found == [(30, "b", pytest.approx(600 / usual[2])), (7, "x", pytest.approx(9 / usual[1]))]


def test_pools_of_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="scored by the same network"):
        judge(POOL, replace(part(range(9)), layers=("x",)), 0)
