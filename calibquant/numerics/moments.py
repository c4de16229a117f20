"""Means of functions of normally distributed values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

REACH, POINTS = 10.0, 8001  # of the numerical integration: standard deviations to either side, and grid points


def clipped_normal_mean(mean: Tensor, std: Tensor, low: float, high: float) -> Tensor:
    """E[clamp(X, low, high)] of X ~ N(mean, std^2).

    low * P(X < low) + high * P(X > high) + mean * P(low <= X <= high) + std * (phi(a) - phi(b)), with a and b the
    limits in standard deviations from the mean and phi the normal density. Source: Nagel, van Baalen, Blankevoort and
    Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, appendix C.

    Args:
        mean, std: float, the same shape; a std of 0 is a constant.
        low, high: limits, low <= high; infinite where there is none.

    Returns:
        float64, the shape of `mean`.

    Example:
        >>> clipped_normal_mean(torch.zeros(1), torch.ones(1), 0.0, math.inf)  # 1 / sqrt(2 pi)
        tensor([0.3989], dtype=torch.float64)
    """
    mean, std = mean.double(), std.double()
    spread = std.clamp(min=torch.finfo(torch.float64).tiny)
    below, above = ((limit - mean) / spread for limit in (low, high))
    inside = _cumulative(above) - _cumulative(below)
    value = mean * inside + std * (_density(below) - _density(above))
    if math.isfinite(low):
        value = value + low * _cumulative(below)
    if math.isfinite(high):
        value = value + high * _cumulative(-above)
    return torch.where(std > 0, value, mean.clamp(low, high))


def function_of_normal_mean(function: Callable[[Tensor], Tensor], mean: Tensor, std: Tensor) -> Tensor:
    """E[f(X)] for each channel's X ~ N(mean, std^2), by the trapezoidal rule over ten standard deviations a side.

    Args:
        function: element-wise, from (P, C) to (P, C), float64.
        mean, std: float, (C,).

    Returns:
        float64, (C,).
    """
    steps = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
    density = _density(steps)
    density = density / density.sum()
    values = function(mean.double() + std.double() * steps[:, None])
    return density @ values


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _cumulative(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)
