"""How much memory a run takes, from the sizes of what flows through its network.

The shares of the stages are measured (benchmarks/results/memory.md); expect the sum within a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from calibquant.data.loading import images_within
from calibquant.evaluation.evaluate import MOST_AT_ONCE
from calibquant.graph import Unit, units, whole_network
from calibquant.graph.watching import Watched
from calibquant.parallel import images_at_once, in_bfloat16
from calibquant.pipeline.stages import rounds
from calibquant.quantization import QuantModel
from calibquant.recipe import AugmentRecipe, Recipe
from calibquant.reconstruction.network import BATCH, planned_units
from calibquant.reconstruction.phases import phases
from calibquant.training.source import kept_bytes

PARAMETERS = 3  # copies: the user's network, the teacher, and codes with what is dequantized for a layer
QUANTIZING = 3  # values of the size of a tensor that exist while it is quantized or observed
SCATTERED = 1.5  # memory held for memory in use: what is freed is kept, and does not fit everything that comes
LEARNING = 4  # values of the size of a tensor that its learned quantizer keeps until the gradient comes


def peak_bytes(
    recipe: Recipe,
    model: QuantModel,
    mount: Callable[[nn.Module], nn.Module],
    images: Tensor,
    n: int,
    trained: int,
    device: torch.device,
) -> int:
    """Bytes held at the run's most demanding moment, beside those of torch itself.

    Features beyond `reconstruct.cache_limit` lie in mapped files, which the system can take out of memory; they do not
    count.

    Args:
        recipe: of the run.
        model: as planned.
        mount: puts a part of the network where images reach it.
        images: some calibration images, (N, C, H, W) float32.
        n: how many calibration images there are.
        trained: from how many images `finetune` learns.
        device: where the network will run.
    """
    graph, settings = model.teacher.graph, recipe.reconstruct
    sizes = value_bytes(model.teacher, mount, images[:1])
    passing = live_bytes(graph, sizes) + QUANTIZING * max(sizes.values())
    measured = recipe.evaluation.batch_size or images_at_once(images.shape, MOST_AT_ONCE, device)
    observed = images_within(recipe.calibration.batch_size, images.shape)
    stages = [max(observed, measured) * passing]
    whole = images_at_once(images.shape, settings.network.batch_size, device)
    learned = {
        unit: whole if phase.name == "network" else settings.batch_size
        for phase in phases(settings)
        for unit in planned_units(model, settings, phase)
    }
    if learned or rounds(recipe) or recipe.quant.bias_correction == "empirical":
        chain = [*learned] or units(graph, "layer")
        views = settings.views if learned else 1
        features = n * views * feature_bytes(graph, sizes, chain) * getattr(torch, settings.cache).itemsize // 4
        batch = images_at_once(images.shape, max(settings.batch_size, BATCH), device)
        busy = [batch * passing, *(at_once * learning_bytes(model, u, sizes) for u, at_once in learned.items())]
        # The images are held as they are, and in all versions also on the grid of the input's quantizer.
        held = (2 * views + (views > 1)) * n * images[0].numel() * images.element_size()
        stages.append(held + int(min(features, settings.cache_limit * 1e9)) + max(busy))
    parameters = PARAMETERS * sum(value.numel() * value.element_size() for value in model.teacher.buffers())
    needed, training = SCATTERED * (parameters + max(stages)), recipe.finetune
    if training is not None:  # its steps are all alike, so that what is freed fits what comes
        stored = kept_bytes(trained, images, recipe.data.augment or AugmentRecipe())
        at_once = math.ceil(min(training.batch_size, trained) / training.accumulate)
        step = at_once * (passing + learning_bytes(model, whole_network(graph), sizes))
        needed = max(needed, parameters + stored + step / (2 if in_bfloat16(device, training.precision) else 1))
    return int(needed)


def value_bytes(teacher: fx.GraphModule, mount: Callable[[nn.Module], nn.Module], image: Tensor) -> dict[str, int]:
    """Bytes of the value of every node that gives a tensor, for one image."""
    found: dict[str, int] = {}

    def note(name: str, value: object) -> None:
        if isinstance(value, Tensor):
            found[name] = value.numel() * value.element_size()

    names = [node.name for node in teacher.graph.nodes if node.op in ("placeholder", "call_function")]
    with torch.inference_mode():
        mount(Watched(teacher, names, note))(image)
    return found


def live_bytes(graph: fx.Graph, sizes: Mapping[str, int]) -> int:
    """Largest sum of the values that are still to be read while a network runs, with what is being computed."""
    nodes = [node for node in graph.nodes if node.name in sizes]
    position = {node.name: i for i, node in enumerate(nodes)}
    until = {n: max((position.get(u.name, len(nodes)) for u in n.users), default=position[n.name]) for n in nodes}
    return max(sum(sizes[n.name] for n in nodes[: at + 1] if until[n] >= at) for at in range(len(nodes)))


def feature_bytes(graph: fx.Graph, sizes: Mapping[str, int], chain: Iterable[Unit]) -> int:
    """Largest sum, for one image, of what the features of two networks hold on their way from unit to unit.

    While the second network advances, what it held and what it will hold exist at once. The network's input is kept
    elsewhere.
    """
    nodes = [node for node in graph.nodes if node.name in sizes]
    position = {node.name: i for i, node in enumerate(nodes)}
    largest = before = 0
    for unit in chain:
        at = position[unit.nodes[0]]
        live = [n for n in nodes[:at] if any(position.get(u.name, len(nodes)) >= at for u in n.users)]
        held = sum(sizes[n.name] for n in live if n.op != "placeholder")
        largest = max(largest, before + 2 * held, 2 * held + sizes[unit.output])
        before = held
    return largest


def learning_bytes(model: QuantModel, unit: Unit, sizes: Mapping[str, int]) -> int:
    """What a step of a unit keeps for each image of its batch until the gradient has passed."""
    quantized = [sizes[name] for name in unit.nodes if name in model.activation_quantizers]
    others = [sizes[name] for name in unit.nodes if name not in model.activation_quantizers]
    return LEARNING * sum(quantized) + sum(others) + QUANTIZING * max([*quantized, *others])
