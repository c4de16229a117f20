"""What reconstruction learns: roundings and scales of weights (AdaRound, Genie), scales of activations (LSQ)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calibquant.numerics.affine import QTensor, aligned, code_limits
from calibquant.numerics.grid import Grid
from calibquant.numerics.levels import levels_at, nearest_levels, on_levels, places_of

ZETA, GAMMA = 1.1, -0.1  # how far the hard sigmoid is stretched, so that it reaches 0 and 1
BEGIN = 0.02, 0.98  # where a rounding begins that is not to the nearest code: never at 0.5, where it would be undecided


class SoftRounding(nn.Module):
    """AdaRound: each weight is rounded down or up, by a variable between the two that is learned.

    value = scale * (clamp(floor(w / scale) + h + zero_point, qmin, qmax) - zero_point),
    h = clamp(sigmoid(alpha) * (zeta - gamma) + gamma, 0, 1). At first h is the fractional part of w / scale, so that
    the value is the float weight (clipped). Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
    Quantization", ICML 2020, eq. 23 to 25; the asymmetric form as in BRECQ and QDrop.

    A weight whose code is not the nearest one begins halfway between itself, or the next value that its two roundings
    can reach, and that code; so it is rounded to the code unless learning says otherwise. The two roundings
    are then the code and its neighbour on the weight's side.

    The scales can be learned beside the roundings, each as the logarithm of its change; the float weight divided by
    the scale keeps its integer part, so that both do not pull at one value (Genie: Jeon et al., "GENIE: Show Me the
    Data for Quantization", CVPR 2023, section 4.2).

    Args:
        weight: float32, any shape.
        start: its codes, whose zero point and grid are kept, with the bits of each channel; and its scale.
    """

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        super().__init__()
        self.start = start
        self.grid, self.granularity = start.grid, start.granularity
        self.limits: tuple[Any, Any] = (start.grid.qmin, start.grid.qmax)  # numbers, or tensors along the channels
        if start.channel_bits is not None:
            low, high = code_limits(start.channel_bits, start.grid.signed)
            self.limits = (aligned(low, weight, start.granularity), aligned(high, weight, start.granularity))
        self.base: Tensor
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", aligned(start.scale, weight, start.granularity))
        self.register_buffer("zero_point", aligned(start.zero_point, weight, start.granularity))
        scaled = weight.detach() / self.scale
        base = torch.floor(scaled)
        fraction = scaled - base
        chosen = start.codes.to(base.dtype) - self.zero_point
        nearest = torch.clamp(torch.round(scaled) + self.zero_point, *self.limits) == start.codes
        shifted = torch.where(scaled < chosen, chosen - 1, chosen)
        halfway = ((scaled - shifted).clamp(*BEGIN) + (chosen - shifted)) / 2
        self.register_buffer("base", torch.where(nearest, base, shifted))
        fraction = torch.where(nearest, fraction, halfway)
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1))
        self.log_change = nn.Parameter(torch.zeros_like(self.scale), requires_grad=False)

    def learn_scale(self) -> nn.Parameter:
        """From now on the scale is learned too: the logarithm of its change, aligned with the weight."""
        self.log_change.requires_grad_()
        return self.log_change

    def soft(self) -> Tensor:
        """h, float32 in [0, 1], the weight's shape."""
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self) -> Tensor:
        """The softly rounded weight, float32."""
        codes = torch.clamp(self.base + self.soft() + self.zero_point, *self.limits)
        scale = self.scale * self.log_change.exp() if self.log_change.requires_grad else self.scale
        return (codes - self.zero_point) * scale

    def hard(self) -> QTensor:
        """The codes with each rounding decided by the sign of alpha, and the learned scale."""
        codes = torch.clamp(self.base + (self.alpha >= 0) + self.zero_point, *self.limits)
        return replace(self.start, codes=codes.detach().to(self.grid.dtype), scale=self.hard_scale())

    def hard_scale(self) -> Tensor:
        """The scale as it is now, without a gradient, () or (C,)."""
        scale = self.start.scale
        if not self.log_change.requires_grad:
            return scale
        return scale * self.log_change.detach().exp().reshape(scale.shape)

    def regularizer(self, beta: float) -> Tensor:
        """sum over the weights of 1 - |2h - 1|^beta, which pulls each h to 0 or 1; a scalar."""
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).sum()

    def settled(self) -> float:
        """Share of the roundings that have reached 0 or 1."""
        soft = self.soft().detach()
        return float(((soft == 0) | (soft == 1)).float().mean())


class DecidedRounding(SoftRounding):
    """A rounding that is always decided: forward h is 0 or 1, backward the gradient is that of sigmoid(alpha).

    A network learns with the weights that it will run with, so nothing is left to settle. The straight-through
    estimator of Bengio et al., 2013, upon AdaRound's variable.
    """

    def soft(self) -> Tensor:
        """h, 0 or 1, the weight's shape."""
        return decided(torch.sigmoid(self.alpha))


class LevelRounding(SoftRounding):
    """The same between two neighbouring levels: value = scale * (low + h * (high - low)).

    The two are the code and its neighbour on the weight's side; at first the value is the float weight, if its code is
    the nearest level and it lies between the outermost ones.

    Args:
        weight: float32, any shape.
        start: its codes, whose levels are kept, and its scale.
    """

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        nn.Module.__init__(self)
        assert start.levels is not None
        self.start, self.grid, self.granularity = start, start.grid, start.granularity
        scale = aligned(start.scale, weight, start.granularity)
        scaled, chosen = weight.detach() / scale, start.codes.to(weight.dtype)
        count = start.levels.shape[-1]
        place = places_of(start.codes, start.levels, start.granularity)
        first = torch.where(scaled >= chosen, place, place - 1).clamp(0, count - 2)
        low, high = (levels_at(first + k, start.levels, start.granularity).to(weight.dtype) for k in (0, 1))
        gap = (high - low).clamp(min=1.0)  # equal levels fill up where a channel has fewer
        fraction = ((scaled - low) / gap).clamp(*BEGIN)
        nearest = on_levels(scaled, start.levels, start.granularity) == chosen
        halfway = (fraction + (chosen > low).to(fraction)) / 2
        fraction = torch.where(nearest, fraction, halfway)
        self.register_buffer("scale", scale)
        self.register_buffer("base", low)
        self.register_buffer("gap", high - low)
        self.gap: Tensor
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1))
        self.log_change = nn.Parameter(torch.zeros_like(scale), requires_grad=False)

    def forward(self) -> Tensor:
        scale = self.scale * self.log_change.exp() if self.log_change.requires_grad else self.scale
        return (self.base + self.soft() * self.gap) * scale

    def hard(self) -> QTensor:
        codes = self.base + (self.alpha >= 0) * self.gap
        return replace(self.start, codes=codes.detach().to(self.grid.dtype), scale=self.hard_scale())


class DecidedLevelRounding(LevelRounding):
    """As `DecidedRounding`, between levels."""

    def soft(self) -> Tensor:
        """h, 0 or 1, the weight's shape."""
        return decided(torch.sigmoid(self.alpha))


def rounding_of(weight: Tensor, start: QTensor, always_decided: bool = False) -> SoftRounding:
    """What learns a weight's rounding from where it stands."""
    if start.levels is None:
        return (DecidedRounding if always_decided else SoftRounding)(weight, start)
    return (DecidedLevelRounding if always_decided else LevelRounding)(weight, start)


def decided(share: Tensor) -> Tensor:
    """1 where `share` is at least one half and else 0; gradients pass through."""
    return share + ((share >= 0.5).to(share.dtype) - share).detach()


def learned_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    kept: Tensor | None = None,
    values: int | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """LSQ and LSQ+: per-tensor fake quantization that passes gradients to the values, the scale and the zero point.

    q = (clamp(round(x / scale) + round(zero_point), qmin, qmax) - round(zero_point)) * scale. Rounding passes gradients
    through; those of scale and zero point are multiplied by 1 / sqrt(values * qmax). Sources: Esser et al., "Learned
    Step Size Quantization", ICLR 2020, eq. 1 to 5; Bhalgat et al., "LSQ+", CVPRW 2020.

    Args:
        x: float32, any shape.
        scale: float32 parameter, ().
        zero_point: int32, or float32 parameter where it is learned, ().
        grid: the codes.
        kept: float32, the shape of `x`: 1 where the value is quantized, 0 where it passes as it is; None quantizes all.
        values: of which gradients are made; None: all of `x`, as QDrop's code counts; LSQ counts those of one image.
        levels: uint8 (n,), ascending: codes are rounded on to the nearest of these, which passes gradients through too;
            clipped is what lies beyond the outermost, and their number takes the place of qmax.

    Returns:
        float32, the shape of `x`; where kept, equal to `numerics.affine.fake_quantize` bit for bit.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, grid, kept, values or x.numel(), levels)
    return result


def kept_values(x: Tensor, drop: float) -> Tensor:
    """QDrop: 0 for a random share `drop` of the values and 1 for the others; float32, the shape of `x`.

    The share is met to the nearest 1/256: one random byte decides a value, which costs a quarter of a random float.
    """
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int32, device=x.device).random_(-(2**31), None)
    values = words.view(torch.uint8)[: x.numel()].view(x.shape).to(x.dtype)
    return values.ge_(min(255, round(drop * 256)))


class _FakeQuantize(torch.autograd.Function):
    """One pass forward that leaves what backward needs: autograd's own chain of ten ops reads memory twice as often."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        grid: Grid,
        kept: Tensor | None,
        values: int,
        levels: Tensor | None,
    ) -> Tensor:
        zero_point = torch.round(zero_point)
        steps = x / scale
        codes = torch.round(steps).add_(zero_point)
        low, high = (grid.qmin, grid.qmax) if levels is None else (int(levels[0]), int(levels[-1]))
        clipped = codes.clamp(low, high)
        inside = codes.eq_(clipped)
        if levels is not None:
            clipped = nearest_levels(levels).to(clipped.dtype)[clipped.long()]
        centered = clipped.sub_(zero_point)
        quantized = centered * scale
        by_scale = centered.addcmul_(steps, inside, value=-1)
        if kept is not None:
            quantized = torch.lerp(x, quantized, kept)
            by_scale.mul_(kept)
            inside.sub_(1).mul_(kept).add_(1)
        ctx.save_for_backward(by_scale, inside, scale)
        ctx.factor = (values * (grid.qmax if levels is None else len(levels) - 1)) ** -0.5
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        by_scale, passing, scale = ctx.saved_tensors
        of_scale = of_zero_point = None
        if ctx.needs_input_grad[1]:
            of_scale = (gradient * by_scale).sum() * ctx.factor
        if ctx.needs_input_grad[2]:  # a clipped value moves by -scale with each step of the zero point
            of_zero_point = (gradient * (passing - 1)).sum() * scale * ctx.factor
        of_x = gradient * passing if ctx.needs_input_grad[0] else None
        return of_x, of_scale, of_zero_point, None, None, None, None
