"""The clipping range of least error, searched over a fixed family of ranges.

The family and the score are those of QDrop's MSEObserver (Wei et al., QDrop, ICLR 2022, released code): mean
|x - fake_quantize(x)|^p with p = 2.4 over 100 thresholds, or over 100 widths times every zero point. The exhaustive
search costs 100 * 2^bits passes over the data; `mse_range` finds the same range by discarding what provably loses.

What is promised is the least error of this family, not of all ranges. No range is wider than the values. A symmetric
grid has one code less above zero than below: where a far outlier is positive, a wider range can have a smaller error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from calibquant.numerics.affine import MIN_SCALE, affine_from_range
from calibquant.numerics.grid import Granularity, Grid
from calibquant.numerics.histogram import Histogram
from calibquant.numerics.mse_bounds import group_levels
from calibquant.numerics.rows import Rows, as_matrix, as_range, padded, rows_of

Side = Literal["pos", "neg", "no"]
WIDTHS = 100
_PAIRS = 1 << 21  # (row, candidate) pairs held at once: about 100 MB with their temporaries
_MARGIN = 1e-4  # relative: a bound must lose by more than its own rounding
_TINY = 1e-37  # per value, where float32's |x|^p underflows


def side_of(low: float, high: float) -> Side:
    """'pos' when no value is negative, 'neg' when none is positive, 'no' otherwise."""
    return "pos" if low >= 0 else "neg" if high <= 0 else "no"


def mse_range(
    x: Tensor, grid: Grid, symmetric: bool, granularity: Granularity, p: float = 2.4, side: Side | None = None
) -> tuple[Tensor, Tensor]:
    """The same range as `mse_range_exhaustive`, found by exact pruning.

    Args:
        x: float, any shape.
        grid: the codes.
        symmetric: whether the range is used for a symmetric quantizer.
        granularity: per tensor, or per channel along an axis.
        p: exponent of the error, >= 1 (the bounds need a convex error).
        side: the tensor's side; decided on the whole tensor when None.

    Returns:
        low and high, float32, () or (C,).

    Raises:
        QuantizationError: `x` is empty or not finite.
    """
    rows, family = _problem(x, grid, symmetric, granularity, side)
    return as_range(*family.chosen(_pruned_search(rows, family, p).candidate), granularity)


def mse_range_exhaustive(
    x: Tensor, grid: Grid, symmetric: bool, granularity: Granularity, p: float = 2.4, side: Side | None = None
) -> tuple[Tensor, Tensor]:
    """The range of least mean |x - fake_quantize(x)|^p of the whole family, first one on ties; see `mse_range`.

    The side is decided once on the whole tensor. One-sided or symmetric: thresholds i/100 of absmax, i = 1..100, with
    low = 0 on side 'pos' and high = 0 on side 'neg'. Otherwise: widths i/100 of max(x_max, 0) - min(x_min, 0), and for
    each every zero point z = 0..2^b - 1 counted from the lowest code: low = -z * width / (2^b - 1), high = low + width.
    """
    rows, family = _problem(x, grid, symmetric, granularity, side)
    best = _Best(rows, family, p)
    every = torch.arange(len(rows.values), device=rows.values.device)
    many = max(1, _PAIRS // len(every))
    for start in range(0, family.count, many):
        candidates = torch.arange(start, min(start + many, family.count), device=every.device)
        best.try_pairs(every.repeat(len(candidates)), candidates.repeat_interleave(len(every)))
    return as_range(*family.chosen(best.candidate), granularity)


def mse_range_of(histogram: Histogram, grid: Grid, symmetric: bool, p: float = 2.4) -> tuple[Tensor, Tensor]:
    """`mse_range` per tensor on a histogram's bin centers, weighted by their counts, and its exact extremes.

    Returns:
        low and high, float32 ().

    Raises:
        QuantizationError: the histogram is empty.
    """
    rows = rows_of(histogram)
    low, high = torch.tensor([histogram.minimum]), torch.tensor([histogram.maximum])
    family = _Family(low, high, side_of(histogram.minimum, histogram.maximum), grid, symmetric)
    low, high = family.chosen(_pruned_search(rows, family, p).candidate)
    return low[0], high[0]


@dataclass(frozen=True)
class _Family:
    """The candidate ranges of every row; x_min and x_max are float32 (R,)."""

    x_min: Tensor
    x_max: Tensor
    side: Side
    grid: Grid
    symmetric: bool

    @property
    def thresholds_only(self) -> bool:
        return self.symmetric or self.side != "no"

    @property
    def count(self) -> int:
        return WIDTHS if self.thresholds_only else WIDTHS * (self.grid.steps + 1)

    @property
    def extent(self) -> Tensor:
        return self.x_max.clamp(min=0) - self.x_min.clamp(max=0)

    def ranges(self, row: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
        """Low and high, float32 (P,), of pairs of a row and a candidate's number, both int64 (P,)."""
        if self.thresholds_only:
            absmax = torch.maximum(self.x_min.abs(), self.x_max.abs())
            high = absmax[row] / WIDTHS * (candidate + 1)
            zero = torch.zeros_like(high)
            return (zero if self.side == "pos" else -high), (zero if self.side == "neg" else high)
        number = torch.div(candidate, self.grid.steps + 1, rounding_mode="floor")
        width = self.extent[row] / WIDTHS * (number + 1)
        below = (candidate - number * (self.grid.steps + 1)) * (width / self.grid.steps)
        return -below, width - below

    def affine(self, row: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
        return affine_from_range(*self.ranges(row, candidate), self.grid, self.symmetric)

    def chosen(self, candidate: Tensor) -> tuple[Tensor, Tensor]:
        """The range (R,) of each row's candidate; its min and max where every score overflowed (candidate -1)."""
        low, high = self.ranges(torch.arange(len(candidate), device=candidate.device), candidate.clamp(min=0))
        return torch.where(candidate < 0, self.x_min, low), torch.where(candidate < 0, self.x_max, high)

    def starters(self) -> tuple[Tensor, Tensor]:
        """Pairs worth trying first: every width, centered on the row's values."""
        device = self.x_min.device
        row = torch.arange(len(self.x_min), device=device).repeat_interleave(WIDTHS)
        number = torch.arange(WIDTHS, device=device).repeat(len(self.x_min))
        if self.thresholds_only:
            return row, number
        width = (self.extent[row].double() / WIDTHS * (number + 1)).clamp(min=1e-300)
        middle = (self.x_max.clamp(min=0) + self.x_min.clamp(max=0))[row].double() / 2
        zero = torch.round((0.5 - middle / width) * self.grid.steps).clamp(0, self.grid.steps)
        return row, number * (self.grid.steps + 1) + zero.long()

    def within(self, low: Tensor, high: Tensor, reach: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs, in order, whose range ends at most `reach` inside [low, high] (each float64 (R,)), in bounded parts.

        Two more zero points are taken on either side for rounding. Where the scale falls below MIN_SCALE the grid is
        wider than the range says, so these widths keep every zero point.
        """
        device, steps = low.device, self.grid.steps
        if self.thresholds_only:
            first = torch.zeros(len(low), 1, dtype=torch.int64, device=device)
            last = first + WIDTHS - 1
        else:
            number = torch.arange(1, WIDTHS + 1, device=device)
            width = self.extent[:, None].double() / WIDTHS * number
            delta = (width / steps).clamp(min=1e-300)
            first = ((-low - reach)[:, None] / delta).sub_(2).clamp_(0, steps).ceil_()
            last = ((width - (high - reach)[:, None]) / delta).add_(2).clamp_(-1, steps).floor_()
            guarded = delta <= MIN_SCALE * (1 + 1e-3)
            start = torch.arange(WIDTHS, device=device) * (steps + 1)
            first = first.masked_fill_(guarded, 0).long() + start
            last = last.masked_fill_(guarded, steps).long() + start
        lengths = (last - first + 1).clamp_(min=0)
        bounds = np.searchsorted(
            (total := lengths.sum(1).cumsum(0)).cpu().numpy(), np.arange(_PAIRS, int(total[-1]) + _PAIRS, _PAIRS)
        )
        for a, b in zip([0, *bounds], [*bounds, len(low)], strict=True):
            length = lengths[a:b].reshape(-1)
            if length.numel() and int(length.sum()):
                row = torch.arange(a, b, device=device).repeat_interleave(lengths[a:b].sum(1))
                origin = first[a:b].reshape(-1) - (length.cumsum(0) - length)
                yield self._distinct(row, origin.repeat_interleave(length) + torch.arange(len(row), device=device))

    def _distinct(self, row: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
        """Drop later candidates that the guard of the scale makes equal to an earlier one: nearly dead channels."""
        scale, zero_point = self.affine(row, candidate)
        guarded = scale <= torch.tensor(MIN_SCALE)
        if not guarded.any():
            return row, candidate
        key = torch.where(guarded, row * (1 << 17) + zero_point - self.grid.qmin, -1 - torch.arange(len(row)).to(row))
        keep = torch.from_numpy(np.sort(np.unique(key.cpu().numpy(), return_index=True)[1])).to(row)
        return row[keep], candidate[keep]


class _Best:
    """The best candidate of every row so far: the least score, then the lowest number."""

    def __init__(self, rows: Rows, family: _Family, p: float) -> None:
        self.rows, self.family, self.p = rows, family, p
        self.score = torch.full((len(rows.values),), torch.inf, dtype=torch.float64, device=rows.values.device)
        self.candidate = torch.full_like(self.score, -1, dtype=torch.int64)

    def try_pairs(self, row: Tensor, candidate: Tensor) -> None:
        """Score pairs exactly and keep the better ones."""
        if not len(row):
            return
        errors = self.rows.errors(row, *self.family.affine(row, candidate), self.family.grid, self.p)
        least = torch.full_like(self.score, torch.inf).scatter_reduce_(0, row, errors, "amin")
        hit = (errors == least[row]) & errors.isfinite()
        none = torch.iinfo(torch.int64).max
        number = torch.full_like(self.candidate, none).scatter_reduce_(0, row[hit], candidate[hit], "amin")
        wins = (least < self.score) | ((least == self.score) & (number < self.candidate))
        wins &= number < none
        self.score = torch.where(wins, least, self.score)
        self.candidate = torch.where(wins, number, self.candidate)

    def may_win(self, row: Tensor, candidate: Tensor, bound: Tensor) -> Tensor:
        """Which pairs, given lower bounds (P,), cannot be excluded; against a perfect score only earlier ones can."""
        perfect = (self.score == 0)[row] & (candidate > self.candidate[row])
        return (bound <= (self.score * (1 + _MARGIN) + _TINY)[row]) & ~perfect

    def reach(self) -> Tensor:
        """How far a row's extreme value may be clipped before this alone costs more than the best score, (R,)."""
        size = self.rows.size
        share: Tensor | float = 1 / size
        if self.rows.weights is not None:
            share = self.rows.weights[:, [0, size - 1]].amin(1).double()  # a histogram's bins are in order
        return ((self.score * (1 + _MARGIN) + _TINY) / share) ** (1 / self.p) * (1 + _MARGIN)


def _problem(
    x: Tensor, grid: Grid, symmetric: bool, granularity: Granularity, side: Side | None
) -> tuple[Rows, _Family]:
    matrix = as_matrix(x, granularity)
    low, high = matrix.aminmax(dim=1)
    side = side or side_of(float(low.min()), float(high.max()))
    return Rows(padded(matrix), matrix.shape[1]), _Family(low, high, side, grid, symmetric)


def _pruned_search(rows: Rows, family: _Family, p: float) -> _Best:
    best, grid = _Best(rows, family, p), family.grid
    levels = group_levels(rows, grid)
    row, candidate = family.starters()
    if levels:
        bound = levels[0].lower_bounds(row, *family.affine(row, candidate), grid, p)
        best.try_pairs(*_promising(row, candidate, bound, len(rows.values)))
    else:
        best.try_pairs(row, candidate)
        if family.thresholds_only:
            return best
    low, high = (v.double() for v in rows.values[:, : rows.size].aminmax(dim=1))
    for row, candidate in family.within(low, high, best.reach()):
        for groups in levels:
            bound = groups.lower_bounds(row, *family.affine(row, candidate), grid, p)
            keep = best.may_win(row, candidate, bound)
            row, candidate, bound = row[keep], candidate[keep], bound[keep]
            best.try_pairs(*_promising(row, candidate, bound, len(rows.values)))
            keep = best.may_win(row, candidate, bound)
            row, candidate = row[keep], candidate[keep]
        keep = best.may_win(row, candidate, torch.zeros(len(row), device=row.device))
        best.try_pairs(row[keep], candidate[keep])
    return best


def _promising(row: Tensor, candidate: Tensor, bound: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Of pairs in the order of their rows, one for each row: the first with the lowest bound."""
    least = torch.full((rows,), torch.inf, device=row.device).scatter_reduce_(0, row, bound, "amin")
    hits = (bound == least[row]).nonzero()[:, 0]
    new = torch.ones(len(hits), dtype=torch.bool, device=row.device)
    new[1:] = row[hits][1:] != row[hits][:-1]
    return row[hits[new]], candidate[hits[new]]
