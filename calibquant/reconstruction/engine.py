"""Learning one unit: its roundings and activation scales, so that its output comes close to the float network's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calibquant.numerics.affine import QTensor
from calibquant.quantization.model import QuantModel, parameter_tensors
from calibquant.recipe import ReconstructRecipe
from calibquant.reconstruction.losses import feature_loss, regularizer_exponent

HELD_OUT, FEWEST = 8, 64  # every eighth image judges a unit; with fewer images than this, none does


@dataclass(frozen=True)
class UnitData:
    """What a unit is learned on; float32 on the CPU, one row an image.

    Args:
        quantized: the unit's input in the quantized network.
        float_input: its input in the float network.
        target: its output in the float network.
    """

    quantized: Tensor
    float_input: Tensor
    target: Tensor

    def rows(self, rows: slice) -> UnitData:
        """Some of the images."""
        return UnitData(self.quantized[rows], self.float_input[rows], self.target[rows])


@dataclass(frozen=True)
class UnitReport:
    """What became of a unit.

    Args:
        unit: its name.
        loss_before, loss_after: hard-rounded, drop-free feature loss on the judging images.
        kept: whether the learned parameters were kept.
        settled: share of the roundings that had decided by themselves.
        seconds: time it took.
    """

    unit: str
    loss_before: float
    loss_after: float
    kept: bool
    settled: float
    seconds: float


def learn_unit(
    name: str,
    part: QuantModel,
    data: UnitData,
    recipe: ReconstructRecipe,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    fixed: Collection[str] = (),
) -> UnitReport:
    """Learn a unit's roundings (and, with qdrop, its activation scales), and keep them if they help.

    With `never_worse` and at least 64 images, every eighth image is held out of the learning and judges it; otherwise
    all images learn and the result is kept if it is finite.

    Args:
        name: of the unit, for the report.
        part: the unit, on `device`; its quantizers are calibrated and receive the result.
        data: its inputs and target.
        recipe: method and schedule.
        seed: of the batches and the drop; the same seed gives the same result on the same machine.
        device: where it is learned.
        progress: called with (steps done, steps in all).
        fixed: names of weights that keep their codes; the unit has at least one other.
    """
    begin = time.perf_counter()
    held_out = recipe.never_worse and len(data.target) >= FEWEST
    judge = data.rows(slice(None, None, HELD_OUT)) if held_out else data
    learning = _without(data, HELD_OUT) if held_out else data
    before, saved = _judge(part, judge, recipe.batch_size, device), _state(part)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            torch.manual_seed(seed)
            settled = _learn(part, learning, recipe, device, progress, fixed)
        after = _judge(part, judge, recipe.batch_size, device)
    except BaseException:  # Ctrl-C as well: a half-learned unit is worth less than the one before
        _restore(part, saved)
        raise
    kept = after < before if held_out else math.isfinite(after)
    if not kept:
        _restore(part, saved)
    return UnitReport(name, before, after, kept, settled, time.perf_counter() - begin)


def _learn(
    part: QuantModel,
    data: UnitData,
    recipe: ReconstructRecipe,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None,
    fixed: Collection[str],
) -> float:
    """The optimization; afterwards the quantizers hold the decided roundings. Returns the share settled before."""
    try:
        weights = parameter_tensors(part.teacher)
        roundings = [q.start_learning(weights[name]) for name, q in part.weight_quantizers.items() if name not in fixed]
        dropping = recipe.method == "qdrop"
        activations = list(part.activation_quantizers.values()) if dropping else []
        scales = [q.start_learning() for q in activations if not q.dynamic]
        for quantizer in part.activation_quantizers.values():
            quantizer.enabled = dropping  # AdaRound learns roundings against float activations
            quantizer.keep = 1 - recipe.drop
        optimizers = [torch.optim.Adam([r.alpha for r in roundings], lr=recipe.rounding_lr)]
        schedules = []
        if scales:
            optimizers.append(torch.optim.Adam(scales, lr=recipe.scale_lr))
            schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], recipe.iterations))
        for step, rows in enumerate(_batches(len(data.target), recipe), start=1):
            x = data.quantized[rows].to(device)
            if dropping:
                x = torch.where(torch.rand_like(x) < 1 - recipe.drop, x, data.float_input[rows].to(device))
            loss = feature_loss(part(x), data.target[rows].to(device))
            beta = regularizer_exponent(step, recipe.iterations, recipe.warm_up, recipe.beta)
            if beta is not None:
                loss = loss + recipe.regularizer * torch.stack([r.regularizer(beta) for r in roundings]).sum()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            for schedule in schedules:
                schedule.step()
            if progress:
                progress(step, recipe.iterations)
        decided = sum(r.settled() * r.alpha.numel() for r in roundings)
        return decided / max(1, sum(r.alpha.numel() for r in roundings))
    finally:
        for weight_quantizer in part.weight_quantizers.values():
            weight_quantizer.stop_learning()
        for quantizer in part.activation_quantizers.values():
            quantizer.stop_learning()
            quantizer.enabled, quantizer.keep = True, 1.0


def _batches(count: int, recipe: ReconstructRecipe) -> Iterator[Tensor]:
    """Rows of each step's images: epochs over a permutation (CaPTQ's text), or independent draws (QDrop's code)."""
    size = min(recipe.batch_size, count)
    order, at = torch.empty(0, dtype=torch.int64), 0
    for _ in range(recipe.iterations):
        if recipe.sampling == "with_replacement":
            yield torch.randint(0, count, (size,))
            continue
        if at + size > len(order):
            order, at = torch.randperm(count), 0
        yield order[at : at + size]
        at += size


def _judge(part: QuantModel, data: UnitData, batch_size: int, device: torch.device | str) -> float:
    """Feature loss of the unit as it will run: hard roundings, no drop, inputs of the quantized network."""
    total = 0.0
    with torch.no_grad():
        for x, y in zip(data.quantized.split(batch_size), data.target.split(batch_size), strict=True):
            total += float(feature_loss(part(x.to(device)), y.to(device))) * len(x)
    return total / len(data.target)


def _without(data: UnitData, every: int) -> UnitData:
    """All rows but every `every`-th."""
    rows = torch.arange(len(data.target)) % every != 0
    return UnitData(data.quantized[rows], data.float_input[rows], data.target[rows])


def _state(part: QuantModel) -> tuple[dict[str, QTensor], dict[str, Tensor]]:
    weights = {name: q.get() for name, q in part.weight_quantizers.items()}
    scales = {name: q.get()[0] for name, q in part.activation_quantizers.items() if not q.dynamic}
    return weights, scales


def _restore(part: QuantModel, state: tuple[dict[str, QTensor], dict[str, Tensor]]) -> None:
    for name, value in state[0].items():
        part.weight_quantizers[name].set(value)
    for name, scale in state[1].items():
        part.activation_quantizers[name].scale = scale
