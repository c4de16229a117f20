"""What quantization-aware training learns: float weights behind their codes, and the ends of activation ranges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calibquant.numerics.affine import MIN_SCALE, QTensor, affine_from_range, aligned, code_limits, fake_quantize
from calibquant.numerics.amct import arq_range
from calibquant.numerics.grid import PerTensor
from calibquant.numerics.levels import on_levels
from calibquant.quantization.learning import learned_fake_quantize
from calibquant.quantization.plan import TensorPlan

KEPT = 0.25  # of a step: how far from its code a weight begins that reconstruction did not round to nearest


class _StraightThrough(torch.autograd.Function):
    """The second tensor, with the gradient going to the first (Bengio et al., arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, of the shape of `x`, which receives the gradient as if it were `value`."""
    result: Tensor = _StraightThrough.apply(x, value)
    return result


class LatentWeight(nn.Module):
    """LSQ: a float weight that is trained and rounded to its grid in every forward pass; so is its scale.

    c = clamp(w / scale + zero_point, qmin, qmax), value = (nearest(c) - zero_point) * scale; the rounding passes
    gradients through. On a grid that is not uniform c lies between the outermost levels, and nearest(c) is a level.
    A weight whose nearest code is its own keeps its float value; another begins a quarter of a step from its code, on
    its own side (on levels: at its code), so that what reconstruction found is where training begins.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020.

    Args:
        weight: float32, any shape.
        start: its codes, whose zero point and grid are kept, and its scale.
        relative: for optimizers of Adam's kind, which move all parameters by about the same: whether these are the
            weight in steps of the grid (on levels: in mean distances between them) and the logarithm of the scale's
            change; otherwise they are weight and scale, whose gradient is divided by
            sqrt(values of a scale * half the grid's steps).
    """

    def __init__(self, weight: Tensor, start: QTensor, relative: bool = False) -> None:
        super().__init__()
        self.start, self.relative = start, relative
        scale = aligned(start.scale, weight, start.granularity)
        self.first_scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("first_scale", scale.clone())
        self.register_buffer("zero_point", aligned(start.zero_point, weight, start.granularity))
        self.limits = self._limits(weight)
        self.learned_scale = nn.Parameter(torch.zeros_like(scale) if relative else scale.clone())
        self.gradient_factor = (weight.numel() / scale.numel() * start.grid.steps / 2) ** -0.5
        self.unit: Tensor
        self.register_buffer("unit", self._step() if relative else torch.ones_like(scale))
        self.latent = nn.Parameter(self._begin(weight.detach() / self.unit))

    @property
    def weight(self) -> Tensor:
        """The float weight behind the codes."""
        return self.latent * self.unit

    def _step(self) -> Tensor:
        low, high = self.limits
        levels = self.start.levels
        return self.first_scale if levels is None else self.first_scale * (high - low) / (levels.shape[-1] - 1)

    def _limits(self, weight: Tensor) -> tuple[Any, Any]:
        start = self.start
        if start.levels is not None:
            low, high = start.levels.float().amin(-1), start.levels.float().amax(-1)
            return aligned(low, weight, start.granularity), aligned(high, weight, start.granularity)
        if start.channel_bits is None:
            return start.grid.qmin, start.grid.qmax
        low, high = code_limits(start.channel_bits, start.grid.signed)
        return aligned(low, weight, start.granularity), aligned(high, weight, start.granularity)

    def _begin(self, latent: Tensor) -> Tensor:
        weight, codes = latent * self.unit, self.start.codes.float()
        kept = 0.0 if self.start.levels is not None else KEPT
        steps = weight / self.first_scale + self.zero_point
        pulled = steps.clamp(codes - kept, codes + kept)
        own = self._nearest(weight, self.first_scale, self.zero_point) == codes
        return torch.where(own, latent, (pulled - self.zero_point) * (self.first_scale / self.unit))

    def _nearest(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes of a weight, as float32."""
        if self.start.levels is not None:
            return on_levels(weight / scale, self.start.levels, self.start.granularity)
        return (torch.round(weight / scale) + zero_point).clamp(*self.limits)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they are now, aligned with the weight; gradients go to the parameter."""
        if self.relative:
            return self.first_scale * self.learned_scale.exp(), self.zero_point
        self.learned_scale.data.abs_().clamp_(min=MIN_SCALE)  # an optimizer may step over zero
        part = self.learned_scale * self.gradient_factor
        return self.learned_scale.detach() + (part - part.detach()), self.zero_point

    def forward(self) -> Tensor:
        """The weight on its grid, float32, equal to `hard().dequantize()` bit for bit."""
        scale, zero_point = self.affine()
        weight = self.weight
        within = (weight / scale + zero_point).clamp(*self.limits)
        codes = straight_through(within, self._nearest(weight.detach(), scale.detach(), zero_point))
        return (codes - zero_point) * scale

    def hard(self) -> QTensor:
        """Codes, scale and zero point as they are now."""
        scale, zero_point = (value.detach() for value in self.affine())
        codes, shape = self._nearest(self.weight.detach(), scale, zero_point), self.start.scale.shape
        return replace(
            self.start,
            codes=codes.to(self.start.codes.dtype),
            scale=scale.reshape(shape).clone(),
            zero_point=zero_point.reshape(shape).clone(),
        )

    def hard_scale(self) -> Tensor:
        """The scale as it is now, without a gradient, () or (C,)."""
        return self.affine()[0].detach().reshape(self.start.scale.shape)


class RangedWeight(LatentWeight):
    """ARQ: as `LatentWeight`, with the scale of each forward pass from the range of the weight.

    The range is symmetric if the plan is; gradients pass through the rounding alone. Source: AMCT's retraining; see
    `numerics.amct.arq_range`.

    Args:
        weight: float32, any shape.
        start: its codes; of a uniform grid with the same bits in all channels.
        symmetric: of the range.
        relative: whether the parameter is the weight in steps of the grid.
    """

    def __init__(self, weight: Tensor, start: QTensor, symmetric: bool, relative: bool = False) -> None:
        super().__init__(weight, start, relative)
        self.symmetric = symmetric
        self.learned_scale.requires_grad_(False)

    def affine(self) -> tuple[Tensor, Tensor]:
        start, weight = self.start, self.weight.detach()
        low, high = arq_range(weight, start.grid, self.symmetric, start.granularity)
        scale, zero_point = affine_from_range(low, high, start.grid, self.symmetric)
        return aligned(scale, weight, start.granularity), aligned(zero_point, weight, start.granularity)


class LearnedEnds(nn.Module):
    """An activation whose smallest and largest value are learned.

    Scale and zero point follow from the ends as from any range. "ulq": the gradient of a value goes to both ends
    through scale and zero point, as AMCT's retraining does it. "pact": the value is clipped to the ends, which get the
    gradients of the values beyond them, and then rounded (Choi et al., "PACT", arXiv:1805.06085). An end that is 0 at
    first, as behind ReLU, stays 0, and the ends of a symmetric range stay opposite.

    Args:
        scale, zero_point: where they begin, ().
        plan: the grid.
        kind: "ulq" or "pact".
        relative: whether the parameters are logarithms of the ends' change.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, plan: TensorPlan, kind: str, relative: bool) -> None:
        super().__init__()
        self.grid, self.kind, self.relative = plan.grid, kind, relative
        self.mirrored = plan.symmetric and int(zero_point) > plan.grid.qmin
        if self.mirrored:
            high = scale * plan.grid.steps / 2
            low = -high
        else:
            low = (plan.grid.qmin - zero_point) * scale
            high = (plan.grid.qmax - zero_point) * scale
        self.first_low: Tensor
        self.first_high: Tensor
        self.register_buffer("first_low", low.float().clone())
        self.register_buffer("first_high", high.float().clone())
        self.low = nn.Parameter(torch.zeros_like(self.first_low) if relative else self.first_low.clone())
        self.high = nn.Parameter(torch.zeros_like(self.first_high) if relative else self.first_high.clone())
        self.low.requires_grad_(not self.mirrored and float(low) < 0)
        self.high.requires_grad_(float(high) > 0)

    def parameters_learned(self) -> list[nn.Parameter]:
        """Those that move."""
        return [p for p in (self.low, self.high) if p.requires_grad]

    def ends(self) -> tuple[Tensor, Tensor]:
        """Low and high, (), low <= 0 <= high."""
        if self.relative:
            high = self.first_high * self.high.exp()
            return (-high if self.mirrored else self.first_low * self.low.exp()), high
        self.low.data.clamp_(max=0.0)  # an optimizer may step over zero
        self.high.data.clamp_(min=0.0)
        return (-self.high if self.mirrored else self.low), self.high

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, (), float32, the zero point not yet rounded."""
        low, high = self.ends()
        scale = ((high - low) / self.grid.steps).clamp(min=MIN_SCALE)
        if self.mirrored:
            return scale, torch.full_like(scale.detach(), self.grid.qmin + (1 << (self.grid.bits - 1)))
        return scale, (self.grid.qmin - low / scale).clamp(self.grid.qmin, self.grid.qmax)

    def current(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they are now, float32 and int32."""
        scale, zero_point = self.affine()
        return scale.detach().clone(), torch.round(zero_point.detach()).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid, float32, the same shape."""
        scale, zero_point = self.affine()
        if self.kind == "ulq":
            return learned_fake_quantize(x, scale, zero_point, self.grid, values=x[0].numel())
        low, high = self.ends()
        clipped = torch.minimum(torch.maximum(x, low), high)  # the grid's own ends may lie half a step beside these
        scale, zero_point = scale.detach(), torch.round(zero_point.detach())
        return straight_through(clipped, fake_quantize(x.detach(), scale, zero_point, self.grid, PerTensor()))
