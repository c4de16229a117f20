"""Affine quantization as pure functions: value = (code - zero_point) * scale, in float32.

Scales and zero points have shape () for per-tensor and (C,) for per-channel granularity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibquant.numerics.grid import Granularity, Grid, PerChannel, PerTensor

MIN_SCALE = 1e-8  # the reference code's guard against constant tensors


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor: integer codes and what they mean.

    Args:
        codes: integers on `grid`, dtype `grid.dtype`, the shape of the float tensor.
        scale: float32, () or (C,).
        zero_point: int32, () or (C,), on `grid`.
        grid: the codes' grid; with `channel_bits` that of the widest channel.
        granularity: what a scale spans.
        channel_bits: int32 (C,), 0 to 8, where channels differ in bits: codes and zero point of a channel are on the
            grid of its own bits. With 0 bits all codes equal the zero point, and the scale is 1.
        levels: int8 (n,), or (C, n) for each channel its own: the codes are among these, ascending; the grid is that of
            signed 8 bits then and zero points are 0. None: every code of the grid.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid
    granularity: Granularity
    channel_bits: Tensor | None = None
    levels: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The simulated value, exactly (codes - zero_point) * scale in float32."""
        return dequantize(self.codes, self.scale, self.zero_point, self.granularity)


def affine_from_range(low: Tensor, high: Tensor, grid: Grid, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a clipping range.

    Asymmetric: scale = (max(high, 0) - min(low, 0)) / (2^b - 1), zero_point = qmin - round(min(low, 0) / scale).
    Symmetric: scale = max|range| / ((2^b - 1) / 2), zero_point = 0 on a signed grid and 2^(b-1) on an unsigned one.
    (BRECQ/QDrop's form; zero is always representable.)

    Args:
        low, high: float, () or (C,), low <= high.

    Returns:
        scale float32 >= 1e-8 and zero_point int32, shaped like `low`.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-low, high) / (grid.steps / 2)).clamp(min=MIN_SCALE)
        return scale, torch.full_like(scale, grid.qmin + (1 << (grid.bits - 1)), dtype=torch.int32)
    scale = ((high - low) / grid.steps).clamp(min=MIN_SCALE)
    zero_point = (grid.qmin - torch.round(low / scale)).clamp(grid.qmin, grid.qmax)
    return scale, zero_point.to(torch.int32)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, granularity: Granularity) -> Tensor:
    """Codes of `x`: clamp(round(x / scale) + zero_point), ties to even as ONNX QuantizeLinear.

    Returns:
        integers of dtype `grid.dtype`, the shape of `x`.
    """
    scale, zero_point = aligned(scale, x, granularity), aligned(zero_point, x, granularity)
    return (torch.round(x / scale) + zero_point).clamp(grid.qmin, grid.qmax).to(grid.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, granularity: Granularity) -> Tensor:
    """(codes - zero_point) * scale in the type of `scale`, float32 or float64; the shape of `codes`."""
    return (codes.to(scale.dtype) - aligned(zero_point, codes, granularity)) * aligned(scale, codes, granularity)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    granularity: Granularity,
    channel_bits: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """`dequantize(quantize(x))` without leaving float32; equal to it bit for bit.

    With `channel_bits`, int32 (C,), the codes of a channel are limited to its own bits. With a `table`, uint8 (256,),
    unsigned codes of 8 bits are replaced by what it gives them: the nearest of few levels.
    """
    scale, zero_point = aligned(scale, x, granularity), aligned(zero_point, x, granularity)
    codes = torch.round(x / scale).add_(zero_point)
    if channel_bits is None:
        codes.clamp_(grid.qmin, grid.qmax)
    else:
        codes.clamp_(*(aligned(end, x, granularity) for end in code_limits(channel_bits, grid.signed)))
    if table is not None:
        codes = table.to(codes.dtype)[codes.long()]
    return codes.sub_(zero_point).mul_(scale)


def code_limits(channel_bits: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Lowest and highest code of channels with so many bits, int32 (C,); both are 0 for a channel of 0 bits.

    Example:
        >>> [end.tolist() for end in code_limits(torch.tensor([0, 1, 4]), signed=True)]
        [[0, -1, -8], [0, 0, 7]]
    """
    levels = 2 ** channel_bits.to(torch.int32)
    low = -(levels // 2) if signed else torch.zeros_like(levels)
    return low, low + levels - 1


def quantize_tensor(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    granularity: Granularity = PerTensor(),  # noqa: B008
) -> QTensor:
    """Round `x` to nearest on an affine grid and keep what the codes mean."""
    return QTensor(quantize(x, scale, zero_point, grid, granularity), scale, zero_point, grid, granularity)


def aligned(parameter: Tensor, x: Tensor, granularity: Granularity) -> Tensor:
    """A (C,) parameter shaped so that it broadcasts along its channel axis of `x`."""
    if isinstance(granularity, PerTensor):
        return parameter
    shape = [1] * x.dim()
    shape[granularity.axis] = -1
    return parameter.reshape(shape)


__all__ = [
    "MIN_SCALE", "PerChannel", "PerTensor", "QTensor", "affine_from_range", "code_limits", "dequantize",
    "fake_quantize", "quantize", "quantize_tensor",
]  # fmt: skip
