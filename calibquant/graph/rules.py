"""How torch's functions, tensor methods and aten operators are written in canonical ops.

One rule serves every spelling of an operation: `F.relu`, `torch.relu`, `x.relu_()` and `aten.relu_` are all "relu". A
rule takes the lowering and then the operation's own arguments: canonical nodes for what depends on the input, tensors
for constants, plain values for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calibquant.graph import ops
from calibquant.graph.lowering import BatchDependent, Lowering, UnsupportedError, parameter_name, rule

Value = Any  # a canonical fx.Node, a constant Tensor, or a plain Python value


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, Sequence):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


def _rank(e: Lowering, x: Value) -> int:
    return len(e.shapes(x)[0])


def _is_tensor(value: Value) -> bool:
    return isinstance(value, (fx.Node, Tensor))


# --- convolutions, products -------------------------------------------------------------------------------------------


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
    x, pads = _explicit_padding(e, input, weight, padding, _pair(dilation))
    return e.emit(
        ops.conv2d, x, weight, bias, stride=_pair(stride), padding=pads, dilation=_pair(dilation), groups=groups
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
    step = _pair(dilation)[0]
    x, pads = _explicit_padding(e, input, weight, padding, (step,))
    stride = _pair(stride)[0]
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
        ops.conv_transpose2d, input, weight, bias, stride=_pair(stride), padding=_pair(padding),
        output_padding=_pair(output_padding), groups=groups, dilation=_pair(dilation),
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


# --- several tensors --------------------------------------------------------------------------------------------------


@rule("add", "add_", "iadd", "__add__", "__radd__")
def _add(e: Lowering, x: Value, y: Value, *, alpha: float = 1) -> fx.Node:
    if not _is_tensor(x):
        x, y = y, x
    if not _is_tensor(y):
        return e.emit(ops.add_scalar, x, value=y * alpha)
    if alpha != 1:
        y = y * alpha if isinstance(y, Tensor) else e.emit(ops.mul_scalar, y, value=alpha)
    return e.emit(ops.add, x, y)


@rule("sub", "sub_", "isub", "subtract", "__sub__")
def _sub(e: Lowering, x: Value, y: Value, *, alpha: float = 1) -> fx.Node:
    if not _is_tensor(y):
        return e.emit(ops.add_scalar, x, value=-y * alpha)
    if alpha != 1:
        y = y * alpha if isinstance(y, Tensor) else e.emit(ops.mul_scalar, y, value=alpha)
    if not _is_tensor(x):
        return e.emit(ops.add_scalar, e.emit(ops.mul_scalar, y, value=-1.0), value=x)
    return e.emit(ops.sub, x, y)


@rule("rsub", "__rsub__")
def _rsub(e: Lowering, x: Value, y: Value, alpha: float = 1) -> fx.Node:
    return _sub(e, y, x, alpha=alpha)


@rule("mul", "mul_", "imul", "multiply", "__mul__", "__rmul__")
def _mul(e: Lowering, x: Value, y: Value) -> fx.Node:
    if not _is_tensor(x):
        x, y = y, x
    return e.emit(ops.mul, x, y) if _is_tensor(y) else e.emit(ops.mul_scalar, x, value=y)


@rule("div", "div_", "truediv", "itruediv", "divide", "true_divide", "__truediv__")
def _div(e: Lowering, x: Value, y: Value, *, rounding_mode: str | None = None) -> fx.Node:
    if rounding_mode is not None or not _is_tensor(x):
        raise UnsupportedError("with a rounding mode or of a number by a tensor is not supported")
    return e.emit(ops.div, x, y) if _is_tensor(y) else e.emit(ops.mul_scalar, x, value=1.0 / y)


@rule("neg", "__neg__")
def _neg(e: Lowering, x: Value) -> fx.Node:
    return e.emit(ops.mul_scalar, x, value=-1.0)


@rule("cat", "concat", "concatenate")
def _cat(e: Lowering, tensors: Sequence[Value], dim: int = 0, axis: int | None = None) -> fx.Node:
    dim = (dim if axis is None else axis) % _rank(e, tensors[0])
    if dim == 0:
        raise UnsupportedError("along the batch is not supported")
    return e.emit(ops.cat, list(tensors), dim=dim)


@rule("stack")
def _stack(e: Lowering, tensors: Sequence[Value], dim: int = 0) -> fx.Node:
    rank = _rank(e, tensors[0]) + 1
    if dim % rank == 0:
        raise UnsupportedError("along the batch is not supported")
    shape = list(e.shapes(tensors[0])[0])
    shape[0] = -1
    shape.insert(dim % rank, 1)
    return e.emit(ops.cat, [e.emit(ops.reshape, t, shape=shape) for t in tensors], dim=dim % rank)


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
def _chunk(e: Lowering, x: Value, sizes: Any = None, dim: int = 0, **kwargs: Any) -> list[fx.Node]:
    name = str(getattr(e.current, "target", ""))
    dim = (int(sizes) if "unbind" in name and sizes is not None else dim) % _rank(e, x)
    if dim == 0:
        raise UnsupportedError("along the batch is not supported")
    pieces, start = [], 0
    for piece in e.result[0]:
        width = 1 if "unbind" in name else piece.shape[dim]
        node = e.emit(ops.slice_, x, dim=dim, start=start, stop=start + width, step=1)
        if "unbind" in name:
            node = e.emit(ops.reshape, node, shape=[-1, *piece.shape[1:]])
        pieces.append(node)
        start += width
    return pieces


@rule("getattr")
def _getattr(e: Lowering, x: Value, name: str) -> Any:
    if isinstance(x, list) and name in ("values", "indices"):
        return x[("values", "indices").index(name)]
    raise UnsupportedError(f"of {name} is not supported")


@rule("getitem", "__getitem__")
def _getitem(e: Lowering, x: Value, index: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return x[index]
    items = list(index) if isinstance(index, (list, tuple)) else [index]
    rank = _rank(e, x)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        given = sum(1 for i in items if i is not Ellipsis and i is not None)
        items[at : at + 1] = [slice(None)] * (rank - given)
    shape, dim, reshaped, node = e.shapes(x)[0], 0, False, x
    for item in items:
        if item is None:
            reshaped = True
            continue
        if isinstance(item, slice):
            node = _slice_node(e, node, dim, item, shape[dim])
        elif isinstance(item, int) and dim > 0:
            start = item % shape[dim]
            node, reshaped = e.emit(ops.slice_, node, dim=dim, start=start, stop=start + 1, step=1), True
        else:
            raise UnsupportedError("with such an index is not supported")
        dim += 1
    return _reshape(e, node) if reshaped else node


def _slice_node(e: Lowering, x: Value, dim: int, item: slice, size: int) -> Value:
    if isinstance(item.stop, BatchDependent) and dim == 0:
        return x
    start, stop, step = item.indices(size)
    if (start, stop, step) == (0, size, 1):
        return x
    if dim == 0:
        raise UnsupportedError("of some images of the batch is not supported")
    if step < 1:
        raise UnsupportedError("with a negative step is not supported")
    return e.emit(ops.slice_, x, dim=dim, start=start, stop=stop, step=step)


@rule("slice")
def _aten_slice(e: Lowering, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    dim %= _rank(e, x)
    return _slice_node(e, x, dim, slice(start, end, step), e.shapes(x)[0][dim])


@rule("slice_scatter")
def _slice_scatter(
    e: Lowering, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    """What torch.export makes of an in-place operation on a slice."""
    dim %= _rank(e, x)
    size = e.shapes(x)[0][dim]
    start, stop, step = slice(start, end, step).indices(size)
    if dim == 0 or step != 1:
        raise UnsupportedError("along the batch or with a step is not supported")
    before, after = _slice_node(e, x, dim, slice(0, start), size), _slice_node(e, x, dim, slice(stop, size), size)
    parts = [p for p, width in ((before, start), (source, stop - start), (after, size - stop)) if width]
    return parts[0] if len(parts) == 1 else e.emit(ops.cat, parts, dim=dim)


@rule("narrow")
def _narrow(e: Lowering, x: Value, dim: int, start: int, length: int) -> Value:
    dim %= _rank(e, x)
    return _slice_node(e, x, dim, slice(start, start + length), e.shapes(x)[0][dim])


@rule("select")
def _select(e: Lowering, x: Value, dim: int, index: int) -> Value:
    return _getitem(e, x, (*[slice(None)] * (dim % _rank(e, x)), index))


# --- pools ------------------------------------------------------------------------------------------------------------


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
        ops.max_pool2d, input, kernel=_pair(kernel_size), stride=_pair(stride), padding=_pair(padding),
        dilation=_pair(dilation), ceil=bool(ceil_mode),
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
        ops.avg_pool2d, input, kernel=_pair(kernel_size), stride=_pair(stride), padding=_pair(padding),
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
    if _is_tensor(dim):
        raise UnsupportedError("of two tensors is not supported")
    return _without_indices(e, e.emit(ops.amax, x, dims=_dims(e, x, dim), keepdim=keepdim))


def _dims(e: Lowering, x: Value, dim: Any) -> list[int]:
    rank = _rank(e, x)
    dims = sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim or range(rank)))
    if 0 in dims:
        raise UnsupportedError("over the batch is not supported")
    return dims


@rule("mean")
def _mean(e: Lowering, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> fx.Node:
    return e.emit(ops.mean, x, dims=_dims(e, x, dim), keepdim=keepdim)


@rule("sum")
def _sum(e: Lowering, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> fx.Node:
    node = _mean(e, x, dim, keepdim)
    shape = e.shapes(x)[0]
    return e.emit(ops.mul_scalar, node, value=float(math.prod(shape[d] for d in node.kwargs["dims"])))


# --- normalization ----------------------------------------------------------------------------------------------------


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


# --- element-wise functions -------------------------------------------------------------------------------------------


@rule("relu", "relu_")
def _relu(e: Lowering, input: Value, inplace: bool = False) -> fx.Node:
    return e.emit(ops.relu, input)


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


@rule("sigmoid", "sigmoid_")
def _sigmoid(e: Lowering, input: Value) -> fx.Node:
    return e.emit(ops.sigmoid, input)


@rule("tanh", "tanh_")
def _tanh(e: Lowering, input: Value) -> fx.Node:
    return e.emit(ops.tanh, input)


@rule("hardsigmoid", "hardsigmoid_")
def _hardsigmoid(e: Lowering, input: Value, inplace: bool = False) -> fx.Node:
    return e.emit(ops.hardsigmoid, input)


@rule("hardswish", "hardswish_")
def _hardswish(e: Lowering, input: Value, inplace: bool = False) -> fx.Node:
    return e.emit(ops.hardswish, input)


@rule("silu", "silu_")
def _silu(e: Lowering, input: Value, inplace: bool = False) -> fx.Node:
    return e.emit(ops.silu, input)


@rule("gelu")
def _gelu(e: Lowering, input: Value, *, approximate: str = "none") -> fx.Node:
    return e.emit(ops.gelu, input, approximate=approximate)


@rule("softplus")
def _softplus(e: Lowering, input: Value, beta: float = 1.0, threshold: float = 20.0) -> fx.Node:
    return e.emit(ops.softplus, input, beta=beta, threshold=threshold)


@rule("mish", "mish_")
def _mish(e: Lowering, input: Value, inplace: bool = False) -> fx.Node:
    return e.emit(ops.mish, input)


@rule("identity", "dropout", "dropout_", "dropout2d", "feature_dropout", "alpha_dropout", "contiguous", "clone",
      "detach", "detach_", "lift_fresh_copy", "alias", "positive")  # fmt: skip
def _identity(e: Lowering, input: Value, *_: Any, **__: Any) -> Value:
    return input  # the lowering checks that the value is unchanged


@rule("float", "to", "type_as", "_to_copy", "type")
def _cast(e: Lowering, input: Value, *_: Any, **__: Any) -> Value:
    if e.result[0].dtype != input.meta["example"][0].dtype:
        raise UnsupportedError("changes the data type, which is not supported")
    return input


# --- moves ------------------------------------------------------------------------------------------------------------


@rule("view", "reshape", "unsqueeze", "unsqueeze_", "squeeze", "squeeze_", "unflatten", "_unsafe_view", "view_as",
      "reshape_as")  # fmt: skip
def _reshape(e: Lowering, x: Value, *_: Any, **__: Any) -> fx.Node:
    """Any change of shape: what it is, is read from the shapes it gave for two batch sizes."""
    (a, b), (was, _b) = (tuple(r.shape) for r in e.result), e.shapes(x)
    if a == was:
        return x
    if len(a) < 1 or a[1:] != b[1:] or a[0] == b[0]:
        raise UnsupportedError("moves the batch dimension, which is not supported")
    if len(a) == 2 and a[0] == was[0]:
        return e.emit(ops.flatten, x, start=1)
    return e.emit(ops.reshape, x, shape=(-1, *a[1:]))


@rule("flatten")
def _flatten(e: Lowering, input: Value, start_dim: int = 0, end_dim: int = -1) -> fx.Node:
    return _reshape(e, input)


@rule("permute")
def _permute(e: Lowering, x: Value, *dims: Any) -> fx.Node:
    order = [d % _rank(e, x) for d in (dims[0] if isinstance(dims[0], Sequence) else dims)]
    return e.emit(ops.permute, x, dims=_keep_batch(order))


@rule("transpose", "swapaxes", "swapdims")
def _transpose(e: Lowering, x: Value, a: int, b: int) -> fx.Node:
    order = list(range(_rank(e, x)))
    order[a], order[b] = order[b], order[a]
    return e.emit(ops.permute, x, dims=_keep_batch(order))


@rule("t")
def _t(e: Lowering, x: Value) -> fx.Node:
    return _transpose(e, x, 0, 1)


def _keep_batch(order: list[int]) -> list[int]:
    if order[0] != 0:
        raise UnsupportedError("moves the batch dimension, which is not supported")
    return order


@rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def _pad(
    e: Lowering,
    input: Value,
    pad: Sequence[int],
    mode: Any = "constant",
    value: float | None = None,
) -> Value:
    target = str(getattr(e.current, "target", ""))
    if not isinstance(mode, str):  # aten.constant_pad_nd(x, pad, value)
        mode, value = "constant", mode
    mode = "reflect" if "reflection" in target else "replicate" if "replication" in target else mode
    padding = tuple(int(p) for p in pad)
    if value not in (None, 0, 0.0) and mode == "constant":
        return e.emit(ops.pad_value, input, padding=padding, value=value)
    return e.emit(ops.pad, input, padding=padding, mode=mode) if any(padding) else input


@rule("interpolate")
def _interpolate(
    e: Lowering,
    input: Value,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: Any = None,
    antialias: bool = False,
) -> fx.Node:
    shape = tuple(int(v) for v in e.result[0].shape[-2:])
    scale = None if scale_factor is None else tuple(float(v) for v in _floats(scale_factor))
    target = {"size": shape if scale is None else None, "scale": scale}
    if mode == "nearest":
        return e.emit(ops.upsample_nearest, input, **target)
    if mode == "bilinear" and not antialias:
        return e.emit(ops.upsample_bilinear, input, **target, align_corners=bool(align_corners))
    raise UnsupportedError(f"with mode {mode} is not supported")


def _floats(value: Any) -> tuple[float, float]:
    return (value[0], value[-1]) if isinstance(value, Sequence) else (value, value)


@rule("upsample_nearest2d")
def _upsample_nearest2d(e: Lowering, x: Value, size: Any = None, scale: Any = None, *_: Any) -> fx.Node:
    return _interpolate(e, x, size, scale)


@rule("upsample_bilinear2d")
def _upsample_bilinear2d(
    e: Lowering, x: Value, size: Any = None, align_corners: bool = False, scale: Any = None, *_: Any
) -> fx.Node:
    return _interpolate(e, x, size, scale, "bilinear", align_corners)


@rule("pixel_unshuffle")
def _pixel_unshuffle(e: Lowering, x: Value, downscale_factor: int) -> fx.Node:
    return e.emit(ops.pixel_unshuffle, x, factor=downscale_factor)


@rule("pixel_shuffle")
def _pixel_shuffle(e: Lowering, x: Value, upscale_factor: int) -> fx.Node:
    return e.emit(ops.pixel_shuffle, x, factor=upscale_factor)


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(e: Lowering, x: Value, groups: int) -> fx.Node:
    channels, height, width = e.shapes(x)[0][1:]
    split = e.emit(ops.reshape, x, shape=(-1, groups, channels // groups, height, width))
    return e.emit(ops.reshape, e.emit(ops.permute, split, dims=(0, 2, 1, 3, 4)), shape=(-1, channels, height, width))
