"""Greedy choices against brute force over all subsets, exact greedy, and their proven bounds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from calibquant.selection.greedy import cover, facility_location, k_center, match_mean

RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.standard_normal((40, 5)).astype(np.float32)


def mean_error(rows: list[int] | tuple[int, ...], features: np.ndarray = FEATURES) -> float:
    return float(np.linalg.norm(features[list(rows)].mean(0) - features.mean(0)))


@pytest.mark.parametrize("taken", [[], [3, 7]])
def test_each_step_of_matching_is_the_best_single_step(taken: list[int]) -> None:
    rows = match_mean(FEATURES, 6, taken)
    for k in range(6):
        before = taken + rows[:k]
        errors = {r: mean_error([*before, r]) for r in range(40) if r not in before}
        assert rows[k] == min(errors, key=errors.__getitem__)


def test_exchanges_never_make_a_match_worse_and_reach_the_optimum_of_a_small_case() -> None:
    small = FEATURES[:9]
    best = min(mean_error(s, small) for s in itertools.combinations(range(9), 4))
    errors = [mean_error(match_mean(small, 4, sweeps=n), small) for n in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1.5 * best
    assert mean_error(match_mean(FEATURES, 20, sweeps=5)) < 0.2 * np.mean(
        [mean_error(list(RANDOM.permutation(40)[:20])) for _ in range(50)]
    )


def test_matching_goes_to_a_given_target() -> None:
    rows = match_mean(FEATURES, 1, target=FEATURES[17])
    assert rows == [17]


@pytest.mark.parametrize("count", [2, 3])
def test_k_center_is_within_twice_the_optimum(count: int) -> None:
    small = FEATURES[:12]

    def radius(rows: tuple[int, ...] | list[int]) -> float:
        return float(np.linalg.norm(small[:, None] - small[list(rows)], axis=2).min(1).max())

    best = min(radius(s) for s in itertools.combinations(range(12), count))
    assert radius(k_center(small, count)) <= 2 * best + 1e-6
    far = k_center(small, 1, taken=[0])
    assert far == [int(np.linalg.norm(small - small[0], axis=1).argmax())]


def worth(marks: np.ndarray, rows: list[int] | tuple[int, ...]) -> float:
    return float(np.sqrt(marks[list(rows)].sum(0)).sum())


@pytest.mark.parametrize("seed", range(5))
def test_lazy_cover_is_plain_greedy_and_near_the_optimum(seed: int) -> None:
    marks = np.random.default_rng(seed).random((14, 9)) < 0.3
    plain: list[int] = []
    for _ in range(4):
        gains = [-math.inf if r in plain else worth(marks, [*plain, r]) for r in range(14)]
        plain.append(int(np.argmax(np.round(gains, 9))))
    rows = cover(marks, 4)
    assert worth(marks, rows) == pytest.approx(worth(marks, plain), rel=1e-6)
    best = max(worth(marks, s) for s in itertools.combinations(range(14), 4))
    assert worth(marks, rows) >= (1 - 1 / math.e) * best
    assert len(set(cover(marks, 14))) == 14


def test_facility_location_is_near_the_optimum() -> None:
    small = FEATURES[:14]
    distances = np.linalg.norm(small[:, None] - small, axis=2)
    similarity = distances.max() - distances

    def value(rows: list[int] | tuple[int, ...]) -> float:
        return float(similarity[:, list(rows)].max(1).sum())

    best = max(value(s) for s in itertools.combinations(range(14), 3))
    assert value(facility_location(small, 3, np.random.default_rng(0))) >= (1 - 1 / math.e - 0.05) * best


@pytest.mark.parametrize("count", [0, 1, 40])
def test_any_number_of_rows_each_once(count: int) -> None:
    marks = FEATURES > 0.5
    for rows in (
        match_mean(FEATURES, count, sweeps=1), k_center(FEATURES, count), cover(marks, count),
        facility_location(FEATURES, count, np.random.default_rng(1)),
    ):  # fmt: skip
        assert len(set(rows)) == len(rows) == count


def test_rows_already_taken_stay_out() -> None:
    taken = [0, 5, 9]
    marks = FEATURES > 0.5
    for rows in (
        match_mean(FEATURES, 37, taken, sweeps=1), k_center(FEATURES, 37, taken), cover(marks, 37, taken),
        facility_location(FEATURES, 37, np.random.default_rng(1), taken),
    ):  # fmt: skip
        assert sorted([*rows, *taken]) == list(range(40))
