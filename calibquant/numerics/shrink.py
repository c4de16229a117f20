"""The clipping range of least error among those that shrink both extremes by one common factor."""

from __future__ import annotations

import torch
from torch import Tensor

from calibquant.numerics.affine import affine_from_range
from calibquant.numerics.grid import Granularity, Grid
from calibquant.numerics.rows import Rows, as_matrix, as_range, padded

FACTORS = 80


def mse_shrink_range(
    x: Tensor, grid: Grid, symmetric: bool, granularity: Granularity, p: float = 2.4
) -> tuple[Tensor, Tensor]:
    """The range of least mean |x - fake_quantize(x)|^p among (x_min, x_max) * (1 - i/100), i = 0..79.

    x_min and x_max are each row's own. On ties the widest range wins; where every error overflows, min and max stay.

    Source: UniformAffineQuantizer with `scale_method='mse'` in the released code of BRECQ (Li et al., ICLR 2021). That
    code takes (x_max - x_min) / (2^b - 1) as the scale also where zero lies outside the range, and then a zero point
    outside the grid; here `affine_from_range` extends every range to zero. So the two differ where all values of a row
    have one sign and none is zero.

    Args:
        x: float, any shape.
        grid: the codes.
        symmetric: whether the range is used for a symmetric quantizer; such a range is scored about zero.
        granularity: per tensor, or per channel along an axis.
        p: exponent of the error.

    Returns:
        low and high, float32, () or (C,).

    Raises:
        QuantizationError: `x` is empty or not finite.
    """
    matrix = as_matrix(x, granularity)
    low, high = matrix.aminmax(dim=1)
    rows, every = Rows(padded(matrix), matrix.shape[1]), torch.arange(len(matrix), device=matrix.device)
    best, chosen = torch.full_like(low, torch.inf, dtype=torch.float64), torch.ones_like(low)
    for factor in (1 - i / 100 for i in range(FACTORS)):
        error = rows.errors(every, *affine_from_range(low * factor, high * factor, grid, symmetric), grid, p)
        better = error < best
        best, chosen = torch.where(better, error, best), chosen.masked_fill(better, factor)
    return as_range(low * chosen, high * chosen, granularity)
