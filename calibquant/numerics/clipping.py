"""Clipping ranges: min-max, percentile and KL divergence, and the mean-error searches of `mse_search` and `shrink`.

A range is (low, high), float32, () per tensor or (C,) per channel. `affine_from_range` extends it to contain zero.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from calibquant.errors import QuantizationError
from calibquant.numerics.grid import Granularity, Grid
from calibquant.numerics.histogram import Histogram, order_statistics
from calibquant.numerics.mse_search import Side, mse_range, mse_range_exhaustive, mse_range_of, side_of
from calibquant.numerics.rows import as_matrix, as_range
from calibquant.numerics.shrink import mse_shrink_range

_MISSING = 1e-4  # counts in a bin that a candidate distribution lacks: MXNet's smoothing constant


def minmax_range(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Smallest and largest value.

    Raises:
        QuantizationError: `x` is empty or not finite.
    """
    low, high = as_matrix(x, granularity).aminmax(dim=1)
    return as_range(low, high, granularity)


def percentile_range(x: Tensor, granularity: Granularity, percent: float) -> tuple[Tensor, Tensor]:
    """The middle `percent` % of the values: the quantiles (100 - percent) / 200 and (100 + percent) / 200.

    Between two order statistics the quantile is interpolated linearly (Hyndman and Fan's type 7, numpy's default).

    Args:
        x: float, any shape.
        percent: in (0, 100].

    Raises:
        QuantizationError: `x` is empty or not finite.
    """
    matrix = as_matrix(x, granularity)
    ends = np.quantile(matrix.cpu().numpy(), _tails(percent), axis=1)
    low, high = torch.from_numpy(ends).float().to(matrix.device)
    return as_range(low, high, granularity)


def percentile_range_of(histogram: Histogram, percent: float) -> tuple[Tensor, Tensor]:
    """`percentile_range` from a histogram, off by less than one bin, which is as far as order statistics are known.

    Between two order statistics the quantile is interpolated linearly, also over empty bins.

    Raises:
        QuantizationError: the histogram is empty.
    """
    at = np.array(_tails(percent)) * (_checked(histogram) - 1)
    rank = np.floor(at).astype(np.int64)
    below, above = order_statistics(histogram, rank), order_statistics(histogram, np.ceil(at).astype(np.int64))
    low, high = below + (at - rank) * (above - below)
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)


def kl_range_of(histogram: Histogram, grid: Grid) -> tuple[Tensor, Tensor]:
    """The range whose quantized distribution diverges least, in the Kullback-Leibler sense, from the clipped one.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017. For every threshold: the reference P is the histogram
    inside it, its outliers added to the edge bins; the candidate Q is the histogram inside it without outliers, merged
    into 2^bits levels, each level's mass spread evenly over those of its bins that P occupies; both are normalized,
    and the first threshold with the least sum P log(P / Q) wins. Levels are equally wide to within a bin.
    From MXNet's calibration: a bin of P that Q lacks gets 1e-4 of a count in Q, which keeps the divergence finite when
    outliers are far off, and two-sided values have a threshold symmetric about zero (here cut to the values' own
    range). One-sided values have the bin at zero set to its neighbour, as in
    NVIDIA's pytorch-quantization: a ReLU's exact zeros cost nothing, yet would dominate. A histogram with no more
    bins than the grid has levels keeps its full range.

    Returns:
        low and high, float32 ().

    Raises:
        QuantizationError: the histogram is empty.
    """
    _checked(histogram)
    low, high = histogram.minimum, histogram.maximum
    side = side_of(low, high)
    threshold = _kl_threshold(_dense(histogram, side), grid.steps + 1, side == "no") * 2.0**histogram.exponent
    low = 0.0 if side == "pos" else max(low, -threshold)
    high = 0.0 if side == "neg" else min(high, threshold)
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)


def _dense(histogram: Histogram, side: Side) -> np.ndarray:
    """Counts by distance from zero (one-sided), or from -B to B - 1 around zero (two-sided), float64."""
    counts, first = histogram.counts.numpy().astype(np.float64), histogram.first
    after = first + len(counts)
    if side == "no":
        half = max(-first, after)
        return np.pad(counts, (half + first, half - after))
    if side == "neg":  # values of exactly zero are in bin 0; the others in -1, -2 …
        counts, first = np.pad(counts, (0, max(-after, 0)))[:-first][::-1], 0
    dense = np.pad(counts, (first, 0))
    if len(dense) > 1:
        dense[0] = dense[1]
    return dense


def _kl_threshold(dense: np.ndarray, levels: int, two_sided: bool) -> int:
    """The best threshold, in bins; see `kl_range_of`."""
    reach = len(dense) // 2 if two_sided else len(dense)
    best, chosen = math.inf, reach
    for threshold in range(max(levels // 2, 1) if two_sided else levels, reach + 1):
        start, stop = (reach - threshold, reach + threshold) if two_sided else (0, threshold)
        inside = dense[start:stop]
        clipped = inside.copy()
        clipped[0] += dense[:start].sum()
        clipped[-1] += dense[stop:].sum()
        divergence = _divergence(clipped, inside, levels)
        if divergence < best:
            best, chosen = divergence, threshold
    return chosen


def _divergence(clipped: np.ndarray, inside: np.ndarray, levels: int) -> float:
    if not inside.any():
        return math.inf
    starts = -(-np.arange(levels) * len(inside) // levels)
    occupied = clipped > 0
    spread = np.add.reduceat(inside, starts) / np.maximum(np.add.reduceat(occupied.astype(np.float64), starts), 1)
    candidate = np.repeat(spread, np.diff(starts, append=len(inside)))[occupied]
    candidate = np.where(candidate > 0, candidate, _MISSING)
    reference = clipped[occupied] / clipped.sum()
    return float(np.sum(reference * np.log(reference / (candidate / candidate.sum()))))


def _tails(percent: float) -> list[float]:
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be in (0, 100], not {percent}")
    return [(100 - percent) / 200, (100 + percent) / 200]


def _checked(histogram: Histogram) -> int:
    if not histogram.total:
        raise QuantizationError("clipping range", "the histogram is empty", "add at least one value")
    return histogram.total


__all__ = [
    "Side", "kl_range_of", "minmax_range", "mse_range", "mse_range_exhaustive", "mse_range_of", "mse_shrink_range",
    "percentile_range", "percentile_range_of", "side_of",
]  # fmt: skip
