"""Learning one unit: its roundings and activation scales, so that its output comes close to the float network's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from calibquant.features import take
from calibquant.numerics.affine import QTensor
from calibquant.quantization.learning import SoftRounding, kept_values
from calibquant.quantization.model import QuantModel, parameter_tensors
from calibquant.recipe import REGULARIZER, ReconstructRecipe
from calibquant.reconstruction.losses import feature_loss, regularizer_exponent
from calibquant.reconstruction.phases import Phase

HELD_OUT, FEWEST = 8, 64  # every eighth image judges a unit; with fewer images than this, none does
TELLING = 25  # steps between two looks at the loss, which on a GPU wait for it

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class UnitData:
    """What a unit is learned on; float32 or bfloat16 on the CPU, one row an image.

    Args:
        quantized: the unit's input in the quantized network.
        float_input: its input in the float network.
        target: its output in the float network.
        importance: weights of the values of `target` in the loss; None weighs them alike.
    """

    quantized: Tensor
    float_input: Tensor
    target: Tensor
    importance: Tensor | None = None


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
    rows = torch.arange(len(data.target))
    held_out = recipe.never_worse and len(rows) >= FEWEST
    judging, learning = (rows[::HELD_OUT], rows[rows % HELD_OUT != 0]) if held_out else (rows, rows)
    saved = _state(part)
    with _activations(part, phase.scales):
        before = unit.judge(judging)
        cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda), torch.enable_grad():
                torch.manual_seed(seed)
                settled = unit.learn(learning, progress)
            after = unit.judge(judging)
        except BaseException:  # Ctrl-C as well: a half-learned unit is worth less than the one before
            _restore(part, saved)
            raise
    kept = after < before if held_out else math.isfinite(after)
    if not kept:
        _restore(part, saved)
    return UnitReport(name, phase.name, before, after, kept, settled, time.perf_counter() - begin)


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
            roundings, optimizers = self._begin()
            cosine = [
                torch.optim.lr_scheduler.CosineAnnealingLR(o, self.phase.iterations)
                for o in optimizers[self.phase.roundings :]
            ]
            words = ""
            for step, batch in enumerate(_batches(len(rows), self.recipe, self.phase.iterations), start=1):
                loss = self._loss(rows[batch])
                beta = regularizer_exponent(step, self.phase.iterations, self.recipe.warm_up, self.recipe.beta)
                if beta is not None and roundings:
                    weight = REGULARIZER if self.recipe.regularizer is None else self.recipe.regularizer
                    loss = loss + weight * torch.stack([r.regularizer(beta) for r in roundings]).sum()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                for schedule in cosine:
                    schedule.step()
                if progress:
                    if step % TELLING == 1:
                        words = f"loss {float(loss.detach()):.3g}{_settled_words(roundings)}"
                    progress(step, self.phase.iterations, words)
            return _settled(roundings)
        finally:
            for weight_quantizer in self.part.weight_quantizers.values():
                weight_quantizer.stop_learning()
            for quantizer in self.part.activation_quantizers.values():
                quantizer.stop_learning()

    def judge(self, rows: Tensor) -> float:
        """Feature loss of the unit as it will run: hard roundings, no drop, inputs of the quantized network."""
        total = 0.0
        with torch.no_grad():
            for some in rows.split(self.recipe.batch_size):
                output = self.part(self._rows(self.data.quantized, some))
                total += float(self._feature_loss(output, some)) * len(some)
        return total / len(rows)

    def _begin(self) -> tuple[list[SoftRounding], list[torch.optim.Optimizer]]:
        """Start learning; the optimizer of the roundings comes first."""
        roundings: list[SoftRounding] = []
        optimizers: list[torch.optim.Optimizer] = []
        if self.phase.roundings:
            weights = parameter_tensors(self.part.teacher)
            learned = [(n, q) for n, q in self.part.weight_quantizers.items() if n not in self.fixed]
            roundings = [quantizer.start_learning(weights[name]) for name, quantizer in learned]
            optimizers.append(torch.optim.Adam([r.alpha for r in roundings], lr=self.recipe.rounding_lr))
        if self.phase.scales:
            for quantizer in self.part.activation_quantizers.values():
                quantizer.drop = self.phase.drop
            stored = [q for q in self.part.activation_quantizers.values() if not q.dynamic]
            groups = [{"params": [q.start_learning() for q in stored], "lr": self.recipe.scale_lr}]
            if self.recipe.zero_point_lr:
                zero_points = [q.start_learning_zero_point() for q in stored]
                groups.append({"params": zero_points, "lr": self.recipe.zero_point_lr})
            if stored:
                optimizers.append(torch.optim.Adam(groups))
        return roundings, optimizers

    def _loss(self, rows: Tensor) -> Tensor:
        x = self._rows(self.data.float_input if self.phase.float_inputs else self.data.quantized, rows)
        if self.phase.drop and x.is_floating_point():  # token numbers, say, are never quantized
            x = torch.lerp(self._rows(self.data.float_input, rows), x, kept_values(x, self.phase.drop))
        return self._feature_loss(self.part(x), rows)

    def _feature_loss(self, output: Tensor, rows: Tensor) -> Tensor:
        importance = None if self.data.importance is None else self._rows(self.data.importance, rows)
        return feature_loss(output, self._rows(self.data.target, rows), self.phase.power, importance)

    def _rows(self, values: Tensor, rows: Tensor) -> Tensor:
        return take(values, rows, self.device)


def _batches(count: int, recipe: ReconstructRecipe, steps: int) -> Iterator[Tensor]:
    """Rows of each step's images: epochs over a permutation (CaPTQ's text), or draws as in QDrop's or BRECQ's code."""
    size = min(recipe.batch_size, count)
    order, at = torch.empty(0, dtype=torch.int64), 0
    for _ in range(steps):
        if recipe.sampling == "with_replacement":
            yield torch.randint(0, count, (size,))
            continue
        if recipe.sampling == "within_batch" or at + size > len(order):
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


_State = tuple[dict[str, QTensor], dict[str, tuple[Tensor, Tensor]]]


def _state(part: QuantModel) -> _State:
    weights = {name: q.get() for name, q in part.weight_quantizers.items()}
    ranges = {n: (q.scale, q.zero_point) for n, q in part.activation_quantizers.items() if q.scale is not None}
    return weights, ranges


def _restore(part: QuantModel, state: _State) -> None:
    for name, value in state[0].items():
        part.weight_quantizers[name].set(value)
    for name, (scale, zero_point) in state[1].items():
        part.activation_quantizers[name].scale = scale
        part.activation_quantizers[name].zero_point = zero_point
