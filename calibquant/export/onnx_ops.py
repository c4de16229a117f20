"""The canonical ops in ONNX: one row for each op of `graph.ops`.

Moves, and pools that select, work on float32 values and on uint8 codes alike: ONNX Runtime 1.24 and newer have uint8
kernels for every ONNX op that their rows write (Reshape, Transpose, Slice, Pad in all modes, Resize, Gather, Concat,
MaxPool, ReduceMax; measured with 1.24.4 and 1.31.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from calibquant.export.onnx_calls import Call
from calibquant.export.onnx_pools import (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    max_pool2d,
    reduction,
)
from calibquant.graph import ops

Row = Callable[[Call], None]
_ALL = np.iinfo(np.int64).max


def _same(op: str, **attributes: Any) -> Row:
    """An ONNX op of the same inputs."""
    return lambda c: c.last(op, **attributes)


# --- products ---------------------------------------------------------------------------------------------------------


def _conv(c: Call) -> None:
    a = {key: (value,) if isinstance(value, int) else tuple(value) for key, value in c.attributes.items()}
    c.last(
        "Conv",
        kernel_shape=c.shapes[1][2:],
        strides=a["stride"],
        pads=a["padding"] * 2,
        dilations=a["dilation"],
        group=a["groups"][0],
    )


def _conv_transpose2d(c: Call) -> None:
    a = c.attributes
    c.last(
        "ConvTranspose",
        kernel_shape=c.shapes[1][2:],
        strides=tuple(a["stride"]),
        pads=tuple(a["padding"]) * 2,
        output_padding=tuple(a["output_padding"]),
        dilations=tuple(a["dilation"]),
        group=a["groups"],
    )


def _linear(c: Call) -> None:
    """Gemm takes matrices; of more dimensions all but the last are put together."""
    x, weight, bias = c.inputs
    if len(c.shapes[0]) == 2:
        c.last("Gemm", x, weight, bias, transB=1)
        return
    rows = c.before("Reshape", x, c.ints(-1, c.shapes[0][-1]))
    c.last("Reshape", c.before("Gemm", rows, weight, bias, transB=1), c.ints(-1, *c.shape[1:]))


def _embedding(c: Call) -> None:
    c.last("Gather", c.inputs[1], c.inputs[0], axis=0)


def _cat(c: Call) -> None:
    c.last("Concat", *c.inputs[0], axis=c.attributes["dim"])


# --- normalization ----------------------------------------------------------------------------------------------------


def _batch_norm(c: Call) -> None:
    x, mean, var, weight, bias = c.inputs
    scale, shift = weight or c.floats(np.ones(c.shapes[1])), bias or c.floats(np.zeros(c.shapes[1]))
    c.last("BatchNormalization", x, scale, shift, mean, var, epsilon=c.attributes["eps"])


def _layer_norm(c: Call) -> None:
    x, weight, bias = c.inputs
    shape = tuple(c.attributes["normalized_shape"])
    scale = weight or c.floats(np.ones(shape))
    c.last("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=c.attributes["eps"])


def _group_norm(c: Call) -> None:
    x, weight, bias = c.inputs
    channels = c.shapes[0][1]
    scale, shift = weight or c.floats(np.ones(channels)), bias or c.floats(np.zeros(channels))
    c.last("GroupNormalization", x, scale, shift, epsilon=c.attributes["eps"], num_groups=c.attributes["groups"])


# --- element-wise functions -------------------------------------------------------------------------------------------


def _clamp(c: Call) -> None:
    low, high = (None if v is None else c.floats(v) for v in (c.attributes["low"], c.attributes["high"]))
    c.last("Clip", c.inputs[0], low, high)


def _prelu(c: Call) -> None:
    """ONNX broadcasts the slopes from the last dimension, torch along dimension 1."""
    x, slopes = c.inputs
    (count,) = c.shapes[1]
    if count > 1 and len(c.shapes[0]) > 2:
        slopes = c.before("Reshape", slopes, c.ints(count, *[1] * (len(c.shapes[0]) - 2)))
    c.last("PRelu", x, slopes)


def _silu(c: Call) -> None:
    c.last("Mul", c.inputs[0], c.before("Sigmoid", c.inputs[0]))


def _hardswish(c: Call) -> None:
    c.last("Mul", c.inputs[0], c.before("HardSigmoid", c.inputs[0], alpha=1 / 6, beta=0.5))


def _softplus(c: Call) -> None:
    beta, threshold, x = c.attributes["beta"], c.attributes["threshold"], c.inputs[0]
    scaled = x if beta == 1 else c.before("Mul", x, c.floats(beta))
    if beta == 1 and threshold >= 16:  # there log(1 + exp(x)) is x in float32
        c.last("Softplus", scaled)
        return
    soft = c.before("Div", c.before("Softplus", scaled), c.floats(beta))
    c.last("Where", c.before("Greater", scaled, c.floats(threshold)), x, soft)


def _scalar(op: str) -> Row:
    return lambda c: c.last(op, c.inputs[0], c.floats(c.attributes["value"]))


# --- moves ------------------------------------------------------------------------------------------------------------


def _reshape(c: Call) -> None:
    c.last("Reshape", c.inputs[0], c.ints(-1, *c.shape[1:]))


def _permute(c: Call) -> None:
    rank = len(c.shape)
    c.last("Transpose", perm=[d % rank for d in c.attributes["dims"]])


def _slice(c: Call) -> None:
    a = c.attributes
    start, stop = 0 if a["start"] is None else a["start"], _ALL if a["stop"] is None else a["stop"]
    c.last("Slice", c.inputs[0], c.ints(start), c.ints(stop), c.ints(a["dim"]), c.ints(a["step"]))


def _pad(c: Call) -> None:
    mode = {"replicate": "edge", "circular": "wrap"}.get(c.attributes["mode"], c.attributes["mode"])
    _padded(c, mode, c.graph.constant(c.zero, c.zero.dtype) if mode == "constant" else None)


def _pad_value(c: Call) -> None:
    _padded(c, "constant", c.floats(c.attributes["value"]))


def _padded(c: Call, mode: str, value: str | None) -> None:
    """torch names pairs from the last dimension on, ONNX all beginnings and then all ends.

    Dimensions that are not padded are named too: ONNX Runtime's layout optimizer mistakes the axes of a Pad that names
    them (it then fails at run time; measured with 1.24.4 and 1.31.1).
    """
    padding = c.attributes["padding"]
    pairs = [(0, 0)] * (len(c.shape) - len(padding) // 2)
    pairs += list(zip(padding[-2::-2], padding[-1::-2], strict=True))
    amounts = c.ints(*[begin for begin, _ in pairs], *[end for _, end in pairs])
    c.last("Pad", c.inputs[0], amounts, value, mode=mode)


def _upsample_nearest(c: Call) -> None:
    """Whole factors are a Resize; for any other the source of each row and column is asked of torch."""
    x, (height, width), after = c.inputs[0], c.shapes[0][2:], c.shape[2:]
    numbers = torch.arange(height).reshape(1, 1, -1, 1).expand(-1, -1, -1, width).float()
    rows = ops.upsample_nearest(numbers, **c.attributes)[0, 0, :, 0].int().tolist()
    numbers = torch.arange(width).reshape(1, 1, 1, -1).expand(-1, -1, height, -1).float()
    columns = ops.upsample_nearest(numbers, **c.attributes)[0, 0, 0].int().tolist()
    factors = (after[0] // height, after[1] // width)
    if (rows, columns) == tuple([i // f for i in range(n * f)] for n, f in zip((height, width), factors, strict=True)):
        coordinates = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        c.last("Resize", x, None, c.floats([1, 1, *factors]), mode="nearest", **coordinates)
    else:
        c.last("Gather", c.before("Gather", x, c.ints(*rows), axis=2), c.ints(*columns), axis=3)


def _upsample_bilinear(c: Call) -> None:
    """A Resize by factors: by the given ones, as torch takes them, else by the sizes' ratios.

    Not to sizes: ONNX Runtime's layout optimizer loses them when it moves a Transpose through the Resize (the file does
    not load then; measured with 1.31.1).
    """
    before, after = c.shapes[0][2:], c.shape[2:]
    wanted = c.attributes["scale"] or [n / m for m, n in zip(before, after, strict=True)]
    factors = [_factor_to(n, m, scale) for n, m, scale in zip(after, before, wanted, strict=True)]
    coordinates = "align_corners" if c.attributes["align_corners"] else "half_pixel"
    scales = c.floats([1, 1, *factors])
    c.last("Resize", c.inputs[0], None, scales, mode="linear", coordinate_transformation_mode=coordinates)


def _factor_to(after: int, before: int, wanted: float) -> np.float32:
    """The float32 nearest to a factor that gives the output size `after`, rounded down from the product.

    ONNX's shape inference rounds the exact product down, ONNX Runtime the product in float32: both must agree.
    """
    nearest = np.float32(wanted)
    candidates = (nearest, np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(0)))
    return next(f for f in candidates if int(np.float32(before) * f) == int(before * float(f)) == after)


def _pixel_shuffle(c: Call) -> None:
    _, channels, height, width = c.shape
    r = c.attributes["factor"]
    split = c.before("Reshape", c.inputs[0], c.ints(-1, channels, r, r, height // r, width // r))
    moved = c.before("Transpose", split, perm=[0, 1, 4, 2, 5, 3])
    c.last("Reshape", moved, c.ints(-1, channels, height, width))


def _pixel_unshuffle(c: Call) -> None:
    _, channels, height, width = c.shape
    r = c.attributes["factor"]
    split = c.before("Reshape", c.inputs[0], c.ints(-1, channels // r**2, height, r, width, r))
    moved = c.before("Transpose", split, perm=[0, 1, 3, 5, 2, 4])
    c.last("Reshape", moved, c.ints(-1, channels, height, width))


ROWS: dict[str, Row] = {
    "conv1d": _conv,
    "conv2d": _conv,
    "conv_transpose2d": _conv_transpose2d,
    "linear": _linear,
    "matmul": _same("MatMul"),
    "embedding": _embedding,
    "add": _same("Add"),
    "sub": _same("Sub"),
    "mul": _same("Mul"),
    "div": _same("Div"),
    "cat": _cat,
    "max_pool2d": max_pool2d,
    "avg_pool2d": avg_pool2d,
    "adaptive_avg_pool2d": adaptive_avg_pool2d,
    "adaptive_max_pool2d": adaptive_max_pool2d,
    "mean": reduction("ReduceMean"),
    "amax": reduction("ReduceMax"),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "softmax": lambda c: c.last("Softmax", axis=c.attributes["dim"]),
    "relu": _same("Relu"),
    "clamp": _clamp,
    "leaky_relu": lambda c: c.last("LeakyRelu", alpha=c.attributes["slope"]),
    "prelu": _prelu,
    "elu": lambda c: c.last("Elu", alpha=c.attributes["alpha"]),
    "sigmoid": _same("Sigmoid"),
    "tanh": _same("Tanh"),
    "hardsigmoid": _same("HardSigmoid", alpha=1 / 6, beta=0.5),
    "hardswish": _hardswish,
    "silu": _silu,
    "gelu": lambda c: c.last("Gelu", approximate=c.attributes["approximate"]),
    "softplus": _softplus,
    "mish": _same("Mish"),
    "mul_scalar": _scalar("Mul"),
    "add_scalar": _scalar("Add"),
    "flatten": _reshape,
    "reshape": _reshape,
    "permute": _permute,
    "slice_": _slice,
    "pad": _pad,
    "pad_value": _pad_value,
    "upsample_nearest": _upsample_nearest,
    "upsample_bilinear": _upsample_bilinear,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
}
"""How each canonical op is written, by its name."""
