"""Facts about single tensors: ranges, clipping, rounding error, density, outlier channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibquant.numerics.aciq import DensityFit, fit_densities
from calibquant.numerics.grid import PerChannel
from calibquant.numerics.histogram import Histogram
from calibquant.quantization import QuantModel
from calibquant.quantization.model import parameter_tensors
from calibquant.quantization.quantizers import ActivationQuantizer

OUTLIER = 8.0  # a channel whose range is so many times the median channel's stands out
CLIPPED = 0.5 + 1e-3  # a rounding error of more than half a step comes from clipping; the rest is float32's own


@dataclass(frozen=True, eq=False)
class TensorFacts:
    """One quantized tensor, by itself.

    Args:
        name: of the quantizer: a parameter, or the node whose output it is.
        kind: "weight" or "activation".
        bits: of its grid.
        count: values seen.
        low, high: of the float values.
        clipped: share of the values that lie outside of what the grid represents, by more than half a step; by more
            than half of the widest step, where levels are few.
        sqnr: power of the values over that of their quantization error, in dB; inf without error.
        spread: largest channel range over the median channel range; a range is max |x|.
        outliers: channels whose range is more than `OUTLIER` times the median's.
        density: Laplace and Gauss densities fitted to the values.
        histogram: of the values.
    """

    name: str
    kind: str
    bits: int
    count: int
    low: float
    high: float
    clipped: float
    sqnr: float
    spread: float
    outliers: tuple[int, ...]
    density: DensityFit
    histogram: Histogram


@dataclass
class _Tally:
    """Sums over what is seen of one tensor."""

    histogram: Histogram
    ranges: Tensor | None = None  # max |x| of each channel, float64
    power: float = 0.0
    noise: float = 0.0
    clipped: int = 0

    def add(self, x: Tensor, rounded: Tensor, step: Tensor, axis: int) -> None:
        """Take in values, what they are rounded to, and the grid's widest steps (broadcasting against them)."""
        error = (rounded - x).double()
        self.histogram = self.histogram.add(x)
        self.power += float(x.double().square().sum())
        self.noise += float(error.square().sum())
        self.clipped += int((error.abs() > CLIPPED * step).sum())
        ranges = x.detach().movedim(axis, 0).flatten(1).abs().amax(1).double().cpu()
        self.ranges = ranges if self.ranges is None else torch.maximum(self.ranges, ranges)

    def facts(self, name: str, kind: str, bits: int) -> TensorFacts:
        assert self.ranges is not None
        histogram, median = self.histogram, float(self.ranges.median())
        relative = self.ranges / median if median > 0 else torch.zeros_like(self.ranges)
        return TensorFacts(
            name, kind, bits, histogram.total, histogram.minimum, histogram.maximum,
            self.clipped / histogram.total, sqnr(self.power, self.noise), float(relative.max()),
            tuple(torch.nonzero(relative > OUTLIER).flatten().tolist()), fit_densities(histogram), histogram,
        )  # fmt: skip


def sqnr(power: float, noise: float) -> float:
    """Signal to quantization noise in dB; inf without noise, -inf without signal.

    Example:
        >>> sqnr(100.0, 1.0)
        20.0
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else -math.inf


def weight_facts(model: QuantModel) -> list[TensorFacts]:
    """Each weight of a calibrated network, in the order of its quantizers."""
    tensors, found = parameter_tensors(model.teacher), []
    for name, quantizer in model.weight_quantizers.items():
        weight, value = tensors[name].detach(), quantizer.get()
        axis = value.granularity.axis if isinstance(value.granularity, PerChannel) else 0
        tally = _Tally(Histogram.empty())
        steps = value.scale * _widest_gap(value.levels)
        tally.add(weight, value.dequantize(), _steps(steps, weight, axis), axis)
        found.append(tally.facts(name, "weight", quantizer.plan.bits if value.levels is not None else value.grid.bits))
    return found


def activation_facts(model: QuantModel, batches: Iterable[Tensor], host: nn.Module | None = None) -> list[TensorFacts]:
    """Each activation of a calibrated network with stored ranges, as the float network makes it.

    Args:
        model: calibrated.
        batches: images.
        host: what takes the images, where that is not `model` itself.
    """
    tallies = {name: _Tally(Histogram.empty()) for name, q in model.activation_quantizers.items() if not q.dynamic}

    def visit(quantizer: ActivationQuantizer, x: Tensor) -> None:
        steps = quantizer.get()[0] * _widest_gap(quantizer.levels)
        tallies[quantizer.name].add(x, rounded_by(quantizer, x), _steps(steps, x), 1)

    with visiting(model, visit), torch.inference_mode(), model.float_mode():
        for images in batches:
            (host or model)(images)
    return [
        tally.facts(name, "activation", model.activation_quantizers[name].plan.bits)
        for name, tally in tallies.items()
        if tally.ranges is not None
    ]


def rounded_by(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """`x` on the quantizer's grid, whether it is switched on or not."""
    enabled, quantizer.enabled = quantizer.enabled, True
    try:
        return quantizer.forward(x)  # past the hooks, of which the caller may be one
    finally:
        quantizer.enabled = enabled


def _widest_gap(levels: Tensor | None) -> Tensor | int:
    """Between neighbouring codes, (), or of each channel's own levels (C,)."""
    return 1 if levels is None else levels.int().diff().amax(-1)


def _steps(scale: Tensor, x: Tensor, axis: int = 1) -> Tensor:
    """Scales () or (C,) so that they broadcast against `x`."""
    return scale.reshape([-1 if a == axis else 1 for a in range(x.dim())]) if scale.dim() else scale


@contextmanager
def visiting(model: QuantModel, visit: Callable[[ActivationQuantizer, Tensor], None]) -> Iterator[None]:
    """Within the context `visit(quantizer, x)` sees what enters each activation quantizer with a stored range."""

    def hook(quantizer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        visit(quantizer, inputs[0])

    handles = [q.register_forward_hook(hook) for q in model.activation_quantizers.values() if not q.dynamic]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
