"""Activations with a scale for each channel: their observer, which can also share bits among the channels."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from calibquant.errors import QuantizationError, unknown
from calibquant.graph.limits import UNLIMITED, Limits
from calibquant.numerics.allocation import MOST, banner, optimal
from calibquant.numerics.grid import Grid, PerTensor
from calibquant.numerics.histogram import Histogram
from calibquant.quantization.allocation import error_of, spread_of
from calibquant.quantization.observers import ActivationObserver, HistogramObserver, make_observer
from calibquant.quantization.plan import TensorPlan
from calibquant.quantization.quantizers import activation_affine
from calibquant.recipe import ActivationRecipe, Allocation


class ChannelObserver(ActivationObserver):
    """An observer for each channel, axis 1; with an allocation also a histogram of each channel's values.

    Its state is bounded: that of one observer, and 64 kB for a histogram, for each channel.

    Args:
        recipe: the observer.
        plan: the quantizer's, per channel.
        limits: see `observers.make_observer`.
    """

    def __init__(self, recipe: ActivationRecipe, plan: TensorPlan, limits: Limits = UNLIMITED) -> None:
        self.recipe, self.plan, self.limits = recipe, replace(plan, granularity=PerTensor()), limits
        self.channels: list[_Channel] = []

    def update(self, x: Tensor) -> None:
        if x.numel():
            self._grow(x.shape[1])
            for channel, values in zip(self.channels, x.movedim(1, 0), strict=True):
                channel.update(values)

    def merge(self, other: ActivationObserver) -> None:
        if not isinstance(other, ChannelObserver):
            raise TypeError(f"a ChannelObserver cannot merge a {type(other).__name__}")
        if other.channels:
            self._grow(len(other.channels))
            for mine, theirs in zip(self.channels, other.channels, strict=True):
                mine.merge(theirs)

    def range(self) -> tuple[Tensor, Tensor]:
        """Low and high of each channel, float32 (C,), on the CPU, for the grid of the plan."""
        self._require()
        return _stacked([channel.observer.range() for channel in self.channels])

    def allocated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ranges with bits shared among the channels as the plan says: low, high, and int32 bits, (C,) each.

        `banner` takes the standard deviation of a channel's values as its spread; `optimal` their summed squared error
        at each number of bits with the recipe's observer. Both are those of the channel's histogram.

        Raises:
            QuantizationError: no value was seen.
        """
        self._require()
        if self.plan.allocation == "banner":
            bits = banner(np.array([spread_of(channel.histogram) for channel in self.channels]), self.plan.grid.bits)
        elif self.plan.allocation != "optimal":
            raise unknown("quant.activations.allocation", self.plan.allocation, get_args(Allocation))
        else:
            errors = np.array([self._errors(channel) for channel in self.channels])
            bits = optimal(errors, len(self.channels) * self.plan.grid.bits)
        ends = [self._range_at(channel, int(b)) for channel, b in zip(self.channels, bits, strict=True)]
        return *_stacked(ends), torch.from_numpy(bits).to(torch.int32)

    def _errors(self, channel: _Channel) -> list[float]:
        """Of the channel's values with 0 to 8 bits."""
        histogram = channel.histogram
        found = [float((histogram.counts * histogram.centers.clamp(*self.limits).square()).sum())]
        for b in range(1, MOST + 1):
            own = replace(self.plan, grid=Grid(b))
            pair = activation_affine(*self._range_at(channel, b), own)
            found.append(error_of(histogram, *pair, own.grid, self.limits))
        return found

    def _range_at(self, channel: _Channel, bits: int) -> tuple[Tensor, Tensor]:
        """Its range on a grid of its own; without bits there is nothing to search."""
        observer = make_observer(self.recipe, replace(self.plan, grid=Grid(max(1, bits))), self.limits)
        observer.merge(channel.observer)
        return observer.range()

    def _grow(self, count: int) -> None:
        while len(self.channels) < count:
            observer = make_observer(self.recipe, self.plan, self.limits)
            self.channels.append(_Channel(observer, self.plan.allocation != "none"))

    def _require(self) -> None:
        if not self.channels:
            raise QuantizationError("activation observer", "it has seen no values", "calibrate with at least one image")


class _Channel:
    """One channel's observer, and its histogram where `counted`; a histogram that the observer keeps serves as both."""

    def __init__(self, observer: ActivationObserver, counted: bool) -> None:
        self.observer = observer
        self.own = Histogram.empty() if counted and not isinstance(observer, HistogramObserver) else None

    @property
    def histogram(self) -> Histogram:
        if isinstance(self.observer, HistogramObserver):
            return self.observer.histogram
        assert self.own is not None
        return self.own

    def update(self, values: Tensor) -> None:
        self.observer.update(values)
        if self.own is not None:
            self.own = self.own.add(values)

    def merge(self, other: _Channel) -> None:
        self.observer.merge(other.observer)
        if self.own is not None and other.own is not None:
            self.own = self.own.merge(other.own)


def _stacked(ends: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([low for low, _ in ends]), torch.stack([high for _, high in ends])
