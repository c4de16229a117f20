"""Shared bits: Banner's formula worked out by hand and from the paper, the optimum by trying everything."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibquant.numerics.allocation import banner, optimal


@pytest.mark.parametrize(
    ("spread", "bits", "expected"),
    [
        ([1, 1, 1, 1], 4, [4, 4, 4, 4]),
        ([5, 5], 2, [2, 2]),
        ([1, 8], 2, [1, 3]),  # shares 1/5 and 4/5 of 8 levels: 1.6 and 6.4, log2 0.68 and 2.68
        # Shares 1, 4, 16 of 21 times 12 levels: 0.57, 2.29, 9.14; log2 -0.81, 1.19, 3.19; limited 0, 1, 3, mean 4/3.
        # The target moves by 1/3: -0.47, 1.53, 3.53; rounded 0, 2, 4, mean 2.
        ([1, 8, 64], 2, [0, 2, 4]),
        # No spread, no bits: 3 for the other, mean 1.5. With targets 2.25 and 2.5 it has 3.25, then 3.5, to even: 4.
        ([0, 1], 2, [0, 4]),
        ([0, 0, 0], 3, [3, 3, 3]),
        # log2 -18.9 and 1, so 0 bits and 5, 6, 6, 7, 7, 7, 7 (just below a half), 8 with targets 4 to 6.75: mean 4.
        ([1, 1e9], 4, [0, 8]),
        # 8 bits for one; targets 10, 12, … 20 bring the other to 1, then 21.75, 23, 24, 24.75 to 3, 4, 5, 6. Ten moves.
        ([1, 1e9], 8, [6, 8]),
    ],
)
def test_banner_by_hand(spread: list[float], bits: int, expected: list[int]) -> None:
    found = banner(np.array(spread, np.float64), bits)
    assert found.tolist() == expected
    assert found.dtype == np.int64


def from_the_paper(spread: list[float], goal: int) -> list[int]:
    """Banner et al., NeurIPS 2019, channel by channel in Python, and the released code's moving target."""
    quota = sum(s ** (2.0 / 3.0) for s in spread)

    def shared(target: float) -> list[int]:
        bits = []
        for s in spread:
            levels = len(spread) * 2.0**target * s ** (2.0 / 3.0) / quota
            bits.append(min(8, max(0, round(math.log2(levels)))) if levels > 0 else 0)
        return bits

    target, moves = float(goal), 0
    bits = shared(target)
    while abs(goal - sum(bits) / len(bits)) > 0.01 and moves < 10:
        target += 0.5 * (goal - sum(bits) / len(bits))
        bits, moves = shared(target), moves + 1
    return bits


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=70), st.integers(2, 6))
def test_banner_is_the_papers(spread: list[float], goal: int) -> None:
    found = banner(np.array(spread), goal)
    expected = from_the_paper(spread, goal)
    # A level count within rounding of a half may fall either way; that changes the mean and all that follows.
    close = [abs(math.log2(len(spread) * s ** (2 / 3) / sum(t ** (2 / 3) for t in spread)) * 2 % 1) for s in spread]
    if all(1e-9 < c < 1 - 1e-9 for c in close):
        assert found.tolist() == expected


def test_the_formula_minimizes_the_modelled_error() -> None:
    """sum s^2 / B^2 under a fixed sum of B, by moving levels between any two channels."""
    spread, goal = np.array([0.3, 1.0, 2.5, 7.0]), 4
    levels = len(spread) * 2**goal * spread ** (2 / 3) / (spread ** (2 / 3)).sum()
    least = (spread**2 / levels**2).sum()
    for i, j in product(range(4), repeat=2):
        moved = levels.copy()
        moved[i] += 0.05
        moved[j] -= 0.05
        assert (spread**2 / moved**2).sum() >= least
    assert np.ptp(banner(spread, goal) - np.rint(np.log2(levels))) <= 1, "the target alone has moved"


def brute_force(errors: np.ndarray, total: int) -> float:
    every = (bits for bits in product(range(9), repeat=len(errors)) if sum(bits) == total)
    return min(sum(errors[i, b] for i, b in enumerate(bits)) for bits in every)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.data())
def test_optimal_is_the_best_of_all(channels: int, data: st.DataObject) -> None:
    """Any table, also one that is neither convex nor falling."""
    errors = np.array([[data.draw(st.integers(0, 50)) for _ in range(9)] for _ in range(channels)], np.float64)
    total = data.draw(st.integers(0, 8 * channels))
    found = optimal(errors, total)
    assert found.sum() == total
    assert found.min() >= 0
    assert found.max() <= 8
    assert errors[np.arange(channels), found].sum() == brute_force(errors, total)


def test_optimal_by_hand() -> None:
    """Errors of 4^-b times a channel's own factor: one bit more is worth it where the factor is more than 4 times."""
    errors = np.array([1.0, 4.1, 70.0])[:, None] * 4.0 ** -np.arange(9)
    assert optimal(errors, 6).tolist() == [0, 2, 4]  # 1 + 0.256 + 0.273; [1, 1, 4] and [0, 1, 5] cost more
    assert optimal(errors, 0).tolist() == [0, 0, 0]
    assert optimal(errors, 24).tolist() == [8, 8, 8]


@pytest.mark.parametrize("total", [-1, 17])
def test_a_sum_that_no_bits_have(total: int) -> None:
    with pytest.raises(ValueError, match="2 channels of 0 to 8 bits"):
        optimal(np.zeros((2, 9)), total)


def test_many_channels_have_exactly_their_bits_and_beat_banner() -> None:
    """512 channels with errors s^2 / 4^b, which is Banner's own model but with bits instead of levels."""
    spread = np.exp(np.random.default_rng(0).normal(size=512))
    errors = spread[:, None] ** 2 / 4.0 ** np.arange(9)
    ours, theirs = optimal(errors, 4 * 512), banner(spread, 4)
    assert ours.sum() == 4 * 512
    assert abs(theirs.mean() - 4) <= 0.01
    same = optimal(errors, int(theirs.sum()))
    every = np.arange(512)
    assert errors[every, same].sum() <= errors[every, theirs].sum()
