"""Rounding weights against the second moments of their inputs: error feedback, then coordinate descent.

The squared error of a product's output, |X q - y|^2 for inputs X and a wanted output y, is a quadratic function of the
weights q with the Gram matrix X^T X, and no image is needed once that is known. Sources: Frantar, Singh and
Alistarh, "Optimal Brain Compression", NeurIPS 2022 (OBQ); Frantar et al., "GPTQ", ICLR 2023; Zhang et al., "COMQ: A
Backpropagation-Free Algorithm for Post-Training Quantization", IEEE Access, 2025.

Shapes: G groups of O rows (output channels) of K weights; float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 64  # columns between two updates of all others by one matrix product
DAMPING = 0.01  # share of the Gram matrix's mean diagonal, GPTQ's
SWEEPS = 5  # at most; on ResNet-20 more of them change nothing that held-out images show
TINY = 1e-30  # below it a sum of squares counts as zero


@dataclass(frozen=True)
class Moments:
    """What the squared error of a product's output depends on, summed over positions of images.

    Args:
        gram: X^T X of the inputs, (G, K, K).
        cross: y X for the wanted outputs y, (G, O, K).
        energy: sum of y^2, (G, O).
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.energy + other.energy)

    def errors(self, weight: Tensor) -> Tensor:
        """|X w - y|^2 of each row, (G, O), for weights (G, O, K)."""
        return ((weight @ self.gram - 2 * self.cross) * weight).sum(2) + self.energy

    def damped(self, weight: Tensor, share: float) -> Moments:
        """With lambda |w - weight|^2 added to every row's error, lambda being `share` of the mean diagonal of the Gram.

        It makes the Gram matrix regular where there are fewer positions than weights or inputs that are always zero,
        and holds the result near the float weight where the images do not decide it.
        """
        size = share * self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=TINY)
        ridge = size[:, None, None]
        eye = torch.eye(self.gram.shape[1], dtype=self.gram.dtype, device=self.gram.device)
        return Moments(
            self.gram + ridge * eye, self.cross + ridge * weight, self.energy + size[:, None] * weight.square().sum(2)
        )

    def optimum(self) -> Tensor:
        """The weights of least error without rounding, (G, O, K); the Gram matrix is regular."""
        return torch.cholesky_solve(self.cross.mT, torch.linalg.cholesky(self.gram)).mT


@dataclass(frozen=True)
class RowGrid:
    """The values that each row's weights may take: scale * n for integers n from low to high, or for some of them.

    Args:
        scale: float64 (S,).
        low, high: float64 (S,).
        owner: int64 (G, O), which of the S scales a row has.
        levels: float64 (S, n), ascending: the integers allowed; None allows all.
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    owner: Tensor
    levels: Tensor | None = None

    def rounded(self, weight: Tensor) -> Tensor:
        """The nearest integers allowed, (G, O, K)."""
        return self.nearest()(weight / self.of(self.scale))

    def nearest(self) -> Callable[[Tensor], Tensor]:
        """What gives the nearest integers allowed to numbers (G, O, K), in units of the scales."""
        if self.levels is None:
            low, high = self.of(self.low), self.of(self.high)
            return lambda wanted: torch.round(wanted).clamp_(low, high)
        table = self.levels[self.owner]
        middle = ((table[..., 1:] + table[..., :-1]) / 2).contiguous()
        return lambda wanted: table.gather(2, torch.searchsorted(middle, wanted.contiguous()))

    def values(self, integers: Tensor) -> Tensor:
        """What integers (G, O, K) mean."""
        return integers * self.of(self.scale)

    def of(self, parameter: Tensor) -> Tensor:
        """A parameter (S,) of each row, (G, O, 1)."""
        return parameter[self.owner][..., None]


def round_rows(weight: Tensor, moments: Moments, grid: RowGrid) -> tuple[Tensor, RowGrid]:
    """Integers and scales of small output error: error feedback, then sweeps of coordinate descent and new scales.

    Where these leave a larger error than the nearest integers and the scales to start from, a row gets those back; of
    rows that share a scale, all do if they are worse together.

    Args:
        weight: the float weights, (G, O, K), which damping pulls to.
        moments: of the inputs and the wanted outputs.
        grid: the values allowed, with the scales to start from.

    Returns:
        the integers (G, O, K), and the grid with its new scales.
    """
    damped, start = moments.damped(weight, DAMPING), grid
    integers = error_feedback(damped, grid)
    for _ in range(SWEEPS):
        integers, changed = coordinate_descent(integers, damped, grid)
        grid = best_scales(integers, damped, grid)
        if not changed:
            break
    nearest = start.rounded(weight)
    harm = moments.errors(grid.values(integers)) - moments.errors(start.values(nearest))
    worse = torch.zeros_like(grid.scale).index_add(0, grid.owner.flatten(), harm.flatten()) > 0
    integers = torch.where(grid.of(worse), nearest, integers)
    return integers, replace(grid, scale=torch.where(worse, start.scale, grid.scale))


def error_feedback(moments: Moments, grid: RowGrid) -> Tensor:
    """Integers found by rounding column after column; what a column's rounding spoils, the later columns make up for.

    Columns go in the order of the Gram matrix's falling diagonal. With U the upper Cholesky factor of its inverse,
    rounding column k by an error e takes e / U_kk * U_kj from every later column j. Source: GPTQ, section 3.3; the
    order is its released code's.

    Args:
        moments: damped, so that the Gram matrix is regular.
        grid: the values allowed.

    Returns:
        (G, O, K).
    """
    order = moments.gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    gram = _columns(moments.gram.mT, order)
    gram = _columns(gram.mT, order)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left = _columns(moments.optimum(), order)
    scale, nearest = grid.scale[grid.owner], grid.nearest()
    found = torch.empty_like(left)
    for start in range(0, left.shape[2], BLOCK):
        stop = min(start + BLOCK, left.shape[2])
        spoiled = left.new_empty(*left.shape[:2], stop - start)
        for k in range(start, stop):
            found[:, :, k] = nearest((left[:, :, k] / scale)[..., None])[..., 0]
            error = (left[:, :, k] - found[:, :, k] * scale) / factor[:, k, k, None]
            left[:, :, k:stop] -= error[..., None] * factor[:, None, k, k:stop]
            spoiled[:, :, k - start] = error
        left[:, :, stop:] -= spoiled @ factor[:, start:stop, stop:]
    return torch.empty_like(found).scatter_(2, order[:, None].expand_as(found), found)


def coordinate_descent(integers: Tensor, moments: Moments, grid: RowGrid) -> tuple[Tensor, int]:
    """One sweep: each column in turn takes the integers that are best while all other columns stay. Source: COMQ.

    Args:
        integers: where it starts, (G, O, K).
        moments: any; a column whose diagonal is zero keeps its integers.
        grid: the values allowed.

    Returns:
        the integers, no row with a larger error, and how many changed.
    """
    integers = integers.clone()
    scale, nearest = grid.scale[grid.owner], grid.nearest()
    curvature = moments.gram.diagonal(dim1=1, dim2=2)[:, None] * scale[..., None]
    reach = torch.where(curvature > TINY, 1 / curvature, 0).unbind(2)
    slope = moments.cross - grid.values(integers) @ moments.gram  # minus half the error's gradient
    changed = 0
    for start in range(0, integers.shape[2], BLOCK):
        stop = min(start + BLOCK, integers.shape[2])
        before, local = integers[:, :, start:stop].clone(), slope[:, :, start:stop].clone()
        gram = moments.gram[:, start:stop, start:stop].contiguous()
        for k in range(start, stop):
            here = integers[:, :, k]
            best = nearest(torch.addcmul(here, local[:, :, k - start], reach[k])[..., None])[..., 0]
            move = (best - here).mul_(scale)
            here.copy_(best)
            local.baddbmm_(move[..., None], gram[:, k - start, None], alpha=-1)
        moved = integers[:, :, start:stop] - before
        changed += int(moved.count_nonzero())
        slope -= grid.values(moved) @ moments.gram[:, start:stop]
    return integers, changed


def best_scales(integers: Tensor, moments: Moments, grid: RowGrid) -> RowGrid:
    """The grid with the scales of least error for given integers; a scale that this would not leave positive stays.

    For the rows that share a scale: sum of n . cross over sum of n^T Gram n. Source: COMQ.
    """
    parts = (integers * moments.cross).sum(2), ((integers @ moments.gram) * integers).sum(2)
    owner, none = grid.owner.flatten(), torch.zeros_like(grid.scale)
    above, below = (none.index_add(0, owner, part.flatten()) for part in parts)
    scale = above / below.clamp(min=TINY)
    return replace(grid, scale=torch.where((below > TINY) & (scale > 0), scale, grid.scale))


def _columns(matrix: Tensor, order: Tensor) -> Tensor:
    """The last axis of (G, M, K) in the order (G, K)."""
    return matrix.gather(2, order[:, None].expand_as(matrix))
