"""Rules of element-wise functions of one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from calibquant.graph import ops
from calibquant.graph.lowering import Lowering, Rule, UnsupportedError, rule
from calibquant.graph.rules.arguments import Value


def _unary(op: Callable[[Tensor], Tensor]) -> Rule:
    def lowered(e: Lowering, input: Value, inplace: bool = False) -> fx.Node:
        return e.emit(op, input)

    return lowered


for _op in (ops.relu, ops.sigmoid, ops.tanh, ops.hardsigmoid, ops.hardswish, ops.silu, ops.mish):
    rule(_op.__name__, f"{_op.__name__}_")(_unary(_op))


@rule("relu6", "relu6_")
def _relu6(e: Lowering, input: Value, inplace: bool = False) -> fx.Node:
    return e.emit(ops.clamp, input, low=0.0, high=6.0)


@rule("hardtanh", "hardtanh_")
def _hardtanh(
    e: Lowering,
    input: Value,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> fx.Node:
    return _clamp(e, input, min_val, max_val)


@rule("clamp", "clamp_", "clip", "clip_")
def _clamp(e: Lowering, input: Value, min: Any = None, max: Any = None) -> fx.Node:
    low, high = (None if limit is None or math.isinf(limit) else limit for limit in (min, max))
    return e.emit(ops.relu, input) if (low, high) == (0, None) else e.emit(ops.clamp, input, low=low, high=high)


@rule("clamp_min", "clamp_min_")
def _clamp_min(e: Lowering, input: Value, min: float) -> fx.Node:
    return _clamp(e, input, min)


@rule("leaky_relu", "leaky_relu_")
def _leaky_relu(e: Lowering, input: Value, negative_slope: float = 0.01, inplace: bool = False) -> fx.Node:
    return e.emit(ops.leaky_relu, input, slope=negative_slope)


@rule("prelu")
def _prelu(e: Lowering, input: Value, weight: Value) -> fx.Node:
    return e.emit(ops.prelu, input, weight)


@rule("elu", "elu_")
def _elu(e: Lowering, input: Value, alpha: float = 1.0, *rest: Any, **_: Any) -> fx.Node:
    if any(r not in (1, 1.0, False) for r in rest):
        raise UnsupportedError("with scales is not supported")
    return e.emit(ops.elu, input, alpha=alpha)


@rule("gelu")
def _gelu(e: Lowering, input: Value, *, approximate: str = "none") -> fx.Node:
    return e.emit(ops.gelu, input, approximate=approximate)


@rule("softplus")
def _softplus(e: Lowering, input: Value, beta: float = 1.0, threshold: float = 20.0) -> fx.Node:
    return e.emit(ops.softplus, input, beta=beta, threshold=threshold)


@rule("identity", "dropout", "dropout_", "dropout2d", "feature_dropout", "alpha_dropout", "contiguous", "clone",
      "detach", "detach_", "lift_fresh_copy", "alias", "positive")  # fmt: skip
def _identity(e: Lowering, input: Value, *_: Any, **__: Any) -> Value:
    return input  # the lowering checks that the value is unchanged


@rule("float", "to", "type_as", "_to_copy", "type")
def _cast(e: Lowering, input: Value, *_: Any, **__: Any) -> Value:
    if e.result[0].dtype != input.meta["example"][0].dtype:
        raise UnsupportedError("changes the data type, which is not supported")
    return input
