"""Pools in ONNX, with torch's rules of rounding up, padding and counting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from calibquant.export.onnx_calls import Call
from calibquant.graph import ops


def reduction(op: str) -> Callable[[Call], None]:
    """The row of a reduction over dimensions."""

    def row(c: Call) -> None:
        c.last(op, c.inputs[0], c.ints(*c.attributes["dims"]), keepdims=int(c.attributes["keepdim"]))

    return row


def max_pool2d(c: Call) -> None:
    """ONNX Runtime pads by less than the kernel only, and merges a Pad into the pool: wide padding is none at all."""
    a = c.attributes
    pads = (*a["padding"], *_ends(c, a["dilation"]))
    if all(pad < kernel for pad, kernel in zip(pads, (*a["kernel"], *a["kernel"]), strict=True)):
        c.last("MaxPool", kernel_shape=a["kernel"], strides=a["stride"], pads=pads, dilations=a["dilation"])
    else:
        _max_of_windows(c, *(_windows_of(c, axis) for axis in (0, 1)))


def avg_pool2d(c: Call) -> None:
    """torch divides by what a window holds within the padded image, however far rounding up makes it reach beyond.

    So the padding is written out, and where torch divides by another number than ONNX a factor follows.
    """
    a, x = c.attributes, c.inputs[0]
    factor = _factor(c) if a["divisor"] or a["count_padding"] else np.float32(1)
    pads = tuple(a["padding"]) + _ends(c, (1, 1))
    counted = int(bool(a["divisor"] or a["count_padding"]))
    settings = {"kernel_shape": a["kernel"], "strides": a["stride"], "pads": pads, "count_include_pad": counted}
    if np.all(factor == 1):
        c.last("AveragePool", x, **settings)
    else:
        c.last("Mul", c.before("AveragePool", x, **settings), c.floats(factor))


def adaptive_avg_pool2d(c: Call) -> None:
    """Even windows are an AveragePool; windows of different sizes become torch's weights as two products."""
    kernel = _even_windows(c)
    if kernel:
        c.last("AveragePool", kernel_shape=kernel, strides=kernel)
    else:
        linear_maps(c, ops.adaptive_avg_pool2d)


def adaptive_max_pool2d(c: Call) -> None:
    """Even windows are a MaxPool."""
    kernel = _even_windows(c)
    if kernel:
        c.last("MaxPool", kernel_shape=kernel, strides=kernel)
        return
    windows = []
    for size, count in zip(c.shapes[0][2:], c.shape[2:], strict=True):
        windows.append([range(i * size // count, -(-(i + 1) * size // count)) for i in range(count)])
    _max_of_windows(c, *windows)


def _max_of_windows(c: Call, *axes: Sequence[Sequence[int]]) -> None:
    """Windows of any form, laid side by side; short ones repeat a value, which changes no maximum.

    Args:
        axes: for height and width the positions that each output's window holds.
    """
    x, kernel = c.inputs[0], [max(len(window) for window in windows) for windows in axes]
    for axis, windows, length in zip((2, 3), axes, kernel, strict=True):
        sources = [window[min(j, len(window) - 1)] for window in windows for j in range(length)]
        x = c.before("Gather", x, c.ints(*sources), axis=axis)
    c.last("MaxPool", x, kernel_shape=kernel, strides=kernel)


def _windows_of(c: Call, axis: int) -> list[list[int]]:
    """The positions within the image that each window of a max_pool2d holds."""
    size, count = c.shapes[0][2 + axis], c.shape[2 + axis]
    kernel, stride, padding, dilation = (c.attributes[key][axis] for key in ("kernel", "stride", "padding", "dilation"))
    starts = [i * stride - padding for i in range(count)]
    return [[s + j * dilation for j in range(kernel) if 0 <= s + j * dilation < size] for s in starts]


def linear_maps(c: Call, op: Callable[..., Tensor]) -> None:
    """An op that is a linear map of rows and one of columns, as two products: rows @ x @ columns.

    Args:
        op: the canonical op; its weights are read from what it makes of unit vectors.
    """
    height, width = c.shapes[0][2:]
    unit = torch.eye(height).reshape(1, height, height, 1).expand(-1, -1, -1, width)
    rows = op(unit, **c.attributes)[0, :, :, 0].T
    unit = torch.eye(width).reshape(1, width, 1, width).expand(-1, -1, height, -1)
    columns = op(unit, **c.attributes)[0, :, 0]
    c.last("MatMul", c.before("MatMul", c.floats(rows.numpy()), c.inputs[0]), c.floats(columns.numpy()))


def _even_windows(c: Call) -> list[int] | None:
    before, after = c.shapes[0][2:], c.shape[2:]
    even = all(m % n == 0 for m, n in zip(before, after, strict=True))
    return [m // n for m, n in zip(before, after, strict=True)] if even else None


def _ends(c: Call, dilation: tuple[int, int]) -> tuple[int, ...]:
    """Padding at the ends, so much that rounding down gives torch's output size."""
    a = c.attributes
    reach = [
        (n - 1) * s + (k - 1) * d + 1 - m - p
        for m, n, k, s, p, d in zip(
            c.shapes[0][2:], c.shape[2:], a["kernel"], a["stride"], a["padding"], dilation, strict=True
        )
    ]
    return tuple(max(p, r) for p, r in zip(a["padding"], reach, strict=True))


def _factor(c: Call) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | np.float32:
    """What ONNX divides by, the whole kernel, over what torch divides by."""
    a = c.attributes
    area = a["kernel"][0] * a["kernel"][1]
    if a["divisor"]:
        return np.float32(area / a["divisor"])
    held = []
    for m, n, k, s, p in zip(c.shapes[0][2:], c.shape[2:], a["kernel"], a["stride"], a["padding"], strict=True):
        starts = np.arange(n) * s - p
        held.append(np.minimum(starts + k, m + p) - starts)
    factor = (area / np.outer(*held)).astype(np.float32)
    return np.float32(1) if (factor == 1).all() else factor
