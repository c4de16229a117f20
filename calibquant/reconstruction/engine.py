"""Learning one unit: its roundings, scales and biases, so that its output comes close to the float network's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from calibquant import parallel
from calibquant.errors import unknown
from calibquant.features import take
from calibquant.parallel import reduced_precision
from calibquant.quantization.learning import SoftRounding, kept_values
from calibquant.quantization.model import QuantModel
from calibquant.recipe import REGULARIZER, ReconstructRecipe, Sampling
from calibquant.reconstruction.learnables import restore_state, start_learning, state_of
from calibquant.reconstruction.losses import feature_loss, regularizer_exponent
from calibquant.reconstruction.phases import Phase

HELD_OUT, FEWEST = 8, 64  # every eighth image judges a unit; with fewer images than this, none does
TELLING = 25  # steps between two looks at the loss, which on a GPU wait for it

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class UnitData:
    """What a unit is learned on; float32 or bfloat16 on the CPU, one row an image of this process's share.

    Args:
        quantized: the unit's input in the quantized network.
        float_input: its input in the float network.
        target: its output in the float network.
        importance: weights of the values of `target` in the loss; None weighs them alike.
        images: rows of all processes; None: there is one process.
        views: versions of each image, one after another; the first as it is.
    """

    quantized: Tensor
    float_input: Tensor
    target: Tensor
    importance: Tensor | None = None
    images: int | None = None
    views: int = 1

    @property
    def count(self) -> int:
        """Rows of all processes together."""
        return len(self.target) if self.images is None else self.images


@dataclass(frozen=True)
class UnitReport:
    """What became of a unit.

    Args:
        unit: its name.
        phase: what was learned: roundings, scales or both.
        loss_before, loss_after: hard-rounded, drop-free feature loss on the judging images.
        kept: whether the learned parameters were kept.
        settled: share of the roundings that had decided by themselves; 1 where none was learned.
        seconds: time it took.
    """

    unit: str
    phase: str
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
    phase: Phase,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    fixed: Collection[str] = (),
) -> UnitReport:
    """Learn what the phase says of a unit, and keep it if it helps.

    With `never_worse` and at least 64 images, every eighth image is held out of the learning and judges it; otherwise
    all images learn and the result is kept if it is finite.

    Args:
        name: of the unit, for the report.
        part: the unit, on `device`; its quantizers are calibrated and receive the result.
        data: its inputs and target.
        recipe: the schedule.
        phase: what is learned.
        seed: of the batches and the drop; the same seed gives the same result on the same machine.
        device: where it is learned.
        progress: called with (steps done, steps in all, loss and share of settled roundings in words).
        fixed: names of weights that keep their codes; if roundings are learned, the unit has at least one other.
    """
    begin = time.perf_counter()
    unit = _Learning(part, data, recipe, phase, device, fixed)
    held_out = is_judged(recipe, data.count // data.views)
    judging, learning = parted(recipe, data.count, data.views)
    saved = state_of(part)
    with _activations(part, phase.scales):
        before = unit.judge(judging)
        cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda), torch.enable_grad():
                torch.manual_seed(seed)
                settled = unit.learn(learning, progress)
            after = unit.judge(judging)
        except BaseException:  # Ctrl-C as well: a half-learned unit is worth less than the one before
            restore_state(part, saved)
            raise
    kept = after < before if held_out else math.isfinite(after)
    if not kept:
        restore_state(part, saved)
    return UnitReport(name, phase.name, before, after, kept, settled, time.perf_counter() - begin)


def is_judged(recipe: ReconstructRecipe, count: int) -> bool:
    """Whether every eighth of `count` images is held out to judge what the others taught."""
    return recipe.never_worse and count >= FEWEST


def parted(recipe: ReconstructRecipe, count: int, views: int = 1) -> tuple[Tensor, Tensor]:
    """Rows of the images that judge and of those that teach; a judging image teaches in none of its versions.

    Args:
        recipe: whether images judge at all; else all do both.
        count: rows, version after version.
        views: versions of each image, of which the first judges.
    """
    rows = torch.arange(count)
    each = count // views
    if not is_judged(recipe, each):
        return rows, rows
    return rows[:each:HELD_OUT], rows[rows % each % HELD_OUT != 0]


@dataclass(frozen=True)
class _Learning:
    """A unit in a phase."""

    part: QuantModel
    data: UnitData
    recipe: ReconstructRecipe
    phase: Phase
    device: torch.device | str
    fixed: Collection[str]

    def learn(self, rows: Tensor, progress: Progress | None) -> float:
        """The optimization on some images; afterwards the quantizers hold what was learned.

        Returns:
            the share of the roundings that had settled.
        """
        try:
            count = self.data.count
            some = parallel.local(rows, count)[: self.recipe.batch_size]
            inputs = self._rows(self.data.float_input, some)
            learned = start_learning(self.part, self.phase.rates, inputs, self.fixed)
            roundings = learned.roundings
            for quantizer in self.part.activation_quantizers.values():
                quantizer.drop = self.phase.drop
            constant = [torch.optim.Adam(learned.rounding_groups)] if learned.rounding_groups else []
            falling = [torch.optim.Adam(learned.other_groups)] if learned.other_groups else []
            schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, self.phase.iterations) for o in falling]
            optimizers, words = [*constant, *falling], ""
            learnable = [p for o in optimizers for group in o.param_groups for p in group["params"]]
            batches = parallel.drawn(_batches(len(rows), self.recipe, self.phase.iterations))
            for step, batch in enumerate(batches, start=1):
                loss = self._share_of_loss(parallel.local(rows[batch], count), len(batch))
                beta = regularizer_exponent(step, self.phase.iterations, self.recipe.warm_up, self.recipe.beta)
                if beta is not None and roundings:
                    weight = REGULARIZER if self.recipe.regularizer is None else self.recipe.regularizer
                    weight /= parallel.world()
                    loss = loss + weight * torch.stack([r.regularizer(beta) for r in roundings]).sum()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                parallel.sum_gradients(learnable)
                for optimizer in optimizers:
                    optimizer.step()
                for schedule in schedules:
                    schedule.step()
                if progress:
                    if step % TELLING == 1:
                        words = f"loss {float(loss.detach()):.3g}{_settled_words(roundings)}"
                    progress(step, self.phase.iterations, words)
            return _settled(roundings)
        finally:
            for quantizer in self.part.activation_quantizers.values():
                quantizer.drop = 0.0
            self.part.stop_learning()

    def judge(self, rows: Tensor) -> float:
        """Feature loss of the unit as it will run: hard roundings, no drop, inputs of the quantized network."""
        total = 0.0
        with torch.no_grad():
            for some in parallel.local(rows, self.data.count).split(self.recipe.batch_size):
                if len(some):
                    output = self.part(self._rows(self.data.quantized, some))
                    total += float(self._feature_loss(output, some)) * len(some)
        return parallel.total(total) / len(rows)

    def _share_of_loss(self, rows: Tensor, size: int) -> Tensor:
        """What this process's rows contribute to the mean loss of a batch; they may be none."""
        if not len(rows):
            return torch.zeros((), device=self.device, requires_grad=True)
        loss = self._loss(rows)
        return loss if len(rows) == size else loss * (len(rows) / size)

    def _loss(self, rows: Tensor) -> Tensor:
        x = self._rows(self.data.float_input if self.phase.float_inputs else self.data.quantized, rows)
        if self.phase.drop and x.is_floating_point():  # token numbers, say, are never quantized
            x = torch.lerp(self._rows(self.data.float_input, rows), x, kept_values(x, self.phase.drop))
        with reduced_precision(self.device, self.recipe.precision):
            output = self.part(x)
        return self._feature_loss(output.float(), rows)

    def _feature_loss(self, output: Tensor, rows: Tensor) -> Tensor:
        importance = None if self.data.importance is None else self._rows(self.data.importance, rows)
        return feature_loss(output, self._rows(self.data.target, rows), self.phase.power, importance)

    def _rows(self, values: Tensor, rows: Tensor) -> Tensor:
        return take(values, rows, self.device)


def _batches(count: int, recipe: ReconstructRecipe, steps: int) -> Iterator[Tensor]:
    """Rows of each step's images: epochs over a permutation (CaPTQ's text), or draws as in QDrop's or BRECQ's code."""
    size = min(recipe.batch_size, count)
    if recipe.sampling == "without_replacement":
        yield from epochs(count, size, steps)
        return
    if recipe.sampling not in ("with_replacement", "within_batch"):
        raise unknown("reconstruct.sampling", recipe.sampling, get_args(Sampling))
    for _ in range(steps):
        drawn = torch.randint(0, count, (size,)) if recipe.sampling == "with_replacement" else torch.randperm(count)
        yield drawn[:size]


def epochs(count: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Rows of each step's images, epoch after epoch over a new permutation; what does not fill a batch is left out."""
    size = min(batch_size, count)
    order, at = torch.empty(0, dtype=torch.int64), 0
    for _ in range(steps):
        if at + size > len(order):
            order, at = torch.randperm(count), 0
        yield order[at : at + size]
        at += size


@contextmanager
def _activations(part: QuantModel, on: bool) -> Iterator[None]:
    """Within the context the activation quantizers of a unit are on or off; then each is as it was."""
    before = [(q, q.enabled) for q in part.activation_quantizers.values()]
    part.enable(activations=on)
    try:
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.enabled = enabled


def _settled(roundings: Collection[SoftRounding]) -> float:
    count = sum(r.alpha.numel() for r in roundings)
    return sum(r.settled() * r.alpha.numel() for r in roundings) / count if count else 1.0


def _settled_words(roundings: Collection[SoftRounding]) -> str:
    return f", {100 * _settled(roundings):.0f} % settled" if roundings else ""
