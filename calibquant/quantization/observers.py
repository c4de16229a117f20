"""Observers: what collects a tensor's statistics and turns them into a clipping range.

Activation observers stream batches of one per-tensor quantizer, hold bounded state however many images pass, and
merge, so that several processes can each see a part.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from calibquant.errors import QuantizationError, unknown
from calibquant.graph.limits import UNLIMITED, Limits
from calibquant.numerics.aciq import Density, aciq_range_of
from calibquant.numerics.affine import MIN_SCALE, affine_from_range, quantize
from calibquant.numerics.amct import arq_range, hfmg_range_of, ifmr_range_of
from calibquant.numerics.clipping import (
    Side,
    kl_range_of,
    minmax_range,
    mse_range,
    mse_range_of,
    mse_shrink_range,
    percentile_range,
    percentile_range_of,
    side_of,
)
from calibquant.numerics.grid import Grid, PerTensor
from calibquant.numerics.histogram import Histogram, finite_extremes
from calibquant.numerics.levels import best_scale, cluster, nearest_levels, unsigned_levels
from calibquant.quantization.plan import LevelPlan, TensorPlan
from calibquant.recipe import ActivationRecipe, Observer, WeightRecipe

INT8 = Grid(8)
SHARES = np.arange(400, 601) / 500  # of the best scale, which are tried for levels behind codes of 8 bits
_Same = TypeVar("_Same", bound="ActivationObserver")
# Observers that fit a density to values, and must therefore see them before a ReLU has made half of them zeros.
DENSITIES: dict[str, Density | Literal["auto"]] = {"aciq": "auto", "aciq-laplace": "laplace", "aciq-gauss": "gauss"}


class ActivationObserver(ABC):
    """Statistics of one activation tensor over the calibration batches."""

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in a batch: float, any shape and device. An empty one changes nothing.

        Raises:
            DataError: `x` holds NaN or infinity.
        """

    @abstractmethod
    def merge(self, other: ActivationObserver) -> None:
        """Take in what an observer made from the same recipe has seen."""

    @abstractmethod
    def range(self) -> tuple[Tensor, Tensor]:
        """Low and high, float32 (), on the CPU.

        Raises:
            QuantizationError: no value was seen.
        """


def make_observer(recipe: ActivationRecipe, plan: TensorPlan, limits: Limits = UNLIMITED) -> ActivationObserver:
    """The observer that `recipe.observer` names, for a quantizer as planned.

    "minmax": smallest and largest value. "moving-average": means of the batches' minima and maxima. "percentile",
    "mse", "kl", "ifmr", "hfmg": searches on a histogram of all values. "aciq", "aciq-laplace", "aciq-gauss": the range
    that is best for a density fitted to it. "mse-batch", "mse-shrink": searches on the values of each batch, as QDrop's
    MSEObserver and BRECQ's released code do, see `BatchObserver`.
    Where codes are few levels, a `LevelObserver` whatever the name is.
    A symmetric quantizer decides its sign from the data: the searches score values without a negative one on the whole
    grid, as `quantizers.activation_affine` uses it.

    Args:
        recipe: the observer's name and percentile.
        plan: of the quantizer.
        limits: what a function behind the observed values lets through. Only an observer of `DENSITIES` sees values
            before such a function; see `calibration.calibrate_activations`.
    """
    name, grid, symmetric = recipe.observer, plan.grid, plan.symmetric
    if plan.levels is not None:
        return LevelObserver(plan.levels)
    if name == "minmax":
        return MinMaxObserver()
    if name == "moving-average":
        return AverageObserver()
    if name == "mse-batch":
        return BatchObserver(partial(_mse_range_of_batch, grid=grid, symmetric=symmetric))
    if name == "mse-shrink":
        return BatchObserver(partial(_mse_shrink_range_of_batch, grid=grid, symmetric=symmetric))
    if name == "percentile":
        return HistogramObserver(partial(percentile_range_of, percent=recipe.percentile))
    if name == "kl":
        return HistogramObserver(partial(kl_range_of, grid=grid))
    if name == "hfmg":
        return HistogramObserver(partial(hfmg_range_of, grid=grid))
    if name in DENSITIES:
        return HistogramObserver(partial(aciq_range_of, grid=grid, density=DENSITIES[name], limits=limits))
    searches = {"ifmr": ifmr_range_of, "mse": mse_range_of}
    if name not in searches:
        raise unknown("quant.activations.observer", name, get_args(Observer))
    search = searches[name]
    return HistogramObserver(partial(_search_as_used, search=search, grid=grid, symmetric=symmetric))


def weight_range(w: Tensor, recipe: WeightRecipe, plan: TensorPlan) -> tuple[Tensor, Tensor]:
    """The clipping range of a weight by `recipe.observer`: low and high, float32, () or (C,).

    Args:
        w: float, any shape.
        recipe: the observer and its percentile.
        plan: the quantizer's grid, symmetry and granularity.

    Raises:
        QuantizationError: `w` is empty or not finite.
    """
    if recipe.observer == "minmax":
        return minmax_range(w, plan.granularity)
    if recipe.observer == "percentile":
        return percentile_range(w, plan.granularity, recipe.percentile)
    if recipe.observer == "arq":
        return arq_range(w, plan.grid, plan.symmetric, plan.granularity)
    if recipe.observer == "mse-shrink":
        return mse_shrink_range(w, plan.grid, plan.symmetric, plan.granularity)
    if recipe.observer == "mse":
        return mse_range(w, plan.grid, plan.symmetric, plan.granularity)
    known = get_args(WeightRecipe.model_fields["observer"].annotation)
    raise unknown("quant.weights.observer", recipe.observer, known)


def _search_as_used(
    histogram: Histogram, search: Callable[[Histogram, Grid, bool], tuple[Tensor, Tensor]], grid: Grid, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """What is scored is what will be used: without negative values the whole grid serves [0, high]."""
    return search(histogram, grid, symmetric and histogram.minimum < 0)


def _mse_range_of_batch(x: Tensor, side: Side, grid: Grid, symmetric: bool) -> tuple[Tensor, Tensor]:
    return mse_range(x, grid, symmetric and side != "pos", PerTensor(), side=side)


def _mse_shrink_range_of_batch(x: Tensor, side: Side, grid: Grid, symmetric: bool) -> tuple[Tensor, Tensor]:
    return mse_shrink_range(x, grid, symmetric and side != "pos", PerTensor())


class MinMaxObserver(ActivationObserver):
    """Smallest and largest value of all batches."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def update(self, x: Tensor) -> None:
        if x.numel():
            self._widen(*finite_extremes(x))

    def merge(self, other: ActivationObserver) -> None:
        other = _same(self, other)
        self._widen(other.low, other.high)

    def range(self) -> tuple[Tensor, Tensor]:
        _require(self.low <= self.high)
        return torch.tensor(self.low), torch.tensor(self.high)

    def _widen(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)


class AverageObserver(ActivationObserver):
    """Mean of the batches' minima and mean of their maxima, each batch counting once (QDrop's AvgMinMaxObserver)."""

    def __init__(self) -> None:
        self.low_sum, self.high_sum, self.batches = 0.0, 0.0, 0

    def update(self, x: Tensor) -> None:
        if x.numel():
            self._add(*finite_extremes(x), 1)

    def merge(self, other: ActivationObserver) -> None:
        other = _same(self, other)
        self._add(other.low_sum, other.high_sum, other.batches)

    def range(self) -> tuple[Tensor, Tensor]:
        _require(self.batches > 0)
        return torch.tensor(self.low_sum / self.batches), torch.tensor(self.high_sum / self.batches)

    def _add(self, low: float, high: float, batches: int) -> None:
        self.low_sum, self.high_sum, self.batches = self.low_sum + low, self.high_sum + high, self.batches + batches


class HistogramObserver(ActivationObserver):
    """A histogram of all values, and a search on it.

    Args:
        search: from a histogram that is not empty to a range.
    """

    def __init__(self, search: Callable[[Histogram], tuple[Tensor, Tensor]]) -> None:
        self.histogram, self.search = Histogram.empty(), search

    def update(self, x: Tensor) -> None:
        self.histogram = self.histogram.add(x)

    def merge(self, other: ActivationObserver) -> None:
        self.histogram = self.histogram.merge(_same(self, other).histogram)

    def range(self) -> tuple[Tensor, Tensor]:
        _require(self.histogram.total > 0)
        return self.search(self.histogram)


class LevelObserver(HistogramObserver):
    """A histogram of all values, and the levels and the range of 8-bit codes that have the least squared error on it.

    "codebook": the range of least error for 8 bits, and the best levels among its codes: exact clustering of the bins.
    Given levels: the scale that would be the best without codes of 8 bits before them, times the best of SHARES.

    Args:
        plan: the kind of levels and how many.
    """

    def __init__(self, plan: LevelPlan) -> None:
        super().__init__(lambda histogram: _levels_of(histogram, plan)[:2])
        self.plan = plan

    def leveled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Low and high, float32 (), and the levels, uint8 (n,), on the CPU.

        Raises:
            QuantizationError: no value was seen.
        """
        _require(self.histogram.total > 0)
        return _levels_of(self.histogram, self.plan)


def _levels_of(histogram: Histogram, plan: LevelPlan) -> tuple[Tensor, Tensor, Tensor]:
    there = histogram.counts > 0
    centers, counts = histogram.centers[there], histogram.counts[there].double()
    signed = histogram.minimum < 0
    if plan.kind == "codebook":
        low, high = mse_range_of(histogram, INT8, False)
        scale, zero_point = affine_from_range(low, high, INT8, False)
        codes = quantize(centers, scale, zero_point, INT8, PerTensor())
        found = cluster(codes.double().numpy(), counts.numpy(), plan.count, whole=True)
        return low, high, torch.tensor(found).to(torch.uint8)
    levels = torch.tensor(unsigned_levels(plan.kind, plan.bits, signed), dtype=torch.uint8)
    zero = 128 if signed else 0
    direct = best_scale(centers.numpy(), levels.double().numpy() - zero, counts.numpy())
    scales = torch.from_numpy(direct * SHARES).clamp(min=MIN_SCALE)
    codes = (torch.round(centers / scales[:, None]) + zero).clamp(0, 255).long()
    rounded = (nearest_levels(levels)[codes].double() - zero) * scales[:, None]
    best = scales[((rounded - centers) ** 2 * counts).sum(1).argmin()].float()
    return (-best * 127.5, best * 127.5, levels) if signed else (torch.zeros(()), best * 255, levels)


class BatchObserver(ActivationObserver):
    """The range that a search finds for every batch, then the widest of these.

    The side (whether values are one-sided) is decided once, on the first batch; an observer that has seen none takes
    it over when it merges.

    Args:
        search: from a batch that is not empty, and the side, to a range.
    """

    def __init__(self, search: Callable[[Tensor, Side], tuple[Tensor, Tensor]]) -> None:
        self.search = search
        self.side: Side | None = None
        self.low, self.high = math.inf, -math.inf

    def update(self, x: Tensor) -> None:
        if not x.numel():
            return
        side = side_of(*finite_extremes(x))
        self.side = self.side or side
        low, high = self.search(x, self.side)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def merge(self, other: ActivationObserver) -> None:
        other = _same(self, other)
        self.side = self.side or other.side
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def range(self) -> tuple[Tensor, Tensor]:
        _require(self.side is not None)
        return torch.tensor(self.low), torch.tensor(self.high)


def _same(mine: _Same, other: ActivationObserver) -> _Same:
    if not isinstance(other, type(mine)):
        raise TypeError(f"a {type(mine).__name__} cannot merge a {type(other).__name__}")
    return other


def _require(seen: bool) -> None:
    if not seen:
        raise QuantizationError("activation observer", "it has seen no values", "calibrate with at least one image")
