"""A weight on levels beyond the uniform grid."""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from torch import Tensor

from calibquant.errors import unknown
from calibquant.numerics.affine import MIN_SCALE, QTensor, aligned
from calibquant.numerics.grid import Grid, PerChannel
from calibquant.numerics.levels import (
    TOP,
    apot_levels,
    best_scale,
    binary_levels,
    cluster,
    gathered,
    on_levels,
    power_of_two_levels,
    ternary_levels,
)
from calibquant.numerics.rows import as_matrix
from calibquant.quantization.plan import LevelPlan, TensorPlan
from calibquant.recipe import GridKind

ROUNDS = 4  # of new scales and new levels in turn
INT8 = Grid(8, signed=True)


def leveled_weight(weight: Tensor, plan: TensorPlan, levels: LevelPlan, energy: Tensor | None = None) -> QTensor:
    """A weight rounded to the nearest of the levels that its plan names, with the scales that suit them best.

    Levels that are given: the scale of least squared error of each channel, exact. "nuq": the scales of signed 8 bits,
    and the integers that serve the weight's codes best, found exactly.
    "codebook": levels by exact clustering and scales by least squares, in turns, so that the squared error falls.

    Args:
        weight: float, any shape.
        plan: its granularity; the grid is that of signed 8 bits.
        levels: which.
        energy: for "codebook" and "nuq": what the squared error of each weight is multiplied by, positive, the shape of
            `weight`; None: 1.
    """
    rows = as_matrix(weight, plan.granularity)
    top = rows.abs().amax(1).clamp(min=MIN_SCALE * TOP)
    if levels.kind in ("codebook", "nuq"):
        mass = torch.ones_like(rows) if energy is None else as_matrix(energy, plan.granularity)
        scale, table = _learned(rows, mass, top / TOP, levels)
    else:
        table = torch.tensor(_given(levels), dtype=torch.int8)
        best = [best_scale(row, table.numpy()) for row in rows.double().cpu().numpy()]
        scale = torch.tensor(best, dtype=torch.float32, device=rows.device)
    scale = scale.clamp(min=MIN_SCALE)
    scale = scale if isinstance(plan.granularity, PerChannel) else scale[0]
    codes = on_levels(weight.detach().float() / aligned(scale, weight, plan.granularity), table, plan.granularity)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return QTensor(codes.to(torch.int8), scale, zero, INT8, plan.granularity, levels=table.to(weight.device))


def _given(levels: LevelPlan) -> list[int]:
    bits = levels.bits
    if levels.kind == "power-of-two":
        return power_of_two_levels(bits)
    if levels.kind == "apot":
        return apot_levels(bits)
    if levels.kind == "ternary":
        return ternary_levels()
    if levels.kind == "binary":
        return binary_levels(bits)
    raise unknown("quant.weights.grid", levels.kind, get_args(GridKind))


def _learned(rows: Tensor, mass: Tensor, scale: Tensor, levels: LevelPlan) -> tuple[Tensor, Tensor]:
    """Scales (R,) and levels, int8 (n,) or (R, n); squared errors count by `mass`, (R, K)."""
    rounds = 1 if levels.kind == "nuq" else ROUNDS
    granularity, best = PerChannel(0), (torch.inf, scale, torch.zeros(0))
    for _ in range(rounds):
        units = rows / scale[:, None]
        table = _clustered(torch.round(units) if levels.kind == "nuq" else units, mass, scale, levels)
        codes = on_levels(units, table, granularity)
        error = float((mass * (codes * scale[:, None] - rows).double() ** 2).sum())
        if error >= best[0]:
            break
        best = error, scale, table
        size = (mass * codes.square()).sum(1)
        scale = torch.where(size > 0, (mass * codes * rows).sum(1) / size.clamp(min=1e-30), scale)
        scale = torch.maximum(scale, best[1] / 4).clamp(min=MIN_SCALE)
    return best[1], best[2]


def _clustered(units: Tensor, mass: Tensor, scale: Tensor, levels: LevelPlan) -> Tensor:
    """The best levels for values in units of their scales, int8; those of a shared table weigh by scale^2."""
    limited, weights = (values.double().cpu().numpy() for values in (units.clamp(-TOP, TOP), mass))
    if levels.own:
        found = [_padded(cluster(*gathered(*row), levels.count, whole=True), levels.count)
                 for row in zip(limited, weights, strict=True)]  # fmt: skip
        return torch.tensor(np.stack(found), dtype=torch.int8, device=units.device)
    weights = weights * scale.double().cpu().numpy()[:, None] ** 2
    weights = weights / weights.max()
    table = cluster(*gathered(limited.ravel(), weights.ravel() + 1e-12), levels.count, whole=True)
    return torch.tensor(_padded(table, levels.count), dtype=torch.int8, device=units.device)


def _padded(table: np.ndarray, count: int) -> np.ndarray:
    """Levels filled up to `count` with the last one, where a tensor has fewer distinct values."""
    return np.concatenate([table, np.repeat(table[-1:], count - len(table))])
