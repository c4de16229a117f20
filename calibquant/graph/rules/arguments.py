"""What rules ask of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from calibquant.graph.lowering import Expanded, Lowering, UnsupportedError

Value = Any  # a canonical fx.Node, a constant Tensor, an Expanded one, or a plain Python value


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of a number or a sequence."""
    if isinstance(value, Sequence):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


def rank(e: Lowering, x: Value) -> int:
    """Number of dimensions."""
    return len(e.shapes(x)[0])


def is_tensor(value: Value) -> bool:
    """Whether an argument is an activation or a constant tensor."""
    return isinstance(value, (fx.Node, Tensor, Expanded))


def broadcast(x: Value, y: Value) -> tuple[Value, Value]:
    """The operands of an operation that broadcasts two tensors, as they are before the network expanded them."""
    if not (is_tensor(x) and is_tensor(y)):
        return x, y
    x, y = (value.source if isinstance(value, Expanded) else value for value in (x, y))
    return x, y


def reduced(e: Lowering, x: Value, dim: Any) -> list[int]:
    """The dimensions that a reduction runs over, counted from 0, in order."""
    count = rank(e, x)
    dims = sorted(d % count for d in ([dim] if isinstance(dim, int) else dim or range(count)))
    if 0 in dims:
        raise UnsupportedError("over the batch is not supported")
    return dims
