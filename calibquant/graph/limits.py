"""Functions that only limit values from below or above, such as ReLU, ReLU6 and hardtanh."""

from __future__ import annotations

import math

import torch
from torch import fx

from calibquant.graph.nodes import activations_of, op_of

Limits = tuple[float, float]
UNLIMITED: Limits = (-math.inf, math.inf)


def limits_of(node: fx.Node) -> Limits | None:
    """The least and the largest value that a function which only limits its input lets through; None for other nodes.

    They are what it makes of minus and plus infinity: (0, inf) for ReLU, (0, 6) for ReLU6.
    """
    op = op_of(node)
    if op is None or not op.limits:
        return None
    low, high = op.run(torch.tensor(UNLIMITED, dtype=torch.float64), **node.kwargs).tolist()
    return low, high


def before_limits(node: fx.Node) -> tuple[fx.Node, Limits]:
    """The node whose values `node` limits, looking through a chain of such functions, and the limits in all.

    Any other node is its own source, without limits.
    """
    limits = limits_of(node)
    if limits is None:
        return node, UNLIMITED
    source, (low, high) = before_limits(activations_of(node)[0])
    return source, (min(max(low, limits[0]), limits[1]), min(max(high, limits[0]), limits[1]))
