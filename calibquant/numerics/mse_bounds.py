"""A rigorous lower bound of a row's quantization error from groups of its sorted values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibquant.numerics.affine import fake_quantize
from calibquant.numerics.grid import Grid, PerChannel
from calibquant.numerics.rows import Rows

_ROUNDING = 2.0**-20  # float32 rounding of a value, its code and its grid point: less than 16 half-ulps


@dataclass(frozen=True)
class Groups:
    """Neighbouring values of each row, grouped: all float32 (R, G); unused slots have weight 0.

    Args:
        low, high: a group's smallest and largest value.
        mean: its (weighted) mean.
        weight: its share of the row.
        block: how many float32 one temporary holds.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    weight: Tensor
    block: int

    def lower_bounds(self, row: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, p: float) -> Tensor:
        """A lower bound of `Rows.errors` for the same pairs, float32 (P,), up to a relative 1e-5. Needs p >= 1.

        Where a group lies in one quantization cell, |x - q|^p is convex in x, and Jensen's inequality gives at least
        |mean - q|^p. Where it straddles the border of two cells, the distance to the grid rises and then falls, and
        its ends bound it. Wider groups count 0.

        Args:
            row: int64 (P,).
            scale, zero_point: float32 and int32 (P,).
        """
        bounds = torch.empty(len(row), device=row.device)
        many = max(1, self.block // self.low.shape[1])
        slack = torch.maximum(self.low.abs(), self.high.abs()) * _ROUNDING
        single = len(self.low) == 1
        for start in range(0, len(row), many):
            part = slice(start, start + many)
            low, high, mean, weight, loose = (
                t if single else t.index_select(0, row[part])
                for t in (self.low, self.high, self.mean, self.weight, slack)
            )
            s, z = scale[part], zero_point[part]
            below = fake_quantize(low.expand(len(s), -1), s, z, grid, PerChannel(0))
            above = fake_quantize(high.expand(len(s), -1), s, z, grid, PerChannel(0))
            cells = (above - below).div_(s[:, None])
            across = torch.minimum(low - below, above.sub_(high)).masked_fill_(cells > 1.5, 0)
            distance = torch.where(cells < 0.5, below.sub_(mean).abs_(), across)
            bounds[part] = distance.sub_(loose).clamp_(min=0).pow_(p).mul_(weight).sum(1)
        return bounds


def group_levels(rows: Rows, grid: Grid) -> list[Groups]:
    """Groups from coarse to fine; none where the rows are too short for groups to save work.

    About 16 groups a quantization step, then 16 times more, as long as a group holds 4 or 8 values on average.
    """
    groups = min(16 * (grid.steps + 1), 4096, rows.size // 4)
    if groups < max(4 * grid.steps, 64):
        return []
    values, weights = rows.values[:, : rows.size], rows.weights
    if weights is None:
        ordered = torch.from_numpy(np.sort(values.cpu().numpy(), axis=1))  # SIMD sort without indices: 3 times faster
    else:
        ordered, order = values.cpu().sort(dim=1)
        weights = weights.cpu()[:, : rows.size].gather(1, order)
    levels = [_grouped(ordered, weights, groups, rows)]
    while (groups := groups * 16) <= rows.size // 8:
        levels.append(_grouped(ordered, weights, groups, rows))
    return levels


def _grouped(ordered: Tensor, weights: Tensor | None, groups: int, rows: Rows) -> Groups:
    """Cut every sorted row (R, n) at `groups` - 1 equidistant values."""
    count, size = ordered.shape
    low, high = ordered[:, :1], ordered[:, -1:]
    cuts = low + (high - low) * torch.arange(1, groups) / groups
    inner = torch.searchsorted(ordered, cuts.contiguous())
    ends = torch.cat([inner, torch.full((count, 1), size)], 1)
    starts = torch.cat([torch.zeros(count, 1, dtype=torch.int64), inner], 1)
    used = ends > starts
    offset = torch.arange(count)[:, None] * size
    first, last = (starts + offset)[used].numpy(), (ends + offset)[used].numpy() - 1
    flat = ordered.reshape(-1).numpy()
    if weights is None:
        mass = (last - first + 1).astype(np.float64)
        mean, weight = np.add.reduceat(flat, first, dtype=np.float64) / mass, mass / size
    else:
        share = weights.reshape(-1).double().numpy()
        weight = np.add.reduceat(share, first)
        moment = np.add.reduceat(share * flat, first)
        mean = np.divide(moment, weight, out=flat[first].astype(np.float64), where=weight > 0)
    place = (used.nonzero()[:, 0], (used.cumsum(1) - 1)[used])
    width = int(used.sum(1).max())

    def packed(values: np.ndarray) -> Tensor:
        matrix = torch.zeros(count, width)
        matrix[place] = torch.from_numpy(values).float()
        return matrix.to(rows.values.device)

    return Groups(packed(flat[first]), packed(flat[last]), packed(mean), packed(weight), rows.block)
