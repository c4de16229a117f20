"""What enters the network of a saved run: its calibration images again, or random ones where there are none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, fx, nn

from calibquant.data import ImageSet, Manifest, batches, find_images, read_manifest
from calibquant.errors import CalibQuantError, RunFolderError
from calibquant.export.parity import IMAGES, chunk_size, image_count
from calibquant.graph import capture, fold_batch_norm
from calibquant.graph.nodes import op_of, weight_of
from calibquant.networks import float_copy
from calibquant.pipeline.preparing import Prepared, build, open_calibration
from calibquant.pipeline.writing import network_hash
from calibquant.quantization import QuantModel
from calibquant.quantization.quantizers import ActivationQuantizer
from calibquant.recipe import Recipe
from calibquant.runfolder import RECEIPT, RunFolder

RANDOM, CALIBRATION = "random images", "calibration images"
PARITY = "parity.json"
LIVE_IMAGES = "the run was made of live images, so its network cannot be captured again"
LIVE_NETWORK = "the run was made of a live network, whose float weights are not in the run"
OTHER_NETWORK = "the recipe's network is not the one that was quantized"
SIZES = (32, 224, 28, 16, 64, 96, 128, 160, 192, 240, 256, 288, 299, 320, 384, 416, 448, 512, 640, 8, 12, 20, 24, 48)


@dataclass(frozen=True, eq=False)
class RunInputs:
    """A saved network and what it is run on.

    Args:
        tensors: float32 (N, ...), one for each input of the network.
        what: "calibration images" or "random images".
        model: the run's network, upon its float network where the recipe still gives it.
        missing: why it does not, in words; then the model's float weights are the dequantized codes.
    """

    tensors: tuple[Tensor, ...]
    what: str
    model: QuantModel
    missing: str


def run_inputs(
    folder: RunFolder, recipe: Recipe, model: QuantModel, shape: Sequence[int] | None = None, count: int = IMAGES
) -> RunInputs:
    """The first calibration images of a run, as they enter its network (for a part, what the float network feeds it).

    Args:
        folder: the run.
        recipe: its recipe, perhaps with another `data.root`.
        model: its network.
        shape: of one random image, for runs of live images; None finds one that the network takes.
        count: how many images.

    Raises:
        DataError: the images are not there, or are not those that the run was calibrated on.
        RunFolderError: the run was calibrated on live images, and no shape fits its network.
    """
    manifest = read_manifest(folder.path_of("manifest.csv"))
    live = recipe.data.kind is None or manifest.rows[0].path.startswith("tensor#")
    host, missing = _host(recipe)
    if live or (host is None and recipe.model.submodule is not None):
        return RunInputs(_random(model, recipe, shape, count, folder), RANDOM, model, missing or LIVE_IMAGES)
    images = _images(recipe, manifest, count)
    if host is None:
        shape = next(batches(images, 1)).images.shape
        chosen = range(min(len(images), image_count(shape, count)))
        whole = torch.cat([batch.images for batch in batches(images, chunk_size(shape), chosen)])
        return RunInputs((whole,), CALIBRATION, model, missing)
    example = next(batches(images, 3, range(min(3, len(images))))).images
    teacher = fold_batch_norm(capture(host, example, recipe.model.submodule))
    chunks = entering(Prepared(host, teacher, recipe.model.submodule, images, manifest, None), count)
    inputs = tuple(torch.cat(column) for column in zip(*chunks, strict=True))
    whole_model = _upon(teacher, model, folder)
    return RunInputs(inputs, CALIBRATION, whole_model or model, "" if whole_model else OTHER_NETWORK)


def _upon(teacher: fx.GraphModule, model: QuantModel, folder: RunFolder) -> QuantModel | None:
    """A loaded model upon the float network that it was made of; None if this is another."""
    if [node.name for node in teacher.graph.nodes] != [node.name for node in model.teacher.graph.nodes]:
        return None
    made = QuantModel(teacher, model.plan, shared=model)
    return made if network_hash(made) == folder.read_json(RECEIPT).get("network") else None


def entering(prepared: Prepared, count: int = IMAGES) -> Iterator[tuple[Tensor, ...]]:
    """What enters the teacher for the first calibration images, some at a time: one tensor (N, ...) for each input.

    Of a part that is called with tensors of several sizes those of its first call's size are taken. Of large images
    fewer are taken, see `parity.image_count`.
    """
    shape = next(prepared.batches(1, slice(1))).shape
    left = image_count(shape, count)
    seen, sizes = prepared.inputs(chunk_size(shape), left), None
    while left > 0 and (call := tuple(islice(seen, prepared.entries))):
        sizes = sizes or [t.shape[1:] for t in call]
        if [t.shape[1:] for t in call] == sizes:
            yield tuple(t[:left].contiguous() for t in call)
            left -= len(call[0])


def _host(recipe: Recipe) -> tuple[nn.Module | None, str]:
    """The recipe's network, or None and why it cannot be built."""
    if recipe.model.name is None:
        return None, LIVE_NETWORK
    try:
        return float_copy(build(recipe)), ""
    except CalibQuantError as error:
        return None, str(error)


def _images(recipe: Recipe, manifest: Manifest, count: int) -> ImageSet:
    images = open_calibration(recipe)
    return images.subset(find_images(images, manifest.rows[:count]))


def _random(
    model: QuantModel, recipe: Recipe, shape: Sequence[int] | None, count: int, folder: RunFolder
) -> tuple[Tensor, ...]:
    """Random images within the ranges of the inputs' quantizers."""
    entries = [n.name for n in model.teacher.graph.nodes if n.op == "placeholder"]
    given = iter([[tuple(shape)]] if shape is not None else _known_shapes(folder, model.teacher))
    chosen = next((s for s in given if len(s) == len(entries) and _takes(model, s)), None)
    if chosen is None:
        problem = "was calibrated on live images, and no image size was found that its network takes"
        raise RunFolderError(folder.path, problem, "give the size of one image with --input, e.g. --input 3,224,224")
    random = torch.Generator().manual_seed(recipe.seed)
    count = image_count((1, *chosen[0]), count)
    return tuple(
        _between(torch.rand((count, *size), generator=random), model.activation_quantizers.get(name))
        for name, size in zip(entries, chosen, strict=True)
    )


def _between(random: Tensor, quantizer: ActivationQuantizer | None) -> Tensor:
    """Numbers of 0 to 1, spread over the range of a quantizer."""
    low, high = -2.0, 2.0
    if quantizer is not None and not quantizer.dynamic:
        scale, zero_point = quantizer.get()
        grid = quantizer.plan.grid
        low = float(((grid.qmin - zero_point) * scale).min())
        high = float(((grid.qmax - zero_point) * scale).max())
    return random * (high - low) + low


def _known_shapes(folder: RunFolder, graph: fx.GraphModule) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of one image for each input: those of an earlier export, then likely ones."""
    if folder.has(PARITY):
        stored = folder.read_json(PARITY)
        sizes = stored.get("input") if isinstance(stored, dict) else None
        if isinstance(sizes, list) and all(_is_size(size) for size in sizes):
            yield [tuple(size) for size in sizes]
    yield from ([size] for size in _shapes(graph))


def _is_size(value: object) -> bool:
    """Whether this is the shape of an image that a network may take, of at most 64 million numbers."""
    numbers = value if isinstance(value, list) else []
    return 0 < len(numbers) <= 4 and all(type(n) is int and n > 0 for n in numbers) and math.prod(numbers) < 1 << 26


def _shapes(graph: fx.GraphModule) -> Iterator[tuple[int, ...]]:
    """Shapes of one image that the first layer takes."""
    first = next(node for node in graph.graph.nodes if weight_of(node) is not None)
    weight = dict(graph.named_buffers())[str(weight_of(first).target)]  # type: ignore[union-attr]
    transposed = op_of(first).weight_axis == 1  # type: ignore[union-attr]
    channels = weight.shape[0] if transposed else weight.shape[1] * first.kwargs.get("groups", 1)
    if weight.dim() == 2:
        yield (channels,)
    for size in SIZES:
        yield (channels, *[size] * max(weight.dim() - 2, 2 if weight.dim() == 2 else 1))


def _takes(model: QuantModel, shapes: list[tuple[int, ...]]) -> bool:
    with suppress(RuntimeError, ValueError, IndexError, TypeError, OverflowError), torch.inference_mode():
        model(*(torch.zeros(2, *shape) for shape in shapes))
        return True
    return False
