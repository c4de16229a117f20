"""Reconstruction of a whole network, unit by unit in execution order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from calibquant import parallel
from calibquant.features import Features, FeatureStore, take
from calibquant.graph import Unit, units, whole_network
from calibquant.graph.subgraph import subgraph
from calibquant.quantization import QuantModel
from calibquant.recipe import ReconstructRecipe
from calibquant.reconstruction.augmenting import versions
from calibquant.reconstruction.engine import Progress, UnitData, UnitReport, learn_unit
from calibquant.reconstruction.losses import importance_of
from calibquant.reconstruction.phases import Phase, granularity, phases
from calibquant.reconstruction.whole import learn_network

BATCH = 64  # images in one forward pass while features advance, at most


def planned_units(model: QuantModel, recipe: ReconstructRecipe, phase: Phase) -> list[Unit]:
    """The units that `reconstruct` learns in a phase, in order: those that hold something to learn.

    A weight counts in the first unit that holds it, an activation where its range is stored. In the phase of the whole
    network it is the only unit.
    """
    if phase.name == "network":
        return [whole_network(model.teacher.graph)]
    chain, held = [], set[str]()
    for unit in units(model.teacher.graph, granularity(recipe)):
        quantizers = [q for name, q in model.activation_quantizers.items() if name in unit.nodes]
        fresh = not held.issuperset(unit.weights)
        if (phase.roundings and fresh) or (not phase.roundings and any(not q.dynamic for q in quantizers)):
            chain.append(unit)
        held.update(unit.weights)
    return chain[recipe.skip_first :]


def reconstruct(
    model: QuantModel,
    images: Tensor,
    recipe: ReconstructRecipe,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    done_units: int = 0,
    observe: Callable[[], None] | None = None,
    folder: Path | None = None,
) -> Iterator[UnitReport]:
    """Learn every unit on what the already reconstructed network feeds it.

    A weight that several units share is learned in the first of them: to change it later would change what the units in
    between were fed with.

    Args:
        model: calibrated, on `device`; its quantizers receive the result unit by unit.
        images: float32, (N, C, H, W), the calibration images, in all processes the same; each keeps the features of
            its share, and a step's gradients are summed.
        recipe: method and schedule.
        seed: every unit has its own random stream, made of this and its number.
        device: where units are learned; features are kept on the CPU.
        progress: called with (steps done, steps in all, where it stands in words) over all units.
        done_units: so many units were learned before and are only passed through; what follows is the same to the bit.
        observe: finds the activation ranges again, on the network with its learned weights; called before the second
            phase of a method that has two (BRECQ).
        folder: where features beyond the recipe's memory limit are mapped; none takes the system's temporary folder.

    Yields:
        a report after each unit.

    Sources: AdaRound (Nagel et al., ICML 2020) for `adaround`; BRECQ (Li et al., ICLR 2021) for `brecq`; QDrop (Wei et
    al., ICLR 2022) for `qdrop`.
    """
    plan = [(phase, planned_units(model, recipe, phase)) for phase in phases(recipe)]
    store = FeatureStore(getattr(torch, recipe.cache), recipe.cache_limit * 1e9, folder)
    total = sum(phase.iterations * len(chain) for phase, chain in plan)
    steps = first = 0
    for phase, chain in plan:
        begun = min(max(done_units - first, 0), len(chain))
        tell = None if progress is None else partial(_shifted, progress, steps, total)
        if phase.name == "network":
            if begun < len(chain):
                named = None if tell is None else partial(_named, tell, "network", 0)
                yield learn_network(model, images, recipe, phase, unit_seed(seed, first), device, named)
            continue
        if first and begun == 0 and observe is not None:
            observe()
        if begun < len(chain):
            views = recipe.views if images.dim() == 4 and images.is_floating_point() else 1
            shown = versions(images, views, seed)
            mine = parallel.share(len(shown))
            walk = _Walk(
                model,
                shown[mine.start : mine.stop],
                len(shown),
                views,
                chain,
                recipe,
                phase,
                seed,
                device,
                store,
                first,
            )
            del shown
            yield from walk.learn(begun, tell)
        steps += len(chain) * phase.iterations
        first += len(chain)


@dataclass(frozen=True)
class _Walk:
    """One phase's way through the network.

    `images` are this process's, `count` those of all, each in so many `views`; `first` is the number of its first unit
    over all phases.
    """

    model: QuantModel
    images: Tensor
    count: int
    views: int
    chain: list[Unit]
    recipe: ReconstructRecipe
    phase: Phase
    seed: int
    device: torch.device | str
    store: FeatureStore
    first: int

    def learn(self, begun: int, progress: Progress | None) -> Iterator[UnitReport]:
        model, phase, device = self.model, self.phase, self.device
        model.enable(activations=phase.scales)
        try:
            graph, batch = model.teacher.graph, max(self.recipe.batch_size, BATCH)
            entering = quantized_input(model, self.images, device)
            float_side = Features(graph, partial(subgraph, model.teacher), self.images, batch, device, self.store)
            quantized_side = Features(graph, model.part, entering, batch, device, self.store)
            learned: set[str] = set()
            for number, unit in enumerate(self.chain):
                for side in (float_side, quantized_side):
                    side.advance(unit.nodes[0])
                if number >= begun:
                    data = self._data(unit, float_side, quantized_side)
                    part = model.part(unit.nodes, [unit.output])
                    tell = None if progress is None else partial(_named, progress, unit.name, number * phase.iterations)
                    stream = unit_seed(self.seed, self.first + number)
                    yield learn_unit(unit.name, part, data, self.recipe, phase, stream, device, tell, learned)
                    del data, part  # before the next unit's features take their place
                learned.update(unit.weights)
        finally:
            model.enable()

    def _data(self, unit: Unit, float_side: Features, quantized_side: Features) -> UnitData:
        (target,) = float_side.run(unit.nodes, [unit.output])
        importance = None
        if self.recipe.loss == "fisher" and self.phase.roundings:
            importance = self._importance(unit, quantized_side)
        inputs = quantized_side.live[unit.input], float_side.live[unit.input]
        return UnitData(*inputs, target, importance, self.count, self.views)

    def _importance(self, unit: Unit, side: Features) -> Tensor:
        """Weights of the values of the unit's output in its loss."""
        values = self._gradient(unit, side)
        parts = values.split(side.batch_size)
        square = parallel.total(sum(float(part.double().square().sum()) for part in parts))
        mean_square = square / (values[0].numel() * self.count)
        for part in parts:
            part.copy_(importance_of(part.float(), mean_square))
        return values

    def _gradient(self, unit: Unit, side: Features) -> Tensor:
        """Gradient of KL(float network || quantized up to this unit, float behind it) at the unit's output."""
        teacher, position = self.model.teacher, side.position
        head = self.model.part(unit.nodes, [unit.output])
        later = [n for n in side.order[position[unit.nodes[0]] :] if n.op == "call_function"]
        behind = [n.name for n in later if n.name not in unit.nodes]
        (logits,) = next(n for n in teacher.graph.nodes if n.op == "output").all_input_nodes
        tail = subgraph(teacher, behind, [logits.name]) if behind else None
        entries = [] if tail is None else [n.name for n in tail.graph.nodes if n.op == "placeholder"]
        gradients = torch.empty(0)
        for start in range(0, len(self.images), side.batch_size):
            rows = slice(start, start + side.batch_size)
            with torch.no_grad():
                want = teacher(self.images[rows].to(self.device)).softmax(1)
                output = head(take(side.live[unit.input], rows, self.device))
            with torch.enable_grad():
                output.requires_grad_()
                inputs = [output if e == unit.output else take(side.live[e], rows, self.device) for e in entries]
                got = output if tail is None else tail(*inputs)
                loss = F.kl_div(got.log_softmax(1), want, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, output)
            if not len(gradients):
                gradients = self.store.allocate((len(self.images), *gradient.shape[1:]))
            gradients[rows] = gradient.cpu()
        return gradients


def quantized_input(model: QuantModel, images: Tensor, device: torch.device | str) -> Tensor:
    """What enters the quantized network: the images on the grid of its input's quantizer, if it has one."""
    name = next(n.name for n in model.teacher.graph.nodes if n.op == "placeholder")
    quantizer = model.activation_quantizers.get(name)
    if quantizer is None or not quantizer.enabled:
        return images
    with torch.no_grad():
        return torch.cat([quantizer(part.to(device)).cpu() for part in images.split(BATCH)])


def unit_seed(seed: int, number: int) -> int:
    """A unit's own seed. Neighbouring seeds share none, as seed + number would."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _shifted(progress: Progress, before: int, total: int, done: int, _: int, where: str) -> None:
    progress(before + done, total, where)


def _named(progress: Progress, unit: str, before: int, done: int, total: int, words: str) -> None:
    progress(before + done, total, f"{unit}: {words}")
