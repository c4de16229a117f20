"""ACIQ: the clipping range of least expected error, from the parameters of a density instead of a search.

Source: Banner, Nahshan and Soudry, "Post training 4-bit quantization of convolutional networks for rapid-deployment",
NeurIPS 2019, section 3; what its released code does for values that a ReLU limits. The clipping values are solved from
the paper's formulas, not read from a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from scipy.special import lambertw, ndtr
from torch import Tensor

from calibquant.errors import QuantizationError
from calibquant.numerics.affine import affine_from_range
from calibquant.numerics.grid import Grid
from calibquant.numerics.histogram import Histogram
from calibquant.numerics.rows import rows_of

Density = Literal["laplace", "gauss"]
_TINY = 1e-300  # in place of a scale of zero: all values are equal


def clipping_error(alpha: float, scale: float, density: Density) -> float:
    """E (x - clamp(x, mean - alpha, mean + alpha))^2: what clipping costs, in the square of the values' unit.

    Laplace: 2 b^2 exp(-alpha / b). Gauss: (s^2 + alpha^2) erfc(alpha / (s sqrt 2)) - sqrt(2 / pi) alpha s
    exp(-alpha^2 / 2 s^2).

    Args:
        alpha: half the width of the clipping range, >= 0.
        scale: Laplace's b = E|x - mean|, or Gauss's standard deviation; > 0.
    """
    t = alpha / scale
    if density == "laplace":
        return scale**2 * 2 * math.exp(-t)
    bell = math.sqrt(2 / math.pi) * math.exp(-t * t / 2)
    return scale**2 * ((1 + t * t) * math.erfc(t / math.sqrt(2)) - t * bell)


def rounding_error(alpha: float, bits: int) -> float:
    """alpha^2 / (3 * 4^bits): the variance of noise that is uniform over a step of 2 alpha / 2^bits."""
    return alpha**2 / (3 * 4.0**bits)


def expected_error(alpha: float, scale: float, bits: int, density: Density, one_sided: bool = False) -> float:
    """Expected squared error of clipping and rounding, in the square of the values' unit.

    One-sided: a ReLU follows, the values' mean is zero, and the range is [0, alpha]. Half of the values become zeros,
    which cost nothing; the others have steps of alpha / 2^bits, as two-sided values have at one bit more. So the error
    is half of the two-sided one at bits + 1.

    Args:
        alpha: half the width of the range; its whole width when one-sided.
        scale: of the density before the ReLU, see `clipping_error`.
        bits: of the codes, >= 0.
    """
    if one_sided:
        return expected_error(alpha, scale, bits + 1, density) / 2
    return clipping_error(alpha, scale, density) + rounding_error(alpha, bits)


@cache
def optimal_ratio(bits: int, density: Density, one_sided: bool = False) -> float:
    """alpha / scale of least `expected_error`; the error is convex in alpha, so its derivative has one root.

    Laplace: t exp(t) = 3 * 4^bits, which Lambert's W solves. Gauss, by Brent's method: t erfc(t / sqrt 2)
    + t / (3 * 4^bits) = sqrt(2 / pi) exp(-t^2 / 2). One-sided: the ratio of one bit more.

    Example:
        >>> round(optimal_ratio(4, "laplace"), 3), round(optimal_ratio(4, "gauss"), 3)
        (5.029, 2.559)
    """
    if one_sided:
        return optimal_ratio(bits + 1, density)
    if density == "laplace":
        return float(lambertw(3 * 4.0**bits).real)

    def slope(t: float) -> float:
        bell = math.sqrt(2 / math.pi) * math.exp(-t * t / 2)
        return t * math.erfc(t / math.sqrt(2)) + rounding_error(1, bits) * t - bell

    return float(brentq(slope, 0, 40))


@dataclass(frozen=True)
class DensityFit:
    """A Laplace and a Gauss density that are fitted to the same values.

    Args:
        mean: of both, in the values' unit.
        b: Laplace's scale, mean |x - mean|.
        sigma: Gauss's standard deviation.
        laplace_distance, gauss_distance: Kolmogorov and Smirnov's distance to the values, the largest difference of
            the cumulative distributions, 0 … 1.
    """

    mean: float
    b: float
    sigma: float
    laplace_distance: float
    gauss_distance: float

    @property
    def better(self) -> Density:
        """The density that is nearer to the values' bulk; Laplace on a tie."""
        return "laplace" if self.laplace_distance <= self.gauss_distance else "gauss"

    def scale(self, density: Density) -> float:
        """b or sigma."""
        return self.b if density == "laplace" else self.sigma


def fit_densities(histogram: Histogram, mirrored: bool = False) -> DensityFit:
    """Fit both densities by their moments, and tell how well they fit.

    A histogram's values count as its bins' centers, cut to the extremes, so that mean, b and sigma are off by at most
    half a bin. Distances are taken at the bins' borders.

    Args:
        histogram: of the values.
        mirrored: values of one sign stand for themselves and their mirror images about zero: the mean is zero, and b
            and sigma are the mean and the root mean square of |x|.

    Raises:
        QuantizationError: the histogram is empty.
    """
    total = histogram.total
    if not total:
        raise QuantizationError("density", "the histogram is empty", "add at least one value")
    shares = histogram.counts.numpy() / total
    ends = histogram.minimum, histogram.maximum
    values, borders = (np.clip(v.numpy(), *ends) for v in (histogram.centers, histogram.edges))
    mean = 0.0 if mirrored else float(shares @ values)
    b, sigma = float(shares @ np.abs(values - mean)), math.sqrt(shares @ (values - mean) ** 2)
    reached = np.concatenate([[0.0], np.cumsum(shares)])
    distances = []
    for below in (_laplace_below((borders - mean) / max(b, _TINY)), ndtr((borders - mean) / max(sigma, _TINY))):
        if mirrored:  # of values >= 0 the density's upper half, else its lower half
            below = 2 * below - float(histogram.maximum > 0)
        distances.append(float(np.abs(reached - below).max()))
    return DensityFit(mean, b, sigma, *distances)


def aciq_range_of(
    histogram: Histogram,
    grid: Grid,
    density: Density | Literal["auto"] = "auto",
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[Tensor, Tensor]:
    """ACIQ's clipping range, with alpha = scale * `optimal_ratio`.

    - Values that a function behind them limits to zero from below (ReLU): [0, max(mean, 0) + alpha], one-sided.
    - Values of one sign without such a function (a sum of two ReLUs' outputs): [0, alpha] or [-alpha, 0], one-sided,
      with densities fitted to the values and their mirror images. A density about the values' mean would have mass
      where no value can be. With mirror images the mean is zero, and a two-sided quantizer of one bit more would spend
      half of its codes on either half, so that the formula holds as it does behind a ReLU.
    - Others: [mean - alpha, mean + alpha].

    Each end is cut to what comes out behind the limits: to the extremes of the values seen, limited. (The released
    code does so at the lower end of two-sided values only. A range beyond all values rounds coarser and clips nothing.)

    Args:
        histogram: of the values before the limiting function.
        grid: the codes.
        density: which fit is used. "auto" takes the one whose range has the smaller squared error on the values seen,
            limited and rounded to the grid; Laplace on a tie. (The better fit by Kolmogorov and Smirnov's distance may
            be the worse choice: it hardly depends on the tail that is clipped.)
        limits: least and largest value that a function behind these values lets through: (0, 6) for a ReLU6.

    Returns:
        low and high, float32 ().

    Raises:
        QuantizationError: the histogram is empty.
    """
    rectified = limits[0] == 0
    one_signed = not rectified and (histogram.minimum >= 0 or histogram.maximum <= 0)
    fit = fit_densities(histogram, mirrored=one_signed)
    least, most = np.clip([histogram.minimum, histogram.maximum], *limits)
    ranges = []
    for name in (density,) if density != "auto" else get_args(Density):
        alpha = fit.scale(name) * optimal_ratio(grid.bits, name, rectified or one_signed)
        ends = (0.0, max(fit.mean, 0.0) + alpha) if rectified else (fit.mean - alpha, fit.mean + alpha)
        ranges.append(np.clip(ends, min(least, 0.0), max(most, 0.0)))  # leaves one side of one-signed values
    lows, highs = torch.tensor(np.transpose(ranges), dtype=torch.float32)
    best = _least_error(histogram, grid, limits, lows, highs) if len(ranges) > 1 else 0
    return lows[best], highs[best]


def _least_error(histogram: Histogram, grid: Grid, limits: tuple[float, float], lows: Tensor, highs: Tensor) -> int:
    """Which of the ranges (R,) rounds the limited values with the least squared error; the first on a tie."""
    rows = rows_of(histogram)
    rows = replace(rows, values=rows.values.clamp(*limits))
    scale, zero_point = affine_from_range(lows, highs, grid, symmetric=False)
    row = torch.zeros(len(lows), dtype=torch.int64)
    return int(np.argmin(rows.errors(row, scale, zero_point, grid, p=2).numpy()))


def _laplace_below(t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The Laplace density's cumulative distribution at t = (x - mean) / b."""
    return 0.5 - 0.5 * np.sign(t) * np.expm1(-np.abs(t))
