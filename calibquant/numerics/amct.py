"""The range finders of Huawei's AMCT: ARQ for weights, IFMR and HFMG for activations.

They are described by AMCT's documentation and its released code (amct_pytorch). Each docstring says where the result
differs because ranges are extended to zero, symmetric grids have our form, or values come from our histogram.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibquant.errors import QuantizationError
from calibquant.numerics.affine import affine_from_range
from calibquant.numerics.grid import Granularity, Grid
from calibquant.numerics.histogram import Histogram, order_statistics
from calibquant.numerics.rows import as_matrix, as_range, rows_of

# AMCT's defaults: the share of values kept at either end, search_range and search_step.
IFMR_PERCENTILE, IFMR_RANGE, IFMR_STEP = 0.999999, (0.7, 1.3), 0.01
HFMG_STEPS = 100_000  # a step drops at least this part of the values
HFMG_NARROWEST = 4  # the search ends at this part of the bins
_BLOCK = 1 << 16  # (position, border) pairs held at once, so that temporaries stay in cache


def arq_range(w: Tensor, grid: Grid, symmetric: bool, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """ARQ: symmetric min-max of each filter that uses the code -2^(b-1) only where it is needed.

    s = absmax / 2^(b-1) where the smallest value has the larger magnitude, else absmax / (2^(b-1) - 1). The range
    returned is the one that `affine_from_range` gives this scale and a zero point in the middle of the grid, up to the
    last bit of the scale: s * [-(2^b - 1) / 2, (2^b - 1) / 2] for a symmetric quantizer and s * [-2^(b-1), 2^(b-1) - 1]
    otherwise. So both have the same levels.

    Args:
        w: float, any shape.

    Returns:
        low and high, float32, () or (C,).

    Raises:
        QuantizationError: `w` is empty or not finite.
    """
    low, high = (v.double() for v in as_matrix(w, granularity).aminmax(dim=1))
    half = 1 << (grid.bits - 1)
    scale = torch.where(-low > high, -low / half, high / max(half - 1, 1))
    ends = (-grid.steps / 2, grid.steps / 2) if symmetric else (-half, half - 1)
    return as_range((scale * ends[0]).float(), (scale * ends[1]).float(), granularity)


def ifmr_range_of(histogram: Histogram, grid: Grid, symmetric: bool) -> tuple[Tensor, Tensor]:
    """IFMR: the upper end of a percentile range, scaled by the ratio 0.70, 0.71 … 1.30 of least squared error.

    The range that is scaled keeps 99.9999 % of the values at either end and is extended to zero. Asymmetric: the lower
    end stays, as in the released code (the documentation says that it is searched too). Symmetric: both ends are the
    larger magnitude times the ratio. On equal errors the smallest ratio wins.

    AMCT keeps all values; here they are the bins' centers, and a percentile is off by less than one bin. AMCT scores
    values clipped to the range and rounded to multiples of the scale; here what the quantizer will make of them is
    scored, which differs where an end is no multiple of the scale. AMCT's symmetric scale is absmax / (2^(b-1) - 1),
    or absmax / 2^(b-1) for a larger negative end; here it is that of every symmetric quantizer.

    Returns:
        low and high, float32 ().

    Raises:
        QuantizationError: the histogram is empty.
    """
    if not histogram.total:
        raise QuantizationError("clipping range", "the histogram is empty", "add at least one value")
    beyond = max(histogram.total - int(IFMR_PERCENTILE * histogram.total), 1)
    ends = order_statistics(histogram, np.array([beyond - 1, histogram.total - beyond]))
    low, high = torch.from_numpy(ends).float()
    low, high = low.clamp(max=0), high.clamp(min=0)
    count = round((IFMR_RANGE[1] - IFMR_RANGE[0]) / IFMR_STEP) + 1
    ratios = torch.from_numpy(np.linspace(*IFMR_RANGE, count)).float()
    highs = (torch.maximum(-low, high) if symmetric else high) * ratios
    highs = highs.clamp(max=torch.finfo(torch.float32).max)
    lows = -highs if symmetric else low.expand_as(highs)
    scale, zero_point = affine_from_range(lows, highs, grid, symmetric)
    row = torch.zeros(count, dtype=torch.int64)
    best = int(np.argmin(rows_of(histogram).errors(row, scale, zero_point, grid, p=2).numpy()))
    return lows[best].clone(), highs[best].clone()


def hfmg_range_of(histogram: Histogram, grid: Grid) -> tuple[Tensor, Tensor]:
    """HFMG: a range narrowed bin by bin from the full one; the position with the least squared error wins.

    A step moves the left end over bins that hold at least 1/100,000 of the values, or the right end, whichever gives up
    more bins (the right one on a tie), until at most a quarter of the bins is left. A position's error: values are
    spread evenly inside each bin, the range is cut into 2^b cells, and values go to the center of their cell, those
    outside the range to the outermost center. The first least error wins. The same search is in PyTorch's
    HistogramObserver, which stops where the error first rises.

    AMCT's 4,096 bins span the extremes seen so far, and older counts are spread over new bins when these change. Here
    the bins are our histogram's, which merge exactly: at most 8,192, and 2,049 or more for values that reach zero. So
    ends lie on other borders, and the outermost are cut to the extremes. AMCT does not try the full range.

    Returns:
        low and high, float32 ().

    Raises:
        QuantizationError: the histogram is empty.
    """
    if not histogram.total:
        raise QuantizationError("clipping range", "the histogram is empty", "add at least one value")
    counts = histogram.counts.numpy().astype(np.float64)
    path = _narrowing(counts)
    many = max(1, _BLOCK // (len(counts) + 1))
    errors = [_cell_errors(counts, path[i : i + many], grid.steps + 1) for i in range(0, len(path), many)]
    left, right = path[int(np.argmin(np.concatenate(errors)))]
    ends = histogram.edges.numpy()[[left, right + 1]]
    low, high = torch.tensor(np.clip(ends, histogram.minimum, histogram.maximum), dtype=torch.float32)
    return low, high


def _narrowing(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """First and last bin of every range that HFMG tries, int64 (positions, 2)."""
    below = np.concatenate([[0.0], np.cumsum(counts)])
    step = max(math.ceil(below[-1] / HFMG_STEPS), 1)
    left, right = 0, len(counts) - 1
    path = [(left, right)]
    while right - left > math.ceil(len(counts) / HFMG_NARROWEST):
        after_left = min(int(np.searchsorted(below, below[left] + step)), right)
        after_right = int(np.searchsorted(below, below[right + 1] - step, side="right")) - 2
        after_right = max(after_right, after_left)
        if right - after_right >= after_left - left:
            right = after_right
        else:
            left = after_left
        path.append((left, right))
    return np.array(path)


def _cell_errors(counts: npt.NDArray[np.float64], path: npt.NDArray[np.int64], cells: int) -> npt.NDArray[np.float64]:
    """Summed squared distance to the cells' centers for each range of `path`, in squared bins; float64 (positions,).

    With u the distance from the range's left end in cells, and c the cell of u, the squared distance integrates to
    c / 12 + ((u - c - 1/2)^3 + 1/8) / 3, also outside the range, where c is the outermost cell.
    """
    left, width = path[:, :1], (path[:, 1:] - path[:, :1] + 1) / cells
    u = (np.arange(len(counts) + 1) - left) / width
    cell = np.floor(u).clip(0, cells - 1)
    v = u - cell - 0.5
    integral = cell / 12 + (v * v * v + 0.125) / 3
    errors: npt.NDArray[np.float64] = np.diff(integral) @ counts * width[:, 0] ** 3
    return errors
