"""Choosing a subset step by step. All functions work on rows of arrays, go on from rows already taken, and take no row
twice unless they are told to; ties go to the first row.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
CLIENTS = 2048  # rows that a facility location serves, a sample of all
MISS = 0.05  # by which stochastic greedy falls short of greedy in expectation, as a share of the optimum


def match_mean(
    features: Floats,
    count: int,
    taken: Sequence[int] = (),
    sweeps: int = 0,
    target: Floats | None = None,
    repeat: bool = False,
) -> list[int]:
    """Rows whose mean comes close to a target.

    Each step takes the row with which the mean of the taken ones has the least squared distance to it; for features of
    one length this is kernel herding (Chen, Welling and Smola, "Super-Samples from Kernel Herding", UAI 2010). A sweep
    then exchanges each new row for the one that is best in its place. Cost: O(n d) a step.

    Args:
        features: (n, d).
        count: rows to take.
        taken: rows that are in the set already and stay.
        sweeps: passes of exchanges.
        target: (d,); None is the mean of all rows.
        repeat: a row may be taken several times, which weighs it.

    Example:
        >>> match_mean(np.array([[0.0], [1.0], [5.0], [2.1]], dtype=np.float32), 1)
        [3]
    """
    wanted = features.mean(0, dtype=np.float64) if target is None else target.astype(np.float64)
    lengths = np.einsum("nd,nd->n", features, features, dtype=np.float64)
    total = features[list(taken)].sum(0, dtype=np.float64)
    used, rows = np.zeros(len(features), dtype=bool), list[int]()
    used[list(taken)] = True

    def best(size: int) -> int:
        cost = lengths + 2 * (features @ (total - size * wanted).astype(np.float32))
        cost[used] = math.inf
        return int(cost.argmin())

    for size in range(len(taken) + 1, len(taken) + count + 1):
        rows.append(row := best(size))
        used[row] = not repeat
        total += features[row]
    for _ in range(sweeps):
        before = list(rows)
        for place, old in enumerate(before):
            used[old] = False
            total -= features[old]
            rows[place] = row = best(len(taken) + count)
            used[row] = not repeat
            total += features[row]
        if rows == before:
            break
    return rows


def k_center(features: Floats, count: int, taken: Sequence[int] = ()) -> list[int]:
    """Rows such that every row is near one: each step takes the row farthest from all taken ones.

    Begins with the row nearest the mean. The largest distance is at most twice the optimum (Gonzalez, 1985). Cost:
    O(n d) a step.

    Example:
        >>> k_center(np.array([[0.0], [1.0], [9.0], [4.0]], dtype=np.float32), 3)
        [3, 2, 0]
    """
    lengths = np.einsum("nd,nd->n", features, features)

    def distances(point: Floats) -> Floats:
        return lengths - 2 * (features @ point) + point @ point

    rows = list[int]()
    if not taken and count:
        rows.append(int(distances(features.mean(0)).argmin()))
    nearest = np.full(len(features), math.inf, dtype=np.float32)
    for row in [*taken, *rows]:
        np.minimum(nearest, distances(features[row]), out=nearest)
        nearest[row] = -math.inf
    while len(rows) < count:
        rows.append(row := int(nearest.argmax()))
        np.minimum(nearest, distances(features[row]), out=nearest)
        nearest[row] = -math.inf
    return rows


def cover(marks: npt.NDArray[np.bool_], count: int, taken: Sequence[int] = ()) -> list[int]:
    """Rows that together carry every mark often: greedy on sum over marks of sqrt(rows that carry it).

    The sum is monotone and submodular, so greedy reaches at least 1 - 1/e of the optimum (Nemhauser, Wolsey and Fisher,
    1978); gains are evaluated lazily (Minoux, 1978).

    Args:
        marks: (n, marks).

    Example:
        >>> cover(np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool), 2)
        [0, 2]
    """
    counts = marks[list(taken)].sum(0, dtype=np.int64)
    worth = np.sqrt(counts + 1.0) - np.sqrt(counts)
    gains = marks.astype(np.float32) @ worth.astype(np.float32)
    heap = [(-float(gain), row) for row, gain in enumerate(gains) if row not in set(taken)]
    heapq.heapify(heap)
    rows = list[int]()
    while len(rows) < count:
        _, row = heapq.heappop(heap)
        gain = float(worth[marks[row]].sum())
        if heap and (-gain, row) > heap[0]:
            heapq.heappush(heap, (-gain, row))
            continue
        rows.append(row)
        counts += marks[row]
        worth = np.sqrt(counts + 1.0) - np.sqrt(counts)
    return rows


def facility_location(
    features: Floats, count: int, random: np.random.Generator, taken: Sequence[int] = ()
) -> list[int]:
    """Rows that represent all: stochastic greedy on the sum over rows of the similarity to the nearest taken one.

    Similarity is the largest distance found minus the Euclidean distance. Each step looks at n / count * ln(1 / MISS)
    random rows, which costs MISS of the guarantee 1 - 1/e (Mirzasoleiman et al., "Lazier Than Lazy Greedy", AAAI
    2015), and counts their gain on a sample of CLIENTS rows.

    Example:
        >>> rows = facility_location(np.repeat(np.eye(3, dtype=np.float32), 5, 0), 3, np.random.default_rng(0))
        >>> sorted(row // 5 for row in rows)
        [0, 1, 2]
    """
    n = len(features)
    clients = features[np.sort(random.permutation(n)[:CLIENTS])]
    sizes, client_sizes = (np.einsum("nd,nd->n", f, f) for f in (features, clients))

    def distances(rows: npt.NDArray[np.int64]) -> Floats:
        squared = sizes[rows, None] - 2 * (features[rows] @ clients.T) + client_sizes
        return np.sqrt(np.maximum(squared, 0.0))

    nearest = np.full(len(clients), 2 * math.sqrt(float(max(sizes.max(), client_sizes.max()))), dtype=np.float32)
    for row in taken:
        np.minimum(nearest, distances(np.array([row]))[0], out=nearest)
    free, rows = np.ones(n, dtype=bool), list[int]()
    free[list(taken)] = False
    looked = max(1, math.ceil(n / max(count, 1) * math.log(1 / MISS)))
    while len(rows) < count:
        left = np.flatnonzero(free)
        candidates = left if len(left) <= looked else np.sort(random.choice(left, looked, replace=False))
        found = distances(candidates)
        best = int(np.minimum(found, nearest).sum(1).argmin())
        np.minimum(nearest, found[best], out=nearest)
        rows.append(row := int(candidates[best]))
        free[row] = False
    return rows
