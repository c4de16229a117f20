"""Rules of pools, reductions and normalization."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from calibquant.graph import ops
from calibquant.graph.lowering import Lowering, UnsupportedError, parameter_name, rule
from calibquant.graph.rules.arguments import Value, is_tensor, pair, reduced


@rule("max_pool2d", "max_pool2d_with_indices")
def _max_pool2d(
    e: Lowering,
    input: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    stride = kernel_size if stride in (None, [], ()) else stride
    node = e.emit(
        ops.max_pool2d, input, kernel=pair(kernel_size), stride=pair(stride), padding=pair(padding),
        dilation=pair(dilation), ceil=bool(ceil_mode),
    )  # fmt: skip
    return _without_indices(e, node)


def _without_indices(e: Lowering, node: fx.Node) -> Any:
    """An operation that also gives indices, which have no canonical form."""
    return node if isinstance(e.result[0], Tensor) else [node, None]


@rule("avg_pool2d")
def _avg_pool2d(
    e: Lowering,
    input: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> fx.Node:
    stride = kernel_size if stride in (None, [], ()) else stride
    return e.emit(
        ops.avg_pool2d, input, kernel=pair(kernel_size), stride=pair(stride), padding=pair(padding),
        ceil=bool(ceil_mode), count_padding=bool(count_include_pad), divisor=divisor_override,
    )  # fmt: skip


@rule("adaptive_avg_pool2d")
def _adaptive_avg_pool2d(e: Lowering, input: Value, output_size: Any) -> fx.Node:
    size = tuple(int(v) for v in e.result[0].shape[-2:])
    if size == (1, 1):
        return e.emit(ops.mean, input, dims=(2, 3), keepdim=True)
    return e.emit(ops.adaptive_avg_pool2d, input, size=size)


@rule("adaptive_max_pool2d", "adaptive_max_pool2d_with_indices")
def _adaptive_max_pool2d(e: Lowering, input: Value, output_size: Any, return_indices: bool = False) -> Any:
    result = e.result[0] if isinstance(e.result[0], Tensor) else e.result[0][0]
    size = tuple(int(v) for v in result.shape[-2:])
    return _without_indices(e, e.emit(ops.adaptive_max_pool2d, input, size=size))


@rule("amax", "max")
def _amax(e: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Any:
    if is_tensor(dim):
        raise UnsupportedError("of two tensors is not supported")
    return _without_indices(e, e.emit(ops.amax, x, dims=reduced(e, x, dim), keepdim=keepdim))


@rule("mean")
def _mean(e: Lowering, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> fx.Node:
    return e.emit(ops.mean, x, dims=reduced(e, x, dim), keepdim=keepdim)


@rule("sum")
def _sum(e: Lowering, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> fx.Node:
    node = _mean(e, x, dim, keepdim)
    shape = e.shapes(x)[0]
    return e.emit(ops.mul_scalar, node, value=float(math.prod(shape[d] for d in node.kwargs["dims"])))


@rule("_BatchNorm")
def _batch_norm_module(e: Lowering, module: Any, x: Value) -> fx.Node:
    if module.running_mean is None:
        raise UnsupportedError("without running statistics depends on the batch")
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, name)
        if tensor is not None and not any(t is tensor for t in e.constants.values()):
            e.constants[parameter_name(f"{e.current.target}.{name}")] = tensor  # type: ignore[union-attr]
    return e.emit(
        ops.batch_norm, x, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps
    )


@rule("batch_norm")
def _batch_norm(
    e: Lowering, x: Value, a: Value, b: Value, c: Value, d: Value, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5, cudnn_enabled: bool = True,
) -> fx.Node:  # fmt: skip
    if training:
        raise UnsupportedError("in training mode depends on the batch")
    aten = isinstance(e.current.target, torch._ops.OpOverload)  # type: ignore[union-attr]
    weight, bias, mean, var = (a, b, c, d) if aten else (c, d, a, b)
    return e.emit(ops.batch_norm, x, mean, var, weight, bias, eps=eps)


@rule("_native_batch_norm_legit_no_training")
def _native_batch_norm(
    e: Lowering, x: Value, weight: Value, bias: Value, mean: Value, var: Value, momentum: float, eps: float
) -> list[Any]:
    return [e.emit(ops.batch_norm, x, mean, var, weight, bias, eps=eps), None, None]


@rule("native_layer_norm")
def _native_layer_norm(e: Lowering, *args: Any) -> list[Any]:
    return [_layer_norm(e, *args), None, None]


@rule("native_group_norm")
def _native_group_norm(
    e: Lowering, x: Value, weight: Value, bias: Value, n: Any, c: Any, area: Any, groups: int, eps: float
) -> list[Any]:
    return [_group_norm(e, x, groups, weight, bias, eps), None, None]


@rule("layer_norm")
def _layer_norm(
    e: Lowering,
    input: Value,
    normalized_shape: Any,
    weight: Value = None,
    bias: Value = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> fx.Node:
    return e.emit(ops.layer_norm, input, weight, bias, normalized_shape=tuple(normalized_shape), eps=eps)


@rule("group_norm")
def _group_norm(
    e: Lowering,
    input: Value,
    num_groups: int,
    weight: Value = None,
    bias: Value = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> fx.Node:
    return e.emit(ops.group_norm, input, weight, bias, groups=num_groups, eps=eps)


@rule("softmax", "_softmax")
def _softmax(e: Lowering, input: Value, dim: int = -1, *_: Any, **__: Any) -> fx.Node:
    return e.emit(ops.softmax, input, dim=dim)
