"""Times an iteration of each reconstruction unit against QDrop's loop written plainly in PyTorch.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py --data DATA [--iterations 100] [--rounds 8] [--images 1024]

DATA holds weights/resnet20-12fca82f.th and cifar-10-batches-bin/. ResNet-20, recipe `qdrop-reference` at W2A2, one
pinned thread; CalibQuant's side is the engine itself, `learn_unit`. First both loops must compute the same: the script
fails if not. Then they take turns in short rounds; a round's time runs from its first forward pass to its last, so that
what stands before and after the iterations (CalibQuant judges the unit there) is not counted. About ten minutes. The
last table is the profiler's: where CalibQuant's time goes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import plain_qdrop as plain
import torch
from step_groups import BETWEEN, NOTES, ORDER, grouped
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from calibquant.data import batches
from calibquant.graph import Unit, units
from calibquant.graph.nodes import weight_of
from calibquant.graph.subgraph import subgraph
from calibquant.numerics.affine import aligned
from calibquant.pipeline.preparing import prepare
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.quantization.model import parameter_tensors
from calibquant.recipe import Recipe, ReconstructRecipe, load_recipe
from calibquant.reconstruction.engine import UnitData, learn_unit
from calibquant.reconstruction.phases import phases

CONFIG = Path(__file__).parents[1] / "configs" / "resnet20-cifar10.yaml"
TOLERANCE = 1e-4  # of a step's loss, relative
DROP_TOLERANCE = 0.01  # of the mean loss with drop: the loops draw different values


@dataclass(frozen=True)
class Case:
    """A unit with what it is learned on.

    Args:
        unit: which one.
        model: the calibrated network.
        part: the unit in it.
        data: its features.
        start: its calibrated state.
    """

    unit: Unit
    model: QuantModel
    part: QuantModel
    data: UnitData
    start: dict[str, Tensor]

    def engine(self, recipe: ReconstructRecipe, data: UnitData | None = None) -> None:
        """CalibQuant's loop, from the calibrated state on."""
        self.part.load_state_dict(self.start)
        (phase,) = phases(recipe)
        learn_unit(self.unit.name, self.part, data or self.data, recipe, phase, seed=1005, progress=_silent)

    def plain_unit(self) -> nn.Module:
        """The unit in plain PyTorch, in the calibrated state."""
        self.part.load_state_dict(self.start)
        return _plain_unit(self.model, self.unit)


def _silent(*_: Any) -> None:
    """Hears of progress, as the command line does in a real run."""


# --- setting up -------------------------------------------------------------------------------------------------------


def cases(recipe: Recipe) -> Iterator[Case]:
    """Every unit of the calibrated network with its features, one after the other."""
    prepared = prepare(recipe)
    teacher = prepared.teacher
    model = QuantModel(teacher, make_plan(teacher, recipe.quant))
    calibrate_weights(model, recipe.quant)
    images = torch.cat([b.images for b in batches(prepared.images, recipe.calibration.batch_size)])
    ranging = images[: recipe.calibration.range_count].split(recipe.calibration.batch_size)
    calibrate_activations(model, recipe.quant.activations, ranging)
    quantized = float_input = images
    for unit in units(teacher.graph, "block"):
        part = model.part(unit.nodes, [unit.output])
        with torch.no_grad():
            target = _outputs(subgraph(teacher, unit.nodes, [unit.output]), float_input)
            data = UnitData(quantized=quantized, float_input=float_input, target=target)
            start = {name: value.clone() for name, value in part.state_dict().items()}
        yield Case(unit, model, part, data, start)
        part.load_state_dict(start)
        with torch.no_grad():
            quantized, float_input = _outputs(part, quantized), target


def _outputs(module: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([module(some) for some in images.split(64)])


def _plain_unit(model: QuantModel, unit: Unit) -> nn.Module:
    nodes = {n.name: n for n in model.teacher.graph.nodes}
    weighted = [nodes[name] for name in unit.nodes if weight_of(nodes[name]) is not None]
    tensors = parameter_tensors(model.teacher)
    weights = [_plain_weight(model, str(w.target)) for n in weighted if (w := weight_of(n)) is not None]
    biases = [tensors[str(n.args[2].target)] for n in weighted]
    activations = [_plain_activation(model, name) for name in unit.nodes if name in model.activation_quantizers]
    if len(activations) == 0:
        return plain.Head(weights[0], biases[0])
    strides = [n.kwargs["stride"][0] for n in weighted]
    convs = [plain.Convolution(w, b, int(s)) for w, b, s in zip(weights, biases, strides, strict=True)]
    return plain.BasicBlock(convs, activations) if len(convs) == 2 else plain.Stem(convs[0], activations[0])


def _plain_weight(model: QuantModel, name: str) -> plain.AdaRoundWeight:
    weight, start = parameter_tensors(model.teacher)[name], model.weight_quantizers[name].get()
    assert start.grid.qmin == 0
    scale, zero_point = (aligned(v, weight, start.granularity) for v in (start.scale, start.zero_point))
    return plain.AdaRoundWeight(weight, scale, zero_point, start.grid.qmax)


def _plain_activation(model: QuantModel, name: str) -> plain.LsqActivation:
    quantizer = model.activation_quantizers[name]
    assert quantizer.plan.grid.qmin == 0
    scale, zero_point = quantizer.get()
    return plain.LsqActivation(scale, zero_point, quantizer.plan.grid.qmax)


def settings_of(recipe: ReconstructRecipe) -> plain.Settings:
    """The recipe for the plain loop."""
    assert recipe.regularizer is not None
    return plain.Settings(
        recipe.iterations, recipe.batch_size, recipe.drop, recipe.regularizer, recipe.warm_up, recipe.beta,
        recipe.rounding_lr, recipe.scale_lr,
    )  # fmt: skip


# --- both compute the same --------------------------------------------------------------------------------------------


@contextmanager
def recorded_losses() -> Iterator[list[float]]:
    """The losses from which gradients are taken meanwhile, whoever computes them."""
    losses: list[float] = []
    backward = Tensor.backward

    def recording(loss: Tensor, *arguments: Any, **named: Any) -> None:
        losses.append(loss.item())
        backward(loss, *arguments, **named)

    with patch.object(Tensor, "backward", recording):
        yield losses


def both_losses(case: Case, recipe: ReconstructRecipe) -> tuple[list[float], list[float]]:
    """The losses of the plain loop's and of CalibQuant's steps, each on one and the same batch of images."""
    few = _first(case.data, recipe)
    with recorded_losses() as plain_losses:
        inputs = (few.quantized, few.float_input, few.target)
        plain.learn(case.plain_unit(), *inputs, settings_of(recipe), lambda count, _: torch.arange(count))
    whole = recipe.model_copy(update={"sampling": "without_replacement"})  # every batch is all images, in some order
    with recorded_losses() as engine_losses:
        case.engine(whole, few)
    return plain_losses, engine_losses


def _first(data: UnitData, recipe: ReconstructRecipe) -> UnitData:
    rows = slice(0, recipe.batch_size)
    return UnitData(quantized=data.quantized[rows], float_input=data.float_input[rows], target=data.target[rows])


def check(case: Case, recipe: ReconstructRecipe) -> dict[str, float]:
    """How far the loops' losses are apart.

    Raises:
        SystemExit: they compute different things.
    """
    # Larger steps than QDrop's, so that wrong gradients would soon show; the regularizer would hide the features' loss.
    fast = recipe.model_copy(update={"iterations": 10, "rounding_lr": 1e-2, "scale_lr": 1e-3, "drop": 0.0})
    apart = {
        "features": _apart(*both_losses(case, fast.model_copy(update={"regularizer": 0.0}))),
        "with_regularizer": _apart(*both_losses(case, fast)),
    }
    still = {"iterations": 40, "rounding_lr": 1e-9, "scale_lr": 1e-9, "regularizer": 0.0}
    means = [[statistics.mean(losses)] for losses in both_losses(case, recipe.model_copy(update=still))]
    apart["mean_with_drop"] = _apart(*means)
    if max(apart["features"], apart["with_regularizer"]) > TOLERANCE or apart["mean_with_drop"] > DROP_TOLERANCE:
        raise SystemExit(f"{case.unit.name}: the loops compute different losses, relative differences {apart}")
    return apart


def _apart(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=True))


# --- timing -----------------------------------------------------------------------------------------------------------


class Clock:
    """Hears of each forward pass of a learning step; judging, without gradients, is not counted."""

    def __init__(self, on_pass: Callable[[int], None] | None = None) -> None:
        self.marks: list[float] = []
        self.on_pass = on_pass

    def __call__(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.marks.append(time.perf_counter())
            if self.on_pass:
                self.on_pass(len(self.marks))

    @property
    def milliseconds(self) -> float:
        """Of an iteration."""
        return 1000 * (self.marks[-1] - self.marks[0]) / (len(self.marks) - 1)


@contextmanager
def heard(module: nn.Module, clock: Clock) -> Iterator[None]:
    """Within the context the clock hears of the module's forward passes."""
    handle = module.register_forward_pre_hook(clock)
    try:
        yield
    finally:
        handle.remove()


def time_plain(case: Case, recipe: ReconstructRecipe) -> float:
    """Milliseconds of an iteration of the plain loop."""
    unit, clock = case.plain_unit(), Clock()
    torch.manual_seed(1005)
    with heard(unit, clock):
        plain.learn(unit, case.data.quantized, case.data.float_input, case.data.target, settings_of(recipe))
    return clock.milliseconds


def time_engine(case: Case, recipe: ReconstructRecipe) -> float:
    """Milliseconds of an iteration of CalibQuant's loop."""
    clock = Clock()
    with heard(case.part, clock):
        case.engine(recipe)
    return clock.milliseconds


def timed_rounds(case: Case, recipe: ReconstructRecipe, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of an iteration in each round, of the plain loop and of CalibQuant's; who begins alternates."""
    plain_ms, engine_ms = [], []
    for number in range(rounds):
        if number % 2 == 0:
            plain_ms.append(time_plain(case, recipe))
        engine_ms.append(time_engine(case, recipe))
        if number % 2 == 1:
            plain_ms.append(time_plain(case, recipe))
    return plain_ms, engine_ms


# --- where CalibQuant's time goes -------------------------------------------------------------------------------------


def split(case: Case, recipe: ReconstructRecipe) -> dict[str, float]:
    """Milliseconds of an iteration of CalibQuant's loop by group, by the profiler's self times."""
    # Not record_shapes: it keeps tensors' small parts alive, so that large ones are mapped anew in every iteration.
    profiler = profile(activities=[ProfilerActivity.CPU])

    def on_pass(number: int) -> None:
        if number == 2:
            profiler.start()
        elif number == recipe.iterations:
            profiler.stop()

    clock = Clock(on_pass)
    with heard(case.part, clock):
        case.engine(recipe)
    steps, found = recipe.iterations - 2, defaultdict[str, float](float)
    for event, group in grouped(profiler.events() or []):
        found[group] += event.self_cpu_time_total / 1000 / steps
    whole = 1000 * (clock.marks[-1] - clock.marks[1]) / steps
    found[BETWEEN] = whole - sum(found.values())
    return {group: found[group] for group in ORDER}


# --- reporting --------------------------------------------------------------------------------------------------------


def measure(case: Case, recipe: ReconstructRecipe, rounds: int) -> dict[str, Any]:
    """Everything about one unit."""
    apart = check(case, recipe)
    plain_ms, engine_ms = timed_rounds(case, recipe, rounds)
    print(case.unit.name, f"{statistics.median(plain_ms):.2f} {statistics.median(engine_ms):.2f} ms", flush=True)
    few = recipe.model_copy(update={"iterations": min(recipe.iterations, 50)})
    return {"unit": case.unit.name, "differences": apart, "plain_ms": plain_ms, "engine_ms": engine_ms,
            "split_ms": split(case, few)}  # fmt: skip


def add_up(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Several units as one: an iteration of each."""
    split_ms = {group: sum(row["split_ms"][group] for row in rows) for group in ORDER}
    sums = {side: [sum(ms) for ms in zip(*(r[side] for r in rows), strict=True)] for side in ("plain_ms", "engine_ms")}
    return {"unit": name, **sums, "split_ms": split_ms}


def unit_type(row: dict[str, Any]) -> str:
    """The stage a unit belongs to."""
    return row["unit"].split(".")[0]


def ratio_quartiles(row: dict[str, Any]) -> list[float]:
    """Of CalibQuant's time over the plain loop's in the same round."""
    ratios = [ours / plains for ours, plains in zip(row["engine_ms"], row["plain_ms"], strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3


def times_table(rows: list[dict[str, Any]]) -> str:
    """unit | plain ms | CalibQuant ms | ratio."""
    lines = []
    for row in rows:
        medians = [f"{statistics.median(row[side]):.2f}" for side in ("plain_ms", "engine_ms")]
        low, middle, high = row["ratio_quartiles"]
        lines.append([row["unit"], *medians, f"{middle:.3f}", f"{low:.3f} … {high:.3f}"])
    return common.table(["unit", "plain ms", "CalibQuant ms", "ratio", "its quartiles"], lines)


def split_table(rows: list[dict[str, Any]]) -> str:
    """Stage | share of each group | profiled | without profiler."""
    stages = defaultdict(list)
    for row in rows:
        stages[unit_type(row)].append(row)
    lines = []
    for row in [*(add_up(stage, members) for stage, members in stages.items()), add_up("all units", rows)]:
        whole = sum(row["split_ms"].values())
        shares = [f"{100 * row['split_ms'][group] / whole:.1f}" for group in ORDER]
        lines.append([row["unit"], *shares, f"{whole:.2f}", f"{statistics.median(row['engine_ms']):.2f}"])
    return common.table(["units, %", *ORDER, "profiled ms", "without profiler ms"], lines)


def pin() -> int | None:
    """One thread on one core, where the system lets us choose it; the core."""
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=100, help="of each round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--images", type=int, default=1024)
    given = parser.parse_args()
    core = pin()
    recipe = load_recipe(CONFIG, [
        "preset=qdrop-reference", f"model.weights={given.data / 'weights' / 'resnet20-12fca82f.th'}",
        f"data.root={given.data}", "quant.weights.bits=2", "quant.activations.bits=2",
        f"calibration.count={given.images}", f"reconstruct.iterations={given.iterations}",
        "reconstruct.regularizer=0.01",
    ])  # fmt: skip
    rows = [measure(case, recipe.reconstruct, given.rounds) for case in cases(recipe)]
    rows.append(add_up("all units", rows))
    for row in rows:
        row["ratio_quartiles"] = ratio_quartiles(row)
    count = f"{given.rounds} rounds of {given.iterations} iterations, batch {recipe.reconstruct.batch_size}"
    text = f"""ResNet-20, {recipe.setting}: milliseconds of an iteration on one pinned thread, medians of {count};
{given.images} images are cached. The ratios are of the two times in the same round.

{times_table(rows)}
Where CalibQuant's time goes:

{split_table(rows[:-1])}
{NOTES}
"""
    environment = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_", "MALLOC_"))}
    facts = {"core": core, "environment": environment, "iterations": given.iterations, "rounds": given.rounds,
             "images": given.images, "units": rows}  # fmt: skip
    command = f"OMP_NUM_THREADS=1 python benchmarks/step_time.py --data DATA --iterations {given.iterations} "
    common.write("step_time", command + f"--rounds {given.rounds} --images {given.images}", facts, text)


if __name__ == "__main__":
    main()
