"""A mergeable, bounded-memory summary of one tensor's values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibquant.errors import DataError

LOG2_HALF_BINS = 12  # 4,096 bins on either side of zero
MIN_EXPONENT = -140  # the width of the finest bins: well inside float32's denormals (2^-149)
_CHUNK = 1 << 18  # values at a time, so that the float64 copies stay in cache


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values in bins [i, i + 1) * 2^exponent, with i in -4096..4095.

    The exponent is the smallest that covers every value seen. When it grows by d, bins merge by i -> i >> d, which is
    where direct binning at the wider width puts the same values, since floor(floor(x / a) / 2^d) = floor(x / (a 2^d)).
    The result therefore does not depend on the order, the split or the merging of the batches, bit for bit.

    Args:
        exponent: the bin width is 2^exponent.
        first: index of the first occupied bin.
        counts: int64 (bins,), on the CPU, from the first to the last occupied bin; at most 8192.
        minimum: smallest value seen; inf when empty.
        maximum: largest value seen; -inf when empty.

    Example:
        >>> h = Histogram.empty().add(torch.tensor([0.0, 1.0])).merge(Histogram.empty().add(torch.tensor([-3.0])))
        >>> h.total, h.minimum, h.maximum
        (3, -3.0, 1.0)
    """

    exponent: int
    first: int
    counts: Tensor
    minimum: float
    maximum: float

    @staticmethod
    def empty() -> Histogram:
        """The histogram of no values; merging it changes nothing."""
        return Histogram(MIN_EXPONENT, 0, torch.zeros(0, dtype=torch.int64), math.inf, -math.inf)

    @property
    def total(self) -> int:
        """How many values were seen."""
        return int(self.counts.sum())

    @property
    def edges(self) -> Tensor:
        """Bin borders, float64 (bins + 1,), in the values' unit."""
        return torch.arange(self.first, self.first + len(self.counts) + 1, dtype=torch.float64) * 2.0**self.exponent

    @property
    def centers(self) -> Tensor:
        """Bin centers, float64 (bins,), in the values' unit."""
        return (self.edges[:-1] + 2.0 ** (self.exponent - 1)) if len(self.counts) else self.edges[:0]

    def add(self, x: Tensor) -> Histogram:
        """The histogram with the values of `x` (any shape, device and float dtype; read as float32) counted too.

        Raises:
            DataError: `x` holds NaN or infinity.
        """
        return self.merge(_histogram_of(x)) if x.numel() else self

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both sets of values."""
        if not len(self.counts) or not len(other.counts):
            return self if len(self.counts) else other
        low, high = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        exponent = max(self.exponent, other.exponent)
        a, b = _widened(self, exponent), _widened(other, exponent)
        first = min(a.first, b.first)
        counts = torch.zeros(max(h.first + len(h.counts) for h in (a, b)) - first, dtype=torch.int64)
        for h in (a, b):
            counts[h.first - first : h.first - first + len(h.counts)] += h.counts
        return Histogram(exponent, first, counts, low, high)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        mine = (self.exponent, self.first, self.minimum, self.maximum)
        theirs = (other.exponent, other.first, other.minimum, other.maximum)
        return mine == theirs and torch.equal(self.counts, other.counts)


def finite_extremes(x: Tensor) -> tuple[float, float]:
    """Smallest and largest value of a non-empty activation tensor; zero is always +0.0.

    Raises:
        DataError: `x` holds NaN or infinity.
    """
    low, high = (float(v) + 0.0 for v in x.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = "NaN" if math.isnan(low) else "infinity"
        raise DataError("activations", f"hold {bad}", "check the images' preprocessing and the network's weights")
    return low, high


def order_statistics(histogram: Histogram, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The values of these ranks in ascending order, float64, each off by less than one bin; the extremes are exact.

    Args:
        histogram: not empty; values are taken as spread evenly inside each bin.
        ranks: 0 to histogram.total - 1, any shape.
    """
    reached, edges = np.cumsum(histogram.counts.numpy()), histogram.edges.numpy()
    place = np.searchsorted(reached, ranks, side="right")
    count = histogram.counts.numpy()[place]
    inside = (ranks - (reached[place] - count) + 0.5) / count
    values = edges[place] + inside * (edges[place + 1] - edges[place])
    values = np.where(ranks == 0, histogram.minimum, values)
    values = np.where(ranks == reached[-1] - 1, histogram.maximum, values)
    return np.clip(values, histogram.minimum, histogram.maximum)


def _histogram_of(x: Tensor) -> Histogram:
    values = x.detach().reshape(-1).float()
    if values.device.type == "mps":  # it has no float64
        values = values.cpu()
    low, high = finite_extremes(values)
    exponent = max(_exponent(low), _exponent(high), MIN_EXPONENT)
    # float64 holds every x / 2^k exactly, also where float32 would underflow and turn a floor of -1 into 0
    inverse = 2.0**-exponent
    first = math.floor(low * inverse)
    bins = math.floor(high * inverse) - first + 1
    counts = torch.zeros(bins, dtype=torch.int64)
    for chunk in values.split(_CHUNK):
        index = chunk.double().mul_(inverse).floor_().sub_(first).long()
        counts += torch.bincount(index, minlength=bins).cpu()
    return Histogram(exponent, first, counts, low, high)


def _exponent(value: float) -> int:
    """The smallest k with value / 2^k in [-4096, 4096)."""
    mantissa, exponent = math.frexp(value)
    if value == 0:
        return MIN_EXPONENT
    return exponent - LOG2_HALF_BINS - int(mantissa == -0.5)


def _widened(h: Histogram, exponent: int) -> Histogram:
    shift = min(exponent - h.exponent, 63)
    if not shift:
        return h
    index = (torch.arange(len(h.counts)) + h.first) >> shift
    first = int(index[0])
    counts = torch.zeros(int(index[-1]) - first + 1, dtype=torch.int64).index_add_(0, index - first, h.counts)
    return Histogram(exponent, first, counts, h.minimum, h.maximum)
