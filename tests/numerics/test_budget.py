"""Bits under a budget: the integer program against an exhaustive search, the local search against all its moves."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from calibquant.errors import QuantizationError
from calibquant.numerics.budget import Array, Product, Uses, choose, improve, quadratic_cost

TENSORS, BITS = 6, np.array([2.0, 3.0, 4.0, 8.0])


def everything() -> list[tuple[int, ...]]:
    return list(product(range(len(BITS)), repeat=TENSORS))


def problem(seed: int, pairs: int = 0) -> tuple[Array, Uses]:
    """Costs that mostly fall with the bits, sizes of a network's kind, and products of neighbours."""
    random = np.random.default_rng(seed)
    costs = random.lognormal(0, 2, (TENSORS, 1)) * 4.0**-BITS * random.uniform(0.3, 3, (TENSORS, len(BITS)))
    sizes = random.integers(100, 100_000, TENSORS)
    products = tuple(Product(t, t + 1, np.outer(BITS, BITS) * float(random.integers(1, 500))) for t in range(pairs))
    return costs, Uses(np.outer(sizes, BITS), products, fixed=float(random.integers(0, 1000)))


@pytest.mark.parametrize("pairs", [0, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_the_program_finds_the_least_cost(seed: int, pairs: int) -> None:
    costs, uses = problem(seed, pairs)
    least, most = uses.of([0] * TENSORS), uses.of([len(BITS) - 1] * TENSORS)
    table = [(uses.of(c), sum(costs[t, i] for t, i in enumerate(c))) for c in everything()]
    for share in (0.0, 0.05, 0.2, 0.5, 1.0):
        limit = least + share * (most - least)
        found = choose(costs, uses, limit)
        assert uses.of(found) <= limit
        best = min(cost for use, cost in table if use <= limit)
        assert sum(costs[t, i] for t, i in enumerate(found)) == pytest.approx(best, rel=1e-9)


def test_uses_are_sums_of_own_fixed_and_products() -> None:
    uses = Uses(np.array([[1.0, 2.0], [10.0, 20.0]]), (Product(0, 1, np.array([[100.0, 200.0], [300.0, 400.0]])),), 5)
    assert [uses.of(c) for c in product(range(2), repeat=2)] == [116, 226, 317, 427]


def test_a_limit_met_exactly_is_met_and_one_below_the_least_is_an_error() -> None:
    costs, uses = problem(1)
    least = uses.of([0] * TENSORS)
    assert choose(costs, uses, least) == [0] * TENSORS
    with pytest.raises(
        QuantizationError, match=r"no choice of bits is within .*; raise the limit, or allow fewer bits"
    ):
        choose(costs, uses, least - 1)


def test_the_limit_holds_to_the_last_unit() -> None:
    """Sizes of 1e9: a solver's relative tolerance of 1e-6 would let a thousand pass."""
    uses = Uses(np.array([[1e9, 1e9 + 500], [1e9, 1e9 + 499]]))
    costs = np.array([[1.0, 0.0], [0.9, 0.0]])
    assert choose(costs, uses, 2e9 + 499) == [0, 1]


@pytest.mark.parametrize("unit", [1, 40, 499])
@pytest.mark.parametrize("pairs", [0, 3])
def test_small_differences_of_large_uses_decide(unit: int, pairs: int) -> None:
    """Choices that differ by some units in 1e9, against all choices."""
    random = np.random.default_rng(unit)
    own = 1e9 + unit * random.integers(0, 9, (TENSORS, len(BITS))).astype(float)
    products = tuple(Product(t, t + 1, 1e8 + unit * random.integers(0, 9, (4, 4)).astype(float)) for t in range(pairs))
    uses, costs = Uses(own, products, fixed=3e9), random.uniform(size=(TENSORS, len(BITS)))
    table = sorted((uses.of(c), sum(costs[t, i] for t, i in enumerate(c))) for c in everything())
    for place in (0, 20, 400, 2000):
        limit = table[place][0]
        found = choose(costs, uses, limit)
        assert uses.of(found) <= limit
        best = min(cost for use, cost in table if use <= limit)
        assert sum(costs[t, i] for t, i in enumerate(found)) == pytest.approx(best, rel=1e-9)


def semidefinite(seed: int) -> Array:
    """Costs ½ |sum of error vectors|², whose sizes fall with the bits."""
    random = np.random.default_rng(seed)
    size = np.tile(2.0**-BITS, TENSORS) * np.repeat(random.lognormal(0, 1, TENSORS), len(BITS))
    errors = random.normal(size=(TENSORS * len(BITS), 8)) * size[:, None]
    return np.asarray(errors @ errors.T / 2)


@pytest.mark.parametrize("seed", range(5))
def test_no_change_of_one_or_two_tensors_helps_any_more(seed: int) -> None:
    matrix, (_, uses) = semidefinite(seed), problem(seed)
    limit = uses.of([1] * TENSORS)
    start = choose(np.diag(matrix).reshape(TENSORS, -1), uses, limit)
    found = improve(matrix, uses, limit, start)
    cost = quadratic_cost(matrix, found, len(BITS))
    assert uses.of(found) <= limit
    assert cost <= quadratic_cost(matrix, start, len(BITS))
    near = [c for c in everything() if sum(a != b for a, b in zip(c, found, strict=True)) <= 2 and uses.of(c) <= limit]
    assert cost == pytest.approx(min(quadratic_cost(matrix, c, len(BITS)) for c in near), rel=1e-9)


def test_without_interactions_the_search_stays_at_the_program_s_choice() -> None:
    costs, uses = problem(3)
    limit = uses.of([1] * TENSORS)
    exact = choose(costs, uses, limit)
    assert improve(np.diag(costs.ravel()), uses, limit, exact) == exact


def test_quadratic_cost_is_the_squared_length_of_the_summed_errors() -> None:
    random = np.random.default_rng(0)
    errors = random.normal(size=(3, 2, 5))
    flat = errors.reshape(6, 5)
    assert quadratic_cost(flat @ flat.T, [1, 0, 1], 2) == pytest.approx(
        float(((errors[0, 1] + errors[1, 0] + errors[2, 1]) ** 2).sum())
    )
