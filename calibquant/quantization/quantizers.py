"""Quantizer modules: what stands in the simulated network where the plan says so."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibquant.errors import QuantizationError
from calibquant.numerics.affine import QTensor, affine_from_range, fake_quantize
from calibquant.quantization.learning import SoftRounding, kept_values, learned_fake_quantize
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
        self.rounding: SoftRounding | None = None
        self.codes: Tensor | None
        self.scale: Tensor
        self.zero_point: Tensor
        for buffer in ("codes", "scale", "zero_point"):
            self.register_buffer(buffer, None)

    def set(self, value: QTensor) -> None:
        """Take new codes, scale and zero point."""
        self.codes, self.scale, self.zero_point = value.codes, value.scale, value.zero_point

    def get(self) -> QTensor:
        """The codes and what they mean.

        Raises:
            QuantizationError: not calibrated yet.
        """
        if self.codes is None:
            raise QuantizationError(self.name, "is not calibrated", "call calibrate first")
        return QTensor(self.codes, self.scale, self.zero_point, self.plan.grid, self.plan.granularity)

    def forward(self, weight: Tensor) -> Tensor:
        """The dequantized codes, float32, the shape of `weight`; `weight` itself when disabled.

        While its rounding is learned, the softly rounded weight.
        """
        if not self.enabled:
            return weight
        return self.get().dequantize() if self.rounding is None else self.rounding()

    def start_learning(self, weight: Tensor) -> SoftRounding:
        """From now on the rounding of `weight` is learned."""
        self.rounding = SoftRounding(weight, self.get())
        return self.rounding

    def stop_learning(self) -> None:
        """Take the learned roundings, each decided, as codes."""
        if self.rounding is not None:
            self.codes, self.rounding = self.rounding.hard_codes(), None


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
        self.learned_scale: nn.Parameter | None = None
        self.learned_zero_point: nn.Parameter | None = None
        self.drop = 0.0  # share of the values that pass unquantized while reconstructing (QDrop)
        self.scale: Tensor | None
        self.zero_point: Tensor
        for buffer in ("scale", "zero_point"):
            self.register_buffer(buffer, None)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the scale and zero point of a clipping range, float, shape ()."""
        self.scale, self.zero_point = activation_affine(low, high, self.plan)

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
        scale, zero_point = activation_affine(*torch.aminmax(x.detach()), self.plan) if self.dynamic else self.get()
        if self.learned_scale is not None:
            self.learned_scale.data.copy_(_positive(self.learned_scale.data))
            scale = self.learned_scale
        if self.learned_zero_point is not None:
            self.learned_zero_point.data.clamp_(self.plan.grid.qmin, self.plan.grid.qmax)
            zero_point = self.learned_zero_point
        if self.drop or x.requires_grad or scale.requires_grad:
            kept = kept_values(x, self.drop) if self.drop else None
            return learned_fake_quantize(x, scale, zero_point, self.plan.grid, kept)
        return fake_quantize(x, scale, zero_point, self.plan.grid, self.plan.granularity)

    def start_learning(self) -> nn.Parameter:
        """From now on the scale is learned (LSQ)."""
        self.learned_scale = nn.Parameter(self.get()[0].clone())
        return self.learned_scale

    def start_learning_zero_point(self) -> nn.Parameter:
        """From now on the zero point is learned too (LSQ+); it stays on the grid, so zero stays exact."""
        self.learned_zero_point = nn.Parameter(self.get()[1].float())
        return self.learned_zero_point

    def stop_learning(self) -> None:
        """Take what was learned, and drop nothing any more."""
        self.drop = 0.0
        if self.learned_scale is not None:
            self.scale, self.learned_scale = _positive(self.learned_scale.detach()), None
        if self.learned_zero_point is not None:
            zero_point = self.learned_zero_point.detach().round().clamp(self.plan.grid.qmin, self.plan.grid.qmax)
            self.zero_point, self.learned_zero_point = zero_point.to(torch.int32), None


def _positive(scale: Tensor) -> Tensor:
    """An optimizer may step over zero; the reference code reflects such a scale."""
    return scale.abs().clamp(min=torch.finfo(torch.float32).eps)


def activation_affine(low: Tensor, high: Tensor, plan: TensorPlan) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an activation range.

    A symmetric plan decides the sign from the data: without negative values the whole grid serves [0, high].
    """
    symmetric = plan.symmetric and bool((low < 0).any())
    return affine_from_range(low, high, plan.grid, symmetric)
