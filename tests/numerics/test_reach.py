"""How far weights may reach: bounds against brute force over all codes."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calibquant.numerics.grid import Grid
from calibquant.numerics.reach import INT16_MAX, adds_pairs, grid_within, may_saturate, reach_of


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_reach_is_the_last_weight_whose_pair_fits(bits: int) -> None:
    reach, highest = reach_of(bits), 2**bits - 1
    assert 2 * highest * reach <= INT16_MAX
    assert 2 * highest * (reach + 1) > INT16_MAX


@pytest.mark.parametrize("reach", [64, 129, 30])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_grid_stays_within_its_reach_and_is_as_wide_as_it_can(bits: int, symmetric: bool, reach: int) -> None:
    grid, even = grid_within(Grid(bits, signed=symmetric), symmetric, reach)
    zero_points = [0] if even else range(grid.qmin, grid.qmax + 1)
    farthest = max(abs(code - z) for code in (grid.qmin, grid.qmax) for z in zero_points)
    assert farthest <= reach
    if grid.bits < bits:
        assert even, "an asymmetric grid gives up its zero point before a bit"
        assert 2**grid.bits > reach, "one bit more would not have fitted"


@given(
    arrays.arrays(np.int8, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.integers(-128, 127)),
    st.integers(1, 255),
)
def test_a_row_may_saturate_if_some_pair_in_some_order_does(rows: np.ndarray, highest: int) -> None:
    for row, told in zip(rows.astype(int), may_saturate(rows, highest), strict=True):
        sums = [a * x + b * y for a, b in permutations(row, 2) for x in (0, highest) for y in (0, highest)]
        assert told == any(not -INT16_MAX - 1 <= s <= INT16_MAX for s in [*sums, 0])


@pytest.mark.parametrize(
    ("shape", "groups", "expected"),
    [
        ((16, 3, 3, 3), 1, True),
        ((16, 16, 1, 1), 1, True),
        ((16, 8, 3, 3), 2, True),
        ((32, 1, 3, 3), 16, True),  # two outputs a channel are no depthwise kernel
        ((8, 1, 3, 3), 1, True),
        ((16, 1, 3, 3), 16, False),
        ((16, 1, 5), 16, False),
        ((1, 1, 3, 3), 1, False),
        ((8, 1, 1, 1), 1, False),  # one product has no partner
        ((8, 1), 1, False),
        ((8, 2), 1, True),
    ],
)
def test_kernels_that_add_pairs(shape: tuple[int, ...], groups: int, expected: bool) -> None:
    assert adds_pairs(shape, groups) is expected
