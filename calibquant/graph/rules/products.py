"""Rules of convolutions, matrix products and arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from calibquant.graph import ops
from calibquant.graph.lowering import Lowering, UnsupportedError, rule
from calibquant.graph.rules.arguments import Value, broadcast, is_tensor, pair


def _explicit_padding(
    e: Lowering, x: Value, weight: Value, padding: Any, dilation: Sequence[int]
) -> tuple[Value, tuple[int, ...]]:
    """Numeric padding per spatial axis; an uneven "same" becomes a pad op before the convolution."""
    axes = len(dilation)
    if not isinstance(padding, str):
        values = tuple(padding) if isinstance(padding, Sequence) else (padding,) * axes
        return x, tuple(int(v) for v in (values * axes if len(values) == 1 else values))
    if padding == "valid":
        return x, (0,) * axes
    totals = [d * (k - 1) for d, k in zip(dilation, e.shapes(weight)[0][2:], strict=True)]
    if all(t % 2 == 0 for t in totals):
        return x, tuple(t // 2 for t in totals)
    flat = [side for t in reversed(totals) for side in (t // 2, t - t // 2)]
    return e.emit(ops.pad, x, padding=flat, mode="constant"), (0,) * axes


@rule("conv2d")
def _conv2d(
    e: Lowering,
    input: Value,
    weight: Value,
    bias: Value = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> fx.Node:
    x, pads = _explicit_padding(e, input, weight, padding, pair(dilation))
    return e.emit(
        ops.conv2d, x, weight, bias, stride=pair(stride), padding=pads, dilation=pair(dilation), groups=groups
    )


@rule("conv1d")
def _conv1d(
    e: Lowering,
    input: Value,
    weight: Value,
    bias: Value = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> fx.Node:
    step = pair(dilation)[0]
    x, pads = _explicit_padding(e, input, weight, padding, (step,))
    stride = pair(stride)[0]
    return e.emit(ops.conv1d, x, weight, bias, stride=stride, padding=pads[0], dilation=step, groups=groups)


@rule("conv_transpose2d")
def _conv_transpose2d(
    e: Lowering,
    input: Value,
    weight: Value,
    bias: Value = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> fx.Node:
    return e.emit(
        ops.conv_transpose2d, input, weight, bias, stride=pair(stride), padding=pair(padding),
        output_padding=pair(output_padding), groups=groups, dilation=pair(dilation),
    )  # fmt: skip


@rule("linear")
def _linear(e: Lowering, input: Value, weight: Value, bias: Value = None) -> fx.Node:
    return e.emit(ops.linear, input, weight, bias)


@rule("addmm")
def _addmm(e: Lowering, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> fx.Node:
    if beta != 1 or alpha != 1 or not isinstance(y, Tensor):
        raise UnsupportedError("with beta, alpha or two activations is not supported")
    return e.emit(ops.linear, x, y.t().contiguous(), bias)


@rule("matmul", "mm", "bmm", "__matmul__")
def _matmul(e: Lowering, x: Value, y: Value) -> fx.Node:
    return e.emit(ops.matmul, x, y)


@rule("embedding")
def _embedding(e: Lowering, a: Value, b: Value, *_: Any, **__: Any) -> fx.Node:
    indices, weight = (b, a) if isinstance(a, Tensor) and a.is_floating_point() else (a, b)  # aten swaps them
    return e.emit(ops.embedding, indices, weight)


@rule("add", "add_", "iadd", "__add__", "__radd__")
def _add(e: Lowering, x: Value, y: Value, *, alpha: float = 1) -> fx.Node:
    x, y = broadcast(x, y)
    if not is_tensor(x):
        x, y = y, x
    if not is_tensor(y):
        return e.emit(ops.add_scalar, x, value=y * alpha)
    if alpha != 1:
        y = y * alpha if isinstance(y, Tensor) else e.emit(ops.mul_scalar, y, value=alpha)
    return e.emit(ops.add, x, y)


@rule("sub", "sub_", "isub", "subtract", "__sub__")
def _sub(e: Lowering, x: Value, y: Value, *, alpha: float = 1) -> fx.Node:
    x, y = broadcast(x, y)
    if not is_tensor(y):
        return e.emit(ops.add_scalar, x, value=-y * alpha)
    if alpha != 1:
        y = y * alpha if isinstance(y, Tensor) else e.emit(ops.mul_scalar, y, value=alpha)
    if not is_tensor(x):
        return e.emit(ops.add_scalar, e.emit(ops.mul_scalar, y, value=-1.0), value=x)
    return e.emit(ops.sub, x, y)


@rule("rsub", "__rsub__")
def _rsub(e: Lowering, x: Value, y: Value, alpha: float = 1) -> fx.Node:
    return _sub(e, y, x, alpha=alpha)


@rule("mul", "mul_", "imul", "multiply", "__mul__", "__rmul__")
def _mul(e: Lowering, x: Value, y: Value) -> fx.Node:
    x, y = broadcast(x, y)
    if not is_tensor(x):
        x, y = y, x
    return e.emit(ops.mul, x, y) if is_tensor(y) else e.emit(ops.mul_scalar, x, value=y)


@rule("div", "div_", "truediv", "itruediv", "divide", "true_divide", "__truediv__")
def _div(e: Lowering, x: Value, y: Value, *, rounding_mode: str | None = None) -> fx.Node:
    x, y = broadcast(x, y)
    if rounding_mode is not None or not is_tensor(x):
        raise UnsupportedError("with a rounding mode or of a number by a tensor is not supported")
    return e.emit(ops.div, x, y) if is_tensor(y) else e.emit(ops.mul_scalar, x, value=1.0 / y)


@rule("neg", "__neg__")
def _neg(e: Lowering, x: Value) -> fx.Node:
    return e.emit(ops.mul_scalar, x, value=-1.0)
