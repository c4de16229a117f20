"""What reconstruction learns: roundings of weights (AdaRound) and scales of activations (LSQ)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibquant.numerics.affine import QTensor, aligned
from calibquant.numerics.grid import Grid

ZETA, GAMMA = 1.1, -0.1  # how far the hard sigmoid is stretched, so that it reaches 0 and 1


class SoftRounding(nn.Module):
    """AdaRound: each weight is rounded down or up, by a variable between the two that is learned.

    value = scale * (clamp(floor(w / scale) + h + zero_point, qmin, qmax) - zero_point),
    h = clamp(sigmoid(alpha) * (zeta - gamma) + gamma, 0, 1). At first h is the fractional part of w / scale, so that
    the value is the float weight (clipped). Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
    Quantization", ICML 2020, eq. 23 to 25; the asymmetric form as in BRECQ and QDrop.

    Args:
        weight: float32, any shape.
        start: its codes, whose scale, zero point and grid are kept.
    """

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        super().__init__()
        self.grid, self.granularity = start.grid, start.granularity
        self.base: Tensor
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", aligned(start.scale, weight, start.granularity))
        self.register_buffer("zero_point", aligned(start.zero_point, weight, start.granularity))
        scaled = weight.detach() / self.scale
        self.register_buffer("base", torch.floor(scaled))
        fraction = scaled - self.base
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1))

    def soft(self) -> Tensor:
        """h, float32 in [0, 1], the weight's shape."""
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self) -> Tensor:
        """The softly rounded weight, float32."""
        codes = (self.base + self.soft() + self.zero_point).clamp(self.grid.qmin, self.grid.qmax)
        return (codes - self.zero_point) * self.scale

    def hard_codes(self) -> Tensor:
        """The codes with each rounding decided by the sign of alpha, dtype `grid.dtype`."""
        codes = (self.base + (self.alpha >= 0) + self.zero_point).clamp(self.grid.qmin, self.grid.qmax)
        return codes.detach().to(self.grid.dtype)

    def regularizer(self, beta: float) -> Tensor:
        """sum over the weights of 1 - |2h - 1|^beta, which pulls each h to 0 or 1; a scalar."""
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).sum()

    def settled(self) -> float:
        """Share of the roundings that have reached 0 or 1."""
        soft = self.soft().detach()
        return float(((soft == 0) | (soft == 1)).float().mean())


def learned_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """LSQ: per-tensor fake quantization that passes gradients to the values and to the scale.

    Rounding passes gradients through; the scale's gradient is multiplied by 1 / sqrt(numel * qmax). Source: Esser et
    al., "Learned Step Size Quantization", ICLR 2020, eq. 1 to 5.

    Args:
        x: float32, any shape.
        scale: float32 parameter, ().
        zero_point: int32, ().
        grid: the codes.

    Returns:
        float32, the shape of `x`; equal to `numerics.affine.fake_quantize` but for the last digit of the scale.
    """
    factor = (x.numel() * grid.qmax) ** -0.5
    scale = (scale - scale * factor).detach() + scale * factor
    codes = (_round(x / scale) + zero_point).clamp(grid.qmin, grid.qmax)
    return (codes - zero_point) * scale


def _round(x: Tensor) -> Tensor:
    """Round to nearest; the gradient passes straight through."""
    return (torch.round(x) - x).detach() + x
