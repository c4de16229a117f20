"""Rules of what joins, cuts, reshapes and resamples tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import fx

from calibquant.graph import ops
from calibquant.graph.lowering import BatchDependent, Expanded, Lowering, UnsupportedError, rule
from calibquant.graph.rules.arguments import Value, rank


@rule("cat", "concat", "concatenate")
def _cat(e: Lowering, tensors: Sequence[Value], dim: int = 0, axis: int | None = None) -> fx.Node:
    dim = (dim if axis is None else axis) % rank(e, tensors[0])
    if dim == 0:
        raise UnsupportedError("along the batch is not supported")
    return e.emit(ops.cat, list(tensors), dim=dim)


@rule("stack")
def _stack(e: Lowering, tensors: Sequence[Value], dim: int = 0) -> fx.Node:
    dims = rank(e, tensors[0]) + 1
    if dim % dims == 0:
        raise UnsupportedError("along the batch is not supported")
    shape = list(e.shapes(tensors[0])[0])
    shape[0] = -1
    shape.insert(dim % dims, 1)
    return e.emit(ops.cat, [e.emit(ops.reshape, t, shape=shape) for t in tensors], dim=dim % dims)


@rule("chunk", "split", "split_with_sizes", "tensor_split")
def _chunk(e: Lowering, x: Value, sizes: Any = None, dim: int = 0, **_: Any) -> list[fx.Node]:
    return _pieces(e, x, dim, [piece.shape[dim] for piece in e.result[0]])


@rule("unbind")
def _unbind(e: Lowering, x: Value, dim: int = 0) -> list[fx.Node]:
    shapes = [(-1, *piece.shape[1:]) for piece in e.result[0]]
    pieces = _pieces(e, x, dim, [1] * len(shapes))
    return [e.emit(ops.reshape, piece, shape=shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _pieces(e: Lowering, x: Value, dim: int, widths: list[int]) -> list[fx.Node]:
    """A tensor cut along a dimension; what a network asked for is read from what it got."""
    dim %= rank(e, x)
    if dim == 0:
        raise UnsupportedError("along the batch is not supported")
    stops = list(accumulate(widths))
    return [
        e.emit(ops.slice_, x, dim=dim, start=stop - width, stop=stop, step=1)
        for stop, width in zip(stops, widths, strict=True)
    ]


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
    dims = rank(e, x)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        given = sum(1 for i in items if i is not Ellipsis and i is not None)
        items[at : at + 1] = [slice(None)] * (dims - given)
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
    dim %= rank(e, x)
    return _slice_node(e, x, dim, slice(start, end, step), e.shapes(x)[0][dim])


@rule("slice_scatter")
def _slice_scatter(
    e: Lowering, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    """What torch.export makes of an in-place operation on a slice."""
    dim %= rank(e, x)
    size = e.shapes(x)[0][dim]
    start, stop, step = slice(start, end, step).indices(size)
    if dim == 0 or step != 1:
        raise UnsupportedError("along the batch or with a step is not supported")
    before, after = _slice_node(e, x, dim, slice(0, start), size), _slice_node(e, x, dim, slice(stop, size), size)
    parts = [p for p, width in ((before, start), (source, stop - start), (after, size - stop)) if width]
    return parts[0] if len(parts) == 1 else e.emit(ops.cat, parts, dim=dim)


@rule("narrow")
def _narrow(e: Lowering, x: Value, dim: int, start: int, length: int) -> Value:
    dim %= rank(e, x)
    return _slice_node(e, x, dim, slice(start, start + length), e.shapes(x)[0][dim])


@rule("select")
def _select(e: Lowering, x: Value, dim: int, index: int) -> Value:
    return _getitem(e, x, (*[slice(None)] * (dim % rank(e, x)), index))


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


@rule("expand", "expand_as", "broadcast_to", "repeat")
def _expand(e: Lowering, x: Value, *_: Any, **__: Any) -> Value:
    if isinstance(x, Expanded):
        x = x.source
    return Expanded(x, e.result)


@rule("permute")
def _permute(e: Lowering, x: Value, *dims: Any) -> fx.Node:
    order = [d % rank(e, x) for d in (dims[0] if isinstance(dims[0], Sequence) else dims)]
    return e.emit(ops.permute, x, dims=_keep_batch(order))


@rule("transpose", "swapaxes", "swapdims")
def _transpose(e: Lowering, x: Value, a: int, b: int) -> fx.Node:
    order = list(range(rank(e, x)))
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
    given = scale_factor is not None and not recompute_scale_factor  # recomputed: the factors are the sizes' ratios
    scale = tuple(float(v) for v in _floats(scale_factor)) if given else None
    target = {"size": shape if scale is None else None, "scale": scale}
    if mode == "nearest":
        return e.emit(ops.upsample_nearest, input, **target)
    if antialias:
        raise UnsupportedError("with antialias is not supported")
    if mode == "bilinear":
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
