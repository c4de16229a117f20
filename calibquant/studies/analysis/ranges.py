"""Clipping ranges by several observers, side by side, and what each would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibquant.quantization import QuantModel, calibrate_activations
from calibquant.quantization.quantizers import ActivationQuantizer
from calibquant.recipe import ActivationRecipe, Observer
from calibquant.studies.analysis.tensors import rounded_by, sqnr, visiting

METHODS: tuple[Observer, ...] = ("minmax", "percentile", "mse", "kl", "aciq", "ifmr")
Batches = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class RangeRow:
    """One activation with the range of one observer.

    Args:
        name: of the activation.
        observer: a recipe's `quant.activations.observer`.
        low, high: what the grid then represents, smallest and largest over the channels.
        sqnr: signal to quantization noise on the same images, in dB.
    """

    name: str
    observer: str
    low: float
    high: float
    sqnr: float


def ranges_by_observer(
    model: QuantModel,
    recipe: ActivationRecipe,
    batches: Batches,
    mount: Callable[[nn.Module], nn.Module],
    observers: Sequence[Observer] = METHODS,
    progress: Callable[[int, int], None] | None = None,
) -> list[RangeRow]:
    """Ranges that observers find on the same images; the model keeps its own.

    Args:
        model: calibrated.
        recipe: of its activations.
        batches: called once or twice for each observer; gives the same images each time.
        mount: puts a network where images reach it.
        observers: to compare.
        progress: called with (done, total).
    """
    rows: list[RangeRow] = []
    with _ranges_kept(model):
        for done, observer in enumerate(observers, start=1):
            chosen = recipe.model_copy(update={"observer": observer, "dynamic": False})
            calibrate_activations(model, chosen, batches(), mount)
            rows += _rows(model, observer, batches(), mount)
            if progress:
                progress(done, len(observers))
    order = {name: i for i, name in enumerate(model.activation_quantizers)}
    return sorted(rows, key=lambda row: order[row.name])


def _rows(
    model: QuantModel, observer: str, batches: Iterable[Tensor], mount: Callable[[nn.Module], nn.Module]
) -> Iterator[RangeRow]:
    power: dict[str, float] = {}
    noise: dict[str, float] = {}

    def visit(quantizer: ActivationQuantizer, x: Tensor) -> None:
        name, error = quantizer.name, rounded_by(quantizer, x) - x
        power[name] = power.get(name, 0.0) + float(x.double().square().sum())
        noise[name] = noise.get(name, 0.0) + float(error.double().square().sum())

    network = mount(model)
    with visiting(model, visit), torch.inference_mode(), model.float_mode():
        for images in batches:
            network(images)
    for name in power:
        quantizer = model.activation_quantizers[name]
        scale, zero_point = quantizer.get()
        grid = quantizer.plan.grid
        low, high = ((grid.qmin - zero_point) * scale).min(), ((grid.qmax - zero_point) * scale).max()
        yield RangeRow(name, observer, float(low), float(high), sqnr(power[name], noise[name]))


@contextmanager
def _ranges_kept(model: QuantModel) -> Iterator[None]:
    """Afterwards every activation quantizer has the range that it had before."""
    before = [(q, q.scale, q.zero_point, q.levels) for q in model.activation_quantizers.values()]
    try:
        yield
    finally:
        for quantizer, scale, zero_point, levels in before:
            quantizer.scale, quantizer.zero_point, quantizer.levels = scale, zero_point, levels
