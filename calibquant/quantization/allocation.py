"""Per-channel bits: how many each channel of a weight or an activation gets, and its codes and ranges at these bits.

A weight's errors are measured on its values, an activation's on a histogram of each channel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from calibquant.errors import unknown
from calibquant.graph.limits import UNLIMITED, Limits
from calibquant.numerics.affine import QTensor, affine_from_range, fake_quantize, quantize
from calibquant.numerics.allocation import MOST, banner, optimal
from calibquant.numerics.grid import Grid, PerChannel, PerTensor, widest
from calibquant.numerics.histogram import Histogram
from calibquant.quantization.observers import weight_range
from calibquant.quantization.plan import TensorPlan, only_symmetric
from calibquant.recipe import Allocation, WeightRecipe


def allocate_weight(weight: Tensor, recipe: WeightRecipe, plan: TensorPlan, placement: str) -> QTensor:
    """A weight rounded to nearest, each channel on its own grid, as `plan.allocation` shares `plan.grid.bits`.

    `banner` takes the standard deviation of a channel's values as its spread, as the released code does. `optimal`
    takes the squared rounding error of each channel at each number of bits, with the recipe's observer.

    Args:
        weight: float32, finite.
        recipe: the observer.
        plan: per channel; its grid's bits are the average.
        placement: under "integer" channels of 8 bits are symmetric, for integer kernels take 8 bits only so.
    """
    axis = _axis(plan)
    rows = _rows(weight, axis)
    if plan.allocation == "banner":
        bits = banner(rows.std(axis=1), plan.grid.bits)
    elif plan.allocation != "optimal":
        raise unknown("quant.weights.allocation", plan.allocation, get_args(Allocation))
    else:
        errors = np.empty((len(rows), MOST + 1))
        for b in range(MOST + 1):
            rounded = quantize_channels(weight, recipe, plan, placement, np.full(len(rows), b)).dequantize()
            errors[:, b] = np.square(_rows(rounded, axis) - rows).sum(axis=1)
        bits = optimal(errors, len(rows) * plan.grid.bits)
    return quantize_channels(weight, recipe, plan, placement, bits)


def quantize_channels(
    weight: Tensor, recipe: WeightRecipe, plan: TensorPlan, placement: str, bits: np.ndarray
) -> QTensor:
    """A weight rounded to nearest with given bits for each channel.

    A range is searched for the channels of equal bits together. A channel of 0 bits has codes equal to its zero point
    and scale 1.

    Args:
        bits: int (C,), 0 to 8.

    Returns:
        codes on the grid of the widest channel.
    """
    axis, channels = _axis(plan), torch.from_numpy(bits).to(weight.device)
    grid = widest(channels, plan.grid.signed)
    codes = torch.zeros(weight.shape, dtype=grid.dtype, device=weight.device)
    scale = torch.ones(len(bits), device=weight.device)
    zero_point = torch.zeros(len(bits), dtype=torch.int32, device=weight.device)
    for b in sorted({int(b) for b in bits} - {0}):
        index = torch.nonzero(channels == b).flatten()
        part, own = weight.index_select(axis, index), Grid(b, plan.grid.signed)
        symmetric = plan.symmetric or only_symmetric(placement, b)
        ends = weight_range(part, recipe, replace(plan, grid=own, symmetric=symmetric))
        scale[index], zero_point[index] = (v.to(weight.device) for v in affine_from_range(*ends, own, symmetric))
        rounded = quantize(part, scale[index], zero_point[index], own, plan.granularity)
        codes.index_copy_(axis, index, rounded.to(grid.dtype))
    return QTensor(codes, scale, zero_point, grid, plan.granularity, channels.to(torch.int32))


def spread_of(histogram: Histogram) -> float:
    """Standard deviation of a histogram's values, each taken at its bin's center."""
    weights = histogram.counts.double() / max(histogram.total, 1)
    mean = (weights * histogram.centers).sum()
    return float((weights * (histogram.centers - mean).square()).sum().sqrt())


def error_of(histogram: Histogram, scale: Tensor, zero_point: Tensor, grid: Grid, limits: Limits = UNLIMITED) -> float:
    """Summed squared rounding error of a histogram's values, each taken at its bin's center and then limited."""
    centers = histogram.centers.clamp(*limits)
    rounded = fake_quantize(centers.float(), scale, zero_point, grid, PerTensor()).double()
    return float((histogram.counts * (rounded - centers).square()).sum())


def _rows(values: Tensor, axis: int) -> np.ndarray:
    """A row for each channel, float64 on the CPU: (C, ...)."""
    moved = values.detach().cpu().movedim(axis, 0)
    return moved.reshape(len(moved), -1).double().numpy()


def _axis(plan: TensorPlan) -> int:
    assert isinstance(plan.granularity, PerChannel)
    return plan.granularity.axis
