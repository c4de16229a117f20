"""Biases as integer kernels add them: int32, on the scale of the accumulator.

That scale is input scale * weight scale, which at low bits is coarse: with 2-bit weights a bias would be -1, 0 or 1. So
kernels are given low-bit weights as codes times a power of two, and the scale divided by it: products are the same, no
stored bit is added, and the bias is finer by that power.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from calibquant.numerics.affine import QTensor, aligned
from calibquant.numerics.grid import PerChannel
from calibquant.numerics.levels import on_levels
from calibquant.quantization.quantizers import ActivationQuantizer, WeightQuantizer

INT32 = 2**31 - 1
MARGIN = 1 + 1e-6  # above the smallest scale that fits, for float32's rounding
EMPTY_SHIFT = 12  # of a channel without bits: its scale 1 alone would round its bias to whole input scales


def kernel_shift(bits: int) -> int:
    """By how many bits a kernel's weights are shifted: as many as keep 2 * 255 * |weight| within int16.

    (2^bits - 1) * 2^shift <= 64 for any zero point, so that on x86 without VNNI, where two products are summed in
    int16, nothing saturates: 4 for 2 bits, 3 for 3, 2 for 4, 1 for 5, none from 6 bits on.
    """
    return max(0, 6 - bits)


class BiasDelta(nn.Module):
    """Adds to a product's bias what corrections of its quantized weight and input found, while its weight is quantized.

    Args:
        weight: quantizer of the product's weight.
    """

    def __init__(self, weight: WeightQuantizer) -> None:
        super().__init__()
        self._quantizer = (weight,)  # in a tuple: it belongs to the network, not to the bias
        self.delta: Tensor | None
        self.register_buffer("delta", None)
        self.learned: nn.Parameter | None = None
        self._unit = 1.0

    def add(self, change: Tensor) -> None:
        """Add to what was found before; float, (C,)."""
        change = change.float()
        self.delta = change if self.delta is None else self.delta + change.to(self.delta.device)

    def forward(self, bias: Tensor) -> Tensor:
        """The corrected bias, float32 (C,); `bias` itself without a correction or while the weight is not quantized."""
        if not self._quantizer[0].enabled:
            return bias
        corrected = bias if self.delta is None else bias + self.delta
        return corrected if self.learned is None else corrected + self.learned * self._unit

    def start_learning(self, channels: int, unit: float, device: torch.device | str = "cpu") -> nn.Parameter:
        """From now on the correction is learned: what is added to it, in units, (channels,)."""
        self.learned, self._unit = nn.Parameter(torch.zeros(channels, device=device)), unit
        return self.learned

    def stop_learning(self) -> None:
        """Take what was learned."""
        self.delta, self.learned = self.current(), None

    def current(self) -> Tensor | None:
        """The correction as it is now, what is being learned included; (C,), or None without one."""
        if self.learned is None:
            return self.delta
        change = self.learned.detach() * self._unit
        return change if self.delta is None else self.delta + change


class BiasRounding(nn.Module):
    """Rounds a bias to the grid of its product's accumulator, whatever the scales become.

    Args:
        source: quantizer of the product's input.
        weight: quantizer of its weight.
    """

    def __init__(self, source: ActivationQuantizer, weight: WeightQuantizer) -> None:
        super().__init__()
        self._quantizers = (source, weight)  # in a tuple: they belong to the network, not to the bias

    def forward(self, bias: Tensor) -> Tensor:
        """The bias rounded to steps of `bias_step`, (C,); `bias` itself while either quantizer is off.

        A learned bias gets its gradient as if it were not rounded. The int32 codes are those of float32 also in a
        network that computes in float64.
        """
        source, weight = self._quantizers
        if not (source.enabled and weight.enabled) or source.scale is None or weight.codes is None:
            return bias
        step = bias_step(source.current_scale().detach(), weight.current_grid())
        rounded = torch.round(bias.float() / step.float()).to(step.dtype) * step
        return bias + (rounded - bias).detach() if bias.requires_grad else rounded


def kernel_scale(weight: QTensor) -> Tensor:
    """The scale of a weight's codes in a kernel, () or (C,): the weight's, divided by two to the kernel's shift.

    The shift is that of the widest channel, so it suits the others too. A channel without bits holds zeros, which
    stand for 0 on any scale; its scale only says how fine its bias is, and is divided by 2^12.
    """
    shift = kernel_shift(weight.grid.bits)
    if weight.channel_bits is None:
        return weight.scale * 2.0**-shift
    return weight.scale * torch.where(weight.channel_bits == 0, 2.0**-EMPTY_SHIFT, 2.0**-shift)


def bias_step(source: Tensor, weight: QTensor) -> Tensor:
    """Value of one step of a bias, () or (C,): input scale () * `kernel_scale`."""
    return source * kernel_scale(weight)


def scale_factors(weight: QTensor, bias: Tensor, source: ActivationQuantizer) -> Tensor:
    """By how much a channel's scale must grow so that no sum of products and bias passes int32; 1 where it fits.

    The sum is bounded by the sum of the codes' magnitudes times the largest distance of an input code from its zero
    point. (A larger scale makes codes and bias smaller; a channel of nearly zero weights has a scale so small that its
    bias does not fit.)

    Args:
        weight: of the product.
        bias: float32, (C,).
        source: quantizer of its input.

    Returns:
        float64, (C,), at least 1.
    """
    scale, zero_point = source.get()
    reach = max(source.plan.grid.qmax - int(zero_point), int(zero_point) - source.plan.grid.qmin)
    axis = weight.granularity.axis if isinstance(weight.granularity, PerChannel) else 0
    centered = weight.codes.to(torch.int64) - aligned(weight.zero_point, weight.codes, weight.granularity)
    most = centered.abs().movedim(axis, 0).reshape(len(bias), -1).sum(1).double() * reach
    room = INT32 - most * 2 ** kernel_shift(weight.grid.bits)
    steps = bias.double().abs() / (scale.double() * kernel_scale(weight).double())
    return (steps / room).clamp(min=1)


def with_larger_scale(weight: QTensor, factors: Tensor) -> QTensor:
    """A weight whose channels' scales are raised by at least `factors`, float64 (C,); codes are rounded to nearest."""
    factors = torch.where(factors > 1, factors * MARGIN, factors)
    if weight.scale.dim() == 0:
        factors = factors.max()
    scale = (weight.scale.double() * factors).float()
    ratio = aligned(weight.scale.double() / scale.double(), weight.codes, weight.granularity)
    zero = aligned(weight.zero_point, weight.codes, weight.granularity)
    wanted = (weight.codes.double() - zero) * ratio
    codes = torch.round(wanted) if weight.levels is None else on_levels(wanted, weight.levels, weight.granularity)
    return replace(weight, codes=(codes + zero).to(weight.codes.dtype), scale=scale)


def fit_biases(products: Mapping[str, tuple[ActivationQuantizer, WeightQuantizer, Tensor]]) -> dict[str, int]:
    """Raise weight scales where a bias would not fit int32; the weights' quantizers receive the result.

    Args:
        products: node name -> quantizers of its input and weight, and its bias, (C,) float32; see `QuantModel.biases`.

    Returns:
        node name -> channels whose scale was raised, where there are any.
    """
    raised: dict[str, int] = {}
    for node, (source, quantizer, bias) in products.items():
        factors = scale_factors(quantizer.get(), bias, source)
        if (factors > 1).any():
            quantizer.set(with_larger_scale(quantizer.get(), factors))
            raised[node] = int((factors > 1).sum())
    return raised
