"""Choosing one bit width for each tensor under a budget: by integer programming, and by search where errors interact.

Tensors are numbered 0 … T-1 and have the same C choices, 0 … C-1. A choice of all is a list of T numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import LinearConstraint, milp

from calibquant.errors import QuantizationError

Array = npt.NDArray[np.float64]
FINEST = 1e-6  # share of the limit: room below it counts as so much, lest rounding of the sums decides


@dataclass(frozen=True, eq=False)
class Product:
    """A use of the budget that two choices make together, as a product's weight bits times its activation bits.

    Args:
        first, second: the two tensors.
        use: float64 (C, C): of each pair of their choices.
    """

    first: int
    second: int
    use: Array


@dataclass(frozen=True, eq=False)
class Uses:
    """What a choice takes of the budget: fixed + sum of own uses + sum of the products'.

    Args:
        own: float64 (T, C), at least 0.
        products: uses of pairs.
        fixed: whatever is chosen.
    """

    own: Array
    products: tuple[Product, ...] = ()
    fixed: float = 0.0

    def of(self, choice: Sequence[int]) -> float:
        """What a choice takes.

        Example:
            >>> Uses(np.array([[1.0, 2.0], [3.0, 5.0]]), fixed=10).of([0, 1])
            16.0
        """
        own = sum(float(row[c]) for row, c in zip(self.own, choice, strict=True))
        return self.fixed + own + sum(float(p.use[choice[p.first], choice[p.second]]) for p in self.products)


def choose(costs: Array, uses: Uses, limit: float) -> list[int]:
    """The choice of the smallest summed cost within a budget, exactly.

    minimize sum_t costs[t, choice_t] subject to uses.of(choice) <= limit, as a 0-1 program with one variable for each
    tensor and choice. A product's use has a variable y_cd >= 0 for each pair of choices with sum_d y_cd = x_c and
    sum_c y_cd = x_d, which makes it 1 for the chosen pair and 0 elsewhere (Adams and Sherali, "A Tight Linearization
    and an Algorithm for Zero-One Quadratic Programming Problems", Management Science, 1986). Solved by HiGHS.

    Args:
        costs: float64 (T, C), finite.
        uses: of the budget.
        limit: of the budget.

    Raises:
        QuantizationError: no choice is within the limit.

    Example:
        >>> choose(np.array([[9.0, 1.0], [3.0, 1.0]]), Uses(np.array([[1.0, 2.0], [1.0, 2.0]])), 3)
        [1, 0]
    """
    tensors, choices = costs.shape
    scale = max(float(np.abs(costs).max()), 1e-300)
    count = costs.size + choices * choices * len(uses.products)
    objective = np.concatenate([costs.ravel() / scale, np.zeros(count - costs.size)])
    load, room = _beyond_the_least(uses, limit)
    size = max(room, FINEST * abs(limit), 1e-300)
    load, room = np.minimum(load / size, 2.0), room / size  # what passes the limit alone need not be far above it
    equal, right = _one_of_each(tensors, choices, uses.products, count)
    # The solver's tolerance lets a choice pass the limit by a hair; then the limit is drawn in by twice that.
    for _ in range(20):
        found = milp(
            objective,
            constraints=[LinearConstraint(equal, right, right), LinearConstraint(load[None, :], -np.inf, room)],
            integrality=np.arange(count) < costs.size,
            bounds=(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            break
        choice = [int(c) for c in found.x[: costs.size].reshape(tensors, choices).argmax(1)]
        excess = uses.of(choice) - limit
        if excess <= 0:
            return choice
        room -= 2 * excess / size
    problem = f"no choice of bits is within {limit:.6g}"
    raise QuantizationError("budget", problem, "raise the limit, or allow fewer bits")


def _beyond_the_least(uses: Uses, limit: float) -> tuple[Array, float]:
    """What each variable takes above the least of its tensor or product, and what the limit leaves for that.

    The solver's tolerance is then relative to the room in which choices differ, not to the whole budget.
    """
    least = uses.own.min(1, keepdims=True)
    products = [product.use - product.use.min() for product in uses.products]
    fixed = uses.fixed + float(least.sum()) + sum(float(product.use.min()) for product in uses.products)
    return np.concatenate([(uses.own - least).ravel(), *(use.ravel() for use in products)]), limit - fixed


def _one_of_each(
    tensors: int, choices: int, products: Sequence[Product], count: int
) -> tuple[sparse.csr_matrix, Array]:
    """The equations: one choice of each tensor, and the pairs of a product follow the choices of its two tensors."""
    rows = sparse.lil_matrix((tensors + 2 * choices * len(products), count))
    right = np.zeros(rows.shape[0])
    right[:tensors] = 1
    for t in range(tensors):
        rows[t, t * choices : (t + 1) * choices] = 1
    row, start = tensors, tensors * choices
    for product in products:
        for c in range(choices):
            rows[row, start + c * choices : start + (c + 1) * choices] = 1
            rows[row, product.first * choices + c] = -1
            rows[row + 1, start + c : start + choices * choices : choices] = 1
            rows[row + 1, product.second * choices + c] = -1
            row += 2
        start += choices * choices
    return rows.tocsr(), right


def quadratic_cost(matrix: Array, choice: Sequence[int], choices: int) -> float:
    """x' matrix x, with x the 0-1 vector (T * C) of a choice."""
    index = np.arange(len(choice)) * choices + np.asarray(choice)
    return float(matrix[np.ix_(index, index)].sum())


def improve(matrix: Array, uses: Uses, limit: float, start: Sequence[int]) -> list[int]:
    """From a choice within the budget to one that no change of one or two tensors makes cheaper.

    The cost is x' matrix x, where errors of different tensors add to or cancel each other. The best change is made
    until none helps: a local search, no proof of the least cost.

    Args:
        matrix: float64 (T * C, T * C), symmetric.
        uses, limit: the budget.
        start: where the search begins.
    """
    tensors, choices = uses.own.shape
    choice = list(start)
    least = 1e-12 * float(np.abs(matrix).max())
    while True:
        changes = _changes(matrix, np.asarray(choice), choices)
        for number in np.argsort(changes, axis=None, kind="stable"):
            pair = divmod(int(number), tensors * choices)
            if changes[pair] >= -least:
                return choice
            moved = list(choice)
            for entry in pair:
                moved[entry // choices] = entry % choices
            if uses.of(moved) <= limit:
                choice = moved
                break
        else:
            return choice


def _changes(matrix: Array, choice: npt.NDArray[np.int64], choices: int) -> Array:
    """By how much x' matrix x changes when two tensors change: (T * C, T * C), by the new choices of both.

    On the diagonal one tensor changes; infinity stands for two new choices of one tensor. With d = e - n, e for the new
    choice and n for the present one: 2 d' matrix x + d' matrix d for each, and 2 d' matrix d' between the two.
    """
    tensors = len(choice)
    now = np.repeat(np.arange(tensors) * choices + choice, choices)  # of each entry's tensor
    slope = matrix[:, now[::choices]].sum(1)
    own = np.diag(matrix) + np.diag(matrix)[now] - 2 * np.take_along_axis(matrix, now[:, None], 1)[:, 0]
    alone = 2 * (slope - slope[now]) + own
    between = matrix - matrix[:, now] - matrix[now] + matrix[np.ix_(now, now)]
    both = alone[:, None] + alone[None, :] + 2 * between
    tensor = np.arange(tensors * choices) // choices
    both[tensor[:, None] == tensor[None, :]] = np.inf
    np.fill_diagonal(both, alone)
    return both
