"""Reconstruction of a whole network, unit by unit in execution order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from calibquant.features import Features
from calibquant.graph import Unit, units
from calibquant.graph.subgraph import subgraph
from calibquant.quantization import QuantModel
from calibquant.recipe import ReconstructRecipe
from calibquant.reconstruction.engine import UnitData, UnitReport, learn_unit

GRANULARITY = {"adaround": "layer", "qdrop": "block"}


def planned_units(model: QuantModel, recipe: ReconstructRecipe) -> list[Unit]:
    """The units that `reconstruct` will learn, in order: those that hold a weight no earlier one holds."""
    chain, held = [], set[str]()
    for unit in units(model.teacher.graph, GRANULARITY[recipe.method]):
        if not held.issuperset(unit.weights):
            chain.append(unit)
        held.update(unit.weights)
    return chain


def reconstruct(
    model: QuantModel,
    images: Tensor,
    recipe: ReconstructRecipe,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    done_units: int = 0,
) -> Iterator[UnitReport]:
    """Learn every unit on what the already reconstructed network feeds it.

    A weight that several units share is learned in the first of them: to change it later would change what the units in
    between were fed with.

    Args:
        model: calibrated, on `device`; its quantizers receive the result unit by unit.
        images: float32, (N, C, H, W), the calibration images.
        recipe: method and schedule.
        seed: every unit has its own random stream, made of this and its number.
        device: where units are learned; features are kept on the CPU.
        progress: called with (steps done, steps in all) over all units.
        done_units: so many units were learned before and are only passed through; what follows is the same to the bit.

    Yields:
        a report after each unit.

    Sources: AdaRound (Nagel et al., ICML 2020) for `adaround`; BRECQ (Li et al., ICLR 2021) and QDrop (Wei et al., ICLR
    2022) for `qdrop`.
    """
    chain = planned_units(model, recipe)
    quantizer = next((q for n, q in model.activation_quantizers.items() if n == _input_name(model)), None)
    graph, batch = model.teacher.graph, max(recipe.batch_size, 64)
    with torch.no_grad():
        quantized_images = images
        if quantizer is not None:
            quantized_images = torch.cat([quantizer(part.to(device)).cpu() for part in images.split(batch)])
    float_side = Features(graph, partial(subgraph, model.teacher), images, batch, device)
    quantized_side = Features(graph, model.part, quantized_images, batch, device)
    learned: set[str] = set()
    for number, unit in enumerate(chain):
        for side in (float_side, quantized_side):
            side.advance(unit.nodes[0])
        if number < done_units:
            learned.update(unit.weights)
            continue
        (target,) = float_side.run(unit.nodes, [unit.output])
        data = UnitData(quantized_side.live[unit.input], float_side.live[unit.input], target)
        part = model.part(unit.nodes, [unit.output])
        done, total = number * recipe.iterations, len(chain) * recipe.iterations
        tell = None if progress is None else partial(_shifted, progress, done, total)
        yield learn_unit(unit.name, part, data, recipe, seed + number, device, tell, learned)
        learned.update(unit.weights)


def _shifted(progress: Callable[[int, int], None], before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _input_name(model: QuantModel) -> str:
    return next(n.name for n in model.teacher.graph.nodes if n.op == "placeholder")
