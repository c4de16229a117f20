"""Tensors seen as rows: one row for each scale. What every clipping search starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibquant.errors import QuantizationError
from calibquant.numerics.affine import fake_quantize
from calibquant.numerics.grid import Granularity, Grid, PerChannel, PerTensor
from calibquant.numerics.histogram import Histogram

_ALIGN = 64
_CPU_BLOCK = 30720  # below 32768, where torch begins to split an operation among threads; a multiple of _ALIGN
_DEVICE_BLOCK = 1 << 24


@dataclass(frozen=True)
class Rows:
    """Values in rows, and the error of quantizing a row with given scale and zero point.

    Args:
        values: float32 (R, n padded with zeros to a multiple of 64); zero is always representable, so it costs nothing.
        size: n, the values in a row.
        weights: float32 (R, padded n), summing to 1 in each row, or None: every value weighs 1 / n.
    """

    values: Tensor
    size: int
    weights: Tensor | None = None

    @property
    def block(self) -> int:
        """How many float32 one temporary holds: in the CPU's cache, or large enough to fill a device."""
        return _CPU_BLOCK if self.values.device.type == "cpu" else _DEVICE_BLOCK

    def errors(self, row: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, p: float) -> Tensor:
        """Mean |x - fake_quantize(x)|^p of pairs of a row and a quantizer, float64 (P,).

        Elementwise in float32, summed in float64. On the CPU a pair's result does not depend on its neighbours or on
        the number of threads: torch's vectorized pow and its scalar tail differ in the last bit, so blocks are aligned,
        and none is large enough to be split among threads.

        Args:
            row: int64 (P,).
            scale, zero_point: float32 and int32 (P,).
        """
        sums = torch.zeros(len(row), dtype=torch.float64, device=self.values.device)
        many = max(1, self.block // self.values.shape[1])
        for start in range(0, len(row), many):
            part = slice(start, start + many)
            for column in range(0, self.values.shape[1], self.block):
                x = self.values[:, column : column + self.block].index_select(0, row[part])
                error = fake_quantize(x, scale[part], zero_point[part], grid, PerChannel(0))
                error = error.sub_(x).abs_().pow_(p)
                if self.weights is not None:
                    error *= self.weights[:, column : column + self.block].index_select(0, row[part])
                sums[part] += error.sum(1, dtype=torch.float64)
        return sums / self.size if self.weights is None else sums


def as_matrix(x: Tensor, granularity: Granularity) -> Tensor:
    """`x` as float32 (1, numel) per tensor or (C, numel / C) per channel, checked to be finite and not empty.

    Raises:
        QuantizationError: `x` is empty or holds NaN or infinity.
    """
    if not x.numel():
        raise QuantizationError("clipping range", "the tensor is empty", "quantize a tensor with at least one value")
    x = x.detach().float()
    if x.device.type == "mps":  # it has no float64
        x = x.cpu()
    if not torch.stack(x.aminmax()).isfinite().all():
        raise QuantizationError("clipping range", "the tensor holds NaN or infinity", "check the weights file")
    if isinstance(granularity, PerTensor):
        return x.reshape(1, -1)
    return x.movedim(granularity.axis, 0).reshape(x.shape[granularity.axis], -1)


def rows_of(histogram: Histogram) -> Rows:
    """One row of a histogram's occupied bins: their centers, cut to the extremes, weighted by their counts.

    Raises:
        QuantizationError: the histogram is empty.
    """
    if not histogram.total:
        raise QuantizationError("clipping range", "the histogram is empty", "add at least one value")
    used = histogram.counts > 0
    centers = histogram.centers[used].clamp(histogram.minimum, histogram.maximum).float()
    shares = (histogram.counts[used].double() / histogram.total).float()
    return Rows(padded(centers[None]), len(centers), padded(shares[None]))


def as_range(low: Tensor, high: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """A range of rows (R,) shaped as the granularity wants it: () or (C,)."""
    return (low[0], high[0]) if isinstance(granularity, PerTensor) else (low, high)


def padded(matrix: Tensor) -> Tensor:
    """`matrix` (R, n) with zeros up to a multiple of 64 columns, contiguous."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % _ALIGN)).contiguous()
