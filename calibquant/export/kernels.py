"""The arithmetic of ONNX Runtime's integer kernels, in NumPy, to the bit.

Measured on ONNX Runtime 1.25.0 and 1.31.1 (x86-64); docs, "The integer executor", has the formulas. Integer sums are
exact here: they are taken in a float type in which every partial sum is a whole number that it represents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from calibquant.export.program import ActivationGrid
from calibquant.numerics.levels import nearest_levels
from calibquant.numerics.reach import INT16_MAX

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]  # integers
Centered = npt.NDArray[np.int16]  # codes minus their zero point

EXACT_FLOAT32 = 2**24  # every integer up to here is a float32
INT32_SPAN = 2.0**31


# --- between floats and codes -----------------------------------------------------------------------------------------


def quantize(values: Floats, grid: ActivationGrid) -> Codes:
    """QuantizeLinear, then the limits: clip(rint(value / scale) + zero_point), ties to even.

    Args:
        values: float32, any shape.

    Returns:
        uint8, the same shape.
    """
    return saturate(np.rint(values / grid.scale) + np.float32(grid.zero_point), grid)


def dequantize(codes: Codes, grid: ActivationGrid) -> Floats:
    """DequantizeLinear: (code - zero_point) * scale in float32."""
    return centered(codes, grid).astype(np.float32) * grid.scale


def centered(codes: Codes, grid: ActivationGrid) -> Centered:
    """code - zero_point: what integer kernels compute with."""
    return codes.astype(np.int16) - np.int16(grid.zero_point)


def saturate(values: npt.NDArray[Any], grid: ActivationGrid) -> Codes:
    """Whole numbers limited to uint8 and then to the limits of the codes, which lie within it."""
    return np.clip(values, grid.low, grid.high).astype(np.uint8)


def level_table(grid: ActivationGrid) -> Codes:
    """For each of the 256 codes the nearest of the grid's levels, halfway the lower one."""
    return nearest_levels(torch.tensor(grid.levels, dtype=torch.uint8)).numpy()


# --- products ---------------------------------------------------------------------------------------------------------


def convolve(
    x: Centered,
    weight: npt.NDArray[np.int8],
    bias: npt.NDArray[np.int32] | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Sums:
    """The accumulators of a convolution: exact integers.

    Padding is the input's zero point: 0 in centered codes.

    Args:
        x: (N, C, H, W).
        weight: centered, (O, C / groups, KH, KW).
        bias: (O,).

    Returns:
        (N, O, OH, OW).
    """
    exact = _exact_type(x, weight.reshape(len(weight), -1))
    kernels = weight.reshape(groups, len(weight) // groups, -1).astype(exact)
    padded = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    windows = _windows(padded, weight.shape[2:], stride, dilation)
    n, _, height, width = windows.shape[:4]
    sums = np.empty((n, len(weight), height, width))
    for image, view in zip(sums, windows, strict=True):  # one at a time: a column for each window takes memory
        columns = view.transpose(0, 3, 4, 1, 2).reshape(groups, -1, height * width)
        image[...] = (kernels @ columns.astype(exact)).reshape(image.shape)
    return sums if bias is None else sums + bias.reshape(-1, 1, 1)


def multiply_matrix(x: Centered, weight: npt.NDArray[np.int8], bias: npt.NDArray[np.int32] | None) -> Sums:
    """The accumulators of a linear layer: exact integers.

    Args:
        x: (..., C).
        weight: centered, (O, C).
        bias: (O,).

    Returns:
        (..., O).
    """
    exact = _exact_type(x, weight)
    sums = (x.astype(exact) @ weight.T.astype(exact)).astype(np.float64)
    return sums if bias is None else sums + bias


def lost_in_convolution(
    codes: Codes,
    weight: npt.NDArray[np.int8],
    zero: np.uint8,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Sums:
    """`lost_in_pairs` of a convolution, whose kernel pairs neighbouring channels of one position.

    Args:
        codes: (N, C, H, W).
        weight: centered, (O, C / groups, KH, KW).
        zero: code of the padding.

    Returns:
        (N, O, OH, OW).
    """
    padded = np.pad(codes, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2), constant_values=zero)
    windows = _windows(padded, weight.shape[2:], stride, dilation).transpose(0, 2, 3, 4, 5, 1)
    parts = np.split(windows, groups, axis=-1)
    rows = weight.transpose(0, 2, 3, 1).reshape(groups, len(weight) // groups, -1)
    lost = [lost_in_pairs(p.reshape(*p.shape[:3], -1), own) for p, own in zip(parts, rows, strict=True)]
    return np.concatenate(lost, axis=-1).transpose(0, 3, 1, 2)


def lost_in_pairs(codes: Codes, weight: npt.NDArray[np.int8]) -> Sums:
    """What saturation takes from sums of products where a kernel adds two neighbours in 16 bits (vpmaddubsw).

    Kernels multiply the codes themselves, and take off the zero point's share of the sum afterwards. Pairs that cannot
    leave int16 whatever the codes are lose nothing, and are passed over.

    Args:
        codes: (..., K).
        weight: centered, (O, K).

    Returns:
        the exact sum less the saturated one, (..., O).
    """
    odd = codes.shape[-1] % 2
    x = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, odd)]).astype(np.int32)
    w = np.pad(weight, ((0, 0), (0, odd))).astype(np.int32)
    left, right = w[:, ::2], w[:, 1::2]
    most = 255 * (left.clip(min=0) + right.clip(min=0)), 255 * (left.clip(max=0) + right.clip(max=0))
    suspect = (most[0] > INT16_MAX) | (most[1] < -INT16_MAX - 1)
    lost = np.zeros((*codes.shape[:-1], len(weight)))
    for pair in np.flatnonzero(suspect.any(axis=0)):
        rows = np.flatnonzero(suspect[:, pair])
        sums = x[..., 2 * pair, None] * left[rows, pair] + x[..., 2 * pair + 1, None] * right[rows, pair]
        lost[..., rows] += sums - sums.clip(-INT16_MAX - 1, INT16_MAX)
    return lost


def product_scale(source: np.float32, weight: Floats) -> Floats:
    """What an accumulator's unit stands for, per channel: float32(input scale * weight scale)."""
    return np.float32(source) * weight


def multipliers(source: np.float32, weight: Floats, output: np.float32) -> Floats:
    """What a requantization multiplies by: float32(float32(input scale * weight scale) / output scale)."""
    return product_scale(source, weight) / np.float32(output)


def requantize(sums: Sums, multiplier: Floats, grid: ActivationGrid) -> Codes:
    """clip(rint(float32(sum) * multiplier) + zero_point): one rounding to float32, one of the product, one to a code.

    Args:
        sums: integers.
        multiplier: broadcasts against them.
    """
    return saturate(np.rint(sums.astype(np.float32) * multiplier) + np.float32(grid.zero_point), grid)


def _exact_type(x: Centered, weight: npt.NDArray[np.int8]) -> type[np.float32] | type[np.float64]:
    """A float type that represents every partial sum of products of x with a row of the weight."""
    reach = int(np.abs(x).max(initial=0)) * int(np.abs(weight.astype(np.int64)).sum(axis=1).max(initial=0))
    return np.float32 if reach <= EXACT_FLOAT32 else np.float64


def _windows(
    x: npt.NDArray[Any], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> npt.NDArray[Any]:
    """Views (N, C, OH, OW, KH, KW) of (N, C, H, W)."""
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    every = np.lib.stride_tricks.sliding_window_view(x, span, (2, 3))
    return every[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


# --- two activations --------------------------------------------------------------------------------------------------


def add(a: Codes, b: Codes, grid_a: ActivationGrid, grid_b: ActivationGrid, grid: ActivationGrid) -> Codes:
    """QLinearAdd: rint(fma(a, ra, fma(b, rb, z - fma(ra, za, rb * zb)))) with ra = scale_a / scale, rb likewise.

    The kernel swaps its operands where the first is one value along the innermost axis of more than one.

    Args:
        a, b: codes that broadcast.
    """
    if _constant_inside(a.shape, b.shape):
        a, b, grid_a, grid_b = b, a, grid_b, grid_a
    ra, rb = grid_a.scale / grid.scale, grid_b.scale / grid.scale
    za, zb = np.float32(grid_a.zero_point), np.float32(grid_b.zero_point)
    fixed = np.float32(grid.zero_point) - fma(ra, za, rb * zb)
    every = np.arange(256, dtype=np.float32)  # there are only 256 * 256 pairs of codes
    return _table(fma(every[:, None], ra, fma(every, rb, fixed)), grid)[a, b]


def multiply(a: Codes, b: Codes, grid_a: ActivationGrid, grid_b: ActivationGrid, grid: ActivationGrid) -> Codes:
    """QLinearMul: rint(float32(ab * ratio) + zero_point) with ratio = float32(scale_a * scale_b) / scale."""
    every = np.arange(256, dtype=np.float32)
    products = (every[:, None] - np.float32(grid_a.zero_point)) * (every - np.float32(grid_b.zero_point))
    ratio = grid_a.scale * grid_b.scale / grid.scale
    return _table(products * ratio + np.float32(grid.zero_point), grid)[a, b]


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> Floats:
    """a * b + c of float32, rounded once.

    In float64 the product of two float32 is exact. The sum is rounded to odd, that is, to the neighbour with an odd
    last bit whenever it is not exact; rounding that to float32 is as rounding once, because float64 has more than two
    bits beyond float32 (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, IEEE Trans. Comp. 2008).
    """
    product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
    addend = np.asarray(c, np.float32).astype(np.float64)
    total = np.asarray(product + addend)
    second = total - product
    lost = (product - (total - second)) + (addend - second)  # Knuth's two-sum: total + lost is exact
    bits = total.view(np.int64)
    away = np.where((lost > 0) == (total > 0), 1, -1)  # the neighbour on the side of what was lost
    odd = np.where((lost != 0) & (bits % 2 == 0), bits + away, bits)
    return odd.view(np.float64).astype(np.float32)


def _table(values: Floats, grid: ActivationGrid) -> Codes:
    """Codes of rounded values; where int32 does not hold one the kernel's conversion gives the lowest int32."""
    rounded = np.rint(values)
    return saturate(np.where(np.abs(rounded) < INT32_SPAN, rounded, -INT32_SPAN), grid)


def _constant_inside(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether `a` has one value along the innermost axis on which the two do not both."""
    rank = max(len(a), len(b))
    sizes = zip((1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b), strict=True)
    inner = next(((n, m) for n, m in reversed(list(sizes)) if (n, m) != (1, 1)), (0, 0))
    return inner[0] == 1


# --- pools ------------------------------------------------------------------------------------------------------------


def average_pool(
    values: Floats,
    grid: ActivationGrid,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    size: Sequence[int],
    count_padding: bool,
) -> Codes:
    """QLinearAveragePool: rint(mean / scale + zero_point), the mean of dequantized values in float32.

    The values of a window are added one after another, rows first, and divided by their number. The zero point is added
    before rounding: ties go to even codes.

    Args:
        values: float32 (N, C, H, W).
        padding: at the beginnings; at the ends there is as much as `size` needs.
        size: (OH, OW).
        count_padding: divide by the whole kernel, not by the values of the image in it.
    """
    sides = list(zip(values.shape[2:], size, kernel, stride, padding, strict=True))
    ends = [(p, max(0, (n - 1) * s + k - p - m)) for m, n, k, s, p in sides]
    windows = _windows(np.pad(values, ((0, 0), (0, 0), *ends)), kernel, stride, (1, 1))
    windows = windows[:, :, : size[0], : size[1]]
    sums = np.zeros(windows.shape[:4], np.float32)
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            sums += windows[..., row, column]
    rows, columns = (np.arange(n) * s - p for _, n, _, s, p in sides)
    held = [
        np.minimum(starts + k, m) - np.maximum(starts, 0)
        for starts, (m, _, k, _, _) in zip((rows, columns), sides, strict=True)
    ]
    count = np.float32(math.prod(kernel)) if count_padding else np.outer(*held).astype(np.float32)
    return saturate(np.rint(sums / count / grid.scale + np.float32(grid.zero_point)), grid)


def mean(codes: Codes, grid: ActivationGrid, *, dims: Sequence[int], keepdim: bool) -> Floats:
    """The mean of values on a grid: float32(Σ (code - zero_point)) * `mean_factor`; the sum is exact."""
    sums = centered(codes, grid).sum(tuple(dims), np.int64, keepdims=keepdim)
    return sums.astype(np.float32) * mean_factor(grid, codes.shape, dims)


def mean_factor(grid: ActivationGrid, shape: Sequence[int], dims: Sequence[int]) -> np.float32:
    """What the sum of centered codes is multiplied by: float32(scale / their number)."""
    return np.float32(float(grid.scale) / math.prod(shape[d] for d in dims))
