"""Quantizer modules: what stands in the simulated network where the plan says so."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from calibquant.errors import QuantizationError, unknown
from calibquant.numerics.affine import QTensor, affine_from_range, fake_quantize
from calibquant.numerics.grid import Grid, PerChannel
from calibquant.numerics.levels import nearest_levels
from calibquant.quantization.latent import LatentWeight, LearnedEnds, RangedWeight
from calibquant.quantization.learning import SoftRounding, kept_values, learned_fake_quantize, rounding_of
from calibquant.quantization.plan import TensorPlan


class WeightQuantizer(nn.Module):
    """Puts a parameter's codes in place of its float values. Holds a QTensor once calibrated.

    Args:
        name: the parameter's name.
        plan: its grid.
    """

    def __init__(self, name: str, plan: TensorPlan) -> None:
        super().__init__()
        self.name, self.plan, self.enabled = name, plan, True
        self.grid = plan.grid
        self.rounding: SoftRounding | LatentWeight | None = None
        self.codes: Tensor | None
        self.scale: Tensor
        self.zero_point: Tensor
        self.channel_bits: Tensor | None
        self.levels: Tensor | None
        for buffer in ("codes", "scale", "zero_point", "channel_bits", "levels"):
            self.register_buffer(buffer, None)

    @property
    def mean_bits(self) -> float:
        """Bits of a code, on average over the channels; as planned until channels have their own."""
        return mean_bits(self.plan, self.channel_bits)

    def set(self, value: QTensor) -> None:
        """Take new codes, scale and zero point, and their grid."""
        self.codes, self.scale, self.zero_point = value.codes, value.scale, value.zero_point
        self.grid, self.channel_bits, self.levels = value.grid, value.channel_bits, value.levels

    def get(self) -> QTensor:
        """The codes and what they mean.

        Raises:
            QuantizationError: not calibrated yet.
        """
        if self.codes is None:
            raise QuantizationError(self.name, "is not calibrated", "call calibrate first")
        return QTensor(
            self.codes, self.scale, self.zero_point, self.grid, self.plan.granularity, self.channel_bits, self.levels
        )

    def forward(self, weight: Tensor) -> Tensor:
        """The dequantized codes, float32, the shape of `weight`; `weight` itself when disabled.

        While its rounding is learned, the softly rounded weight; while it is trained, the rounded latent one.
        """
        if not self.enabled:
            return weight
        return self.get().dequantize() if self.rounding is None else self.rounding()

    def start_learning(self, weight: Tensor, decided: bool = False) -> SoftRounding:
        """From now on the rounding of `weight` is learned: a soft one, or one that is always decided."""
        self.rounding = rounding = rounding_of(weight, self.get(), decided)
        return rounding

    def start_training(self, weight: Tensor, kind: str, relative: bool = False) -> LatentWeight:
        """From now on the float `weight` is trained, and its scale with it ("lsq") or after its range ("arq").

        Raises:
            QuantizationError: "arq" on a grid that is not uniform, or whose channels share bits.
        """
        start = self.get()
        if kind == "lsq":
            self.rounding = latent = LatentWeight(weight, start, relative)
            return latent
        if kind != "arq":
            raise unknown("finetune.weights", kind, ("lsq", "arq"))
        if start.levels is not None or start.channel_bits is not None:
            problem = "has levels of its own, or channels of different bits, which arq does not know"
            raise QuantizationError(self.name, problem, "set finetune.weights=lsq")
        self.rounding = latent = RangedWeight(weight, start, self.plan.symmetric, relative)
        return latent

    def stop_learning(self) -> None:
        """Take the learned roundings, each decided, as codes, and the scale if it was learned."""
        if self.rounding is not None:
            learned, self.rounding = self.current(), None
            self.set(learned)

    def current(self) -> QTensor:
        """What `stop_learning` would leave; what is set, while nothing is learned."""
        return self.get() if self.rounding is None else self.rounding.hard()

    def current_grid(self) -> QTensor:
        """As `current`, but the codes may be those from before learning, which costs nothing."""
        value = self.get()
        return value if self.rounding is None else replace(value, scale=self.rounding.hard_scale())


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to its grid.

    Args:
        name: of the node whose output it quantizes.
        plan: its grid.
        dynamic: take the min-max range of every batch instead of a stored one.
    """

    def __init__(self, name: str, plan: TensorPlan, dynamic: bool = False) -> None:
        super().__init__()
        self.name, self.plan, self.dynamic, self.enabled = name, plan, dynamic, True
        self.learned_scale: nn.Parameter | None = None  # the scale, or the logarithm of its change
        self.relative = self.by_image = False
        self.learned_zero_point: nn.Parameter | None = None
        self.ends: LearnedEnds | None = None  # in place of both
        self.drop = 0.0  # share of the values that pass unquantized while reconstructing (QDrop)
        self.scale: Tensor | None
        self.zero_point: Tensor
        self.channel_bits: Tensor | None
        self.levels: Tensor | None
        for buffer in ("scale", "zero_point", "channel_bits", "levels"):
            self.register_buffer(buffer, None)

    @property
    def per_channel(self) -> bool:
        """Whether each channel has its own scale, which exists in simulation only."""
        return isinstance(self.plan.granularity, PerChannel)

    @property
    def mean_bits(self) -> float:
        """Bits of a code, on average over the channels; as planned until channels have their own."""
        return mean_bits(self.plan, self.channel_bits)

    def set_range(
        self, low: Tensor, high: Tensor, channel_bits: Tensor | None = None, levels: Tensor | None = None
    ) -> None:
        """Take the scale and zero point of a clipping range, float, () or (C,), and how codes are limited.

        Args:
            low, high: the range.
            channel_bits: int32 (C,), where channels share bits.
            levels: uint8 (n,), ascending, where codes are few of the grid's.
        """
        self.scale, self.zero_point = activation_affine(low, high, self.plan, channel_bits)
        self.channel_bits, self.levels = channel_bits, levels

    def get(self) -> tuple[Tensor, Tensor]:
        """The stored scale and zero point.

        Raises:
            QuantizationError: not calibrated yet.
        """
        if self.scale is None:
            raise QuantizationError(self.name, "is not calibrated", "call calibrate first")
        return self.scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid, float32, the same shape; `x` itself when disabled.

        Raises:
            QuantizationError: not calibrated yet.
        """
        if not self.enabled:
            return x
        if self.ends is not None:
            quantized: Tensor = self.ends(x)
            return quantized
        scale, zero_point = activation_affine(*torch.aminmax(x.detach()), self.plan) if self.dynamic else self.get()
        if self.learned_scale is not None:
            scale = self.current_scale()
        if self.learned_zero_point is not None:
            self.learned_zero_point.data.clamp_(self.plan.grid.qmin, self.plan.grid.qmax)
            zero_point = self.learned_zero_point
        if self.per_channel:
            grid, granularity = self.plan.grid, self.plan.granularity
            return fake_quantize(x, scale, zero_point, grid, granularity, self.channel_bits)
        if self.drop or x.requires_grad or scale.requires_grad:
            kept = kept_values(x, self.drop) if self.drop else None
            values = x[0].numel() if self.by_image else None
            return learned_fake_quantize(x, scale, zero_point, self.plan.grid, kept, values, self.levels)
        table = None if self.levels is None else nearest_levels(self.levels)
        return fake_quantize(x, scale, zero_point, self.plan.grid, self.plan.granularity, table=table)

    def current_scale(self) -> Tensor:
        """The stored scale, or while it is learned what it has become; float32, ().

        Raises:
            QuantizationError: not calibrated yet.
        """
        if self.ends is not None:
            return self.ends.affine()[0]
        if self.learned_scale is None:
            return self.get()[0]
        if self.relative:
            return self.get()[0] * self.learned_scale.exp()
        self.learned_scale.data.copy_(_positive(self.learned_scale.data))
        return self.learned_scale

    def start_learning(self, relative: bool = False, by_image: bool = False) -> nn.Parameter:
        """From now on the scale is learned (LSQ): as it is, or as the logarithm of its change.

        Args:
            relative: as the logarithm of its change.
            by_image: its gradient's factor counts the values of an image, and not of the batch, which may be a part.

        Raises:
            QuantizationError: there is one for each channel.
        """
        scale, self.relative, self.by_image = self._only_range()[0], relative, by_image
        self.learned_scale = nn.Parameter(torch.zeros_like(scale) if relative else scale.clone())
        return self.learned_scale

    def start_learning_ends(self, kind: str, relative: bool = False) -> list[nn.Parameter]:
        """From now on the ends of the range are learned, "ulq" or "pact"; what moves. See `latent.LearnedEnds`.

        Raises:
            QuantizationError: there is a range for each channel, or there are levels.
        """
        if kind not in ("pact", "ulq"):
            raise unknown("finetune.activations", kind, ("pact", "ulq"))
        self._refuse_levels(f"finetune.activations={kind}")
        self.ends = LearnedEnds(*self._only_range(), self.plan, kind, relative)
        return self.ends.parameters_learned()

    def _refuse_levels(self, what: str) -> None:
        if self.plan.levels is not None:
            raise QuantizationError(self.name, f"has levels of its own, which {what} would move", "use lsq or fixed")

    def _only_range(self) -> tuple[Tensor, Tensor]:
        if self.per_channel:
            raise QuantizationError(self.name, "has a scale for each channel", "learn scales per tensor only")
        return self.get()

    def start_learning_zero_point(self) -> nn.Parameter:
        """From now on the zero point is learned too (LSQ+); it stays on the grid, so zero stays exact.

        Raises:
            QuantizationError: there are levels.
        """
        self._refuse_levels("finetune.activations=lsq+")
        self.learned_zero_point = nn.Parameter(self.get()[1].float())
        return self.learned_zero_point

    def stop_learning(self) -> None:
        """Take what was learned, and drop nothing any more."""
        self.drop = 0.0
        if self.scale is not None:
            self.scale, self.zero_point = self.current()
        self.learned_scale = self.learned_zero_point = self.ends = None

    def current(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point that `stop_learning` would leave."""
        if self.ends is not None:
            return self.ends.current()
        scale, zero_point = self.current_scale().detach().clone(), self.zero_point
        if self.learned_zero_point is not None:
            rounded = self.learned_zero_point.detach().round().clamp(self.plan.grid.qmin, self.plan.grid.qmax)
            zero_point = rounded.to(torch.int32)
        return scale, zero_point


def _positive(scale: Tensor) -> Tensor:
    """An optimizer may step over zero; the reference code reflects such a scale."""
    return scale.abs().clamp(min=torch.finfo(torch.float32).eps)


def activation_affine(
    low: Tensor, high: Tensor, plan: TensorPlan, channel_bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an activation range, each () or (C,).

    A symmetric plan decides the sign from the data: without negative values the whole grid serves [0, high]. A channel
    of 0 bits, whose values all become 0, has scale 1 and zero point 0.
    """
    if low.dim() == 0:
        return affine_from_range(low, high, plan.grid, plan.symmetric and bool(low < 0))
    bits = [plan.grid.bits] * len(low) if channel_bits is None else channel_bits.tolist()
    pairs = [
        affine_from_range(a, b, Grid(own), plan.symmetric and bool(a < 0))
        if own
        else (torch.ones(()), torch.zeros((), dtype=torch.int32))
        for a, b, own in zip(low, high, bits, strict=True)
    ]
    return torch.stack([scale for scale, _ in pairs]), torch.stack([zero_point for _, zero_point in pairs])


def mean_bits(plan: TensorPlan, channel_bits: Tensor | None) -> float:
    """Average bits of a tensor's channels, which have equally many values; the plan's where they do not differ."""
    return plan.bits if channel_bits is None else float(channel_bits.double().mean())
