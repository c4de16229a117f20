"""Gram rounding of a network: roundings in closed form, layer by layer, without a step of gradient descent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx

from calibquant.errors import QuantizationError
from calibquant.features import Features, FeatureStore, take
from calibquant.graph.nodes import activations_of, op_of, weight_of
from calibquant.graph.products import Product
from calibquant.graph.subgraph import subgraph
from calibquant.numerics.affine import QTensor, aligned, code_limits
from calibquant.numerics.gram import Moments, RowGrid, round_rows
from calibquant.quantization import QuantModel
from calibquant.quantization.model import parameter_tensors
from calibquant.recipe import ReconstructRecipe
from calibquant.reconstruction.engine import FEWEST, HELD_OUT, Progress
from calibquant.reconstruction.network import BATCH, quantized_input, unit_seed

FEWEST_POSITIONS = 32  # of an image that count, at least, where it has so many
LARGEST = 8192  # weights of an output channel, whose Gram matrices take half a gigabyte each, several at a time
POSITIONS = 256  # over all images, for each weight of a row: positions of one image say much the same


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer.

    Args:
        layer: name of its weight.
        loss_before, loss_after: squared error of its outputs over the squared float outputs, on the judging images.
        kept: whether the new codes and scales were kept.
        seconds: time it took.
    """

    layer: str
    loss_before: float
    loss_after: float
    kept: bool
    seconds: float


def gram_layers(model: QuantModel) -> dict[str, list[fx.Node]]:
    """The weights that `round_weights` rounds, in execution order, and the nodes that multiply by them.

    A weight that any node reads otherwise, as an embedding does, is left out, and so is one with more than `LARGEST`
    weights for an output channel, as the first linear of a VGG.
    """
    found: dict[str, list[fx.Node]] = {}
    for node in model.teacher.graph.nodes:
        weight = weight_of(node)
        if weight is not None and str(weight.target) in model.weight_quantizers:
            found.setdefault(str(weight.target), []).append(node)
    tensors = parameter_tensors(model.teacher)
    products = {name: nodes for name, nodes in found.items() if all(_product_or_none(node) for node in nodes)}
    return {name: nodes for name, nodes in products.items() if _row_length(nodes[0], tensors[name]) <= LARGEST}


def round_weights(
    model: QuantModel,
    images: Tensor,
    recipe: ReconstructRecipe,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    done_layers: int = 0,
    folder: Path | None = None,
) -> Iterator[LayerReport]:
    """Round every layer so that, on what the already rounded network feeds it, it gives the float network's output.

    The weights wanted are thus not the float ones but those that also make up for the error of the layers before. A
    weight used at several places is rounded for all of them at once, at the first.

    Args:
        model: calibrated, on `device`; its weight quantizers receive codes and scales layer by layer.
        images: float32, (N, C, H, W), the calibration images.
        recipe: says whether held-out images judge (`never_worse`), and how features are kept.
        seed: of the positions that are drawn; every layer has its own random stream.
        device: where the network runs; features and solutions are on the CPU.
        progress: called with (layers done, layers in all, name of the layer).
        done_layers: so many layers were rounded before and are only passed through.
        folder: where features beyond the recipe's memory limit are mapped.

    Yields:
        a report after each layer.

    Raises:
        QuantizationError: what a layer reads is not finite.
    """
    layers, store = gram_layers(model), FeatureStore(getattr(torch, recipe.cache), recipe.cache_limit * 1e9, folder)
    graph, entering = model.teacher.graph, quantized_input(model, images, device)
    float_side = Features(graph, partial(subgraph, model.teacher), images, BATCH, device, store)
    quantized_side = Features(graph, model.part, entering, BATCH, device, store)
    for number, (name, nodes) in enumerate(layers.items()):
        begin = time.perf_counter()
        if number >= done_layers:
            for side in (quantized_side, float_side):
                side.advance(nodes[0].name)
            weight = parameter_tensors(model.teacher)[name]
            inputs = (_inputs(side, nodes) for side in (quantized_side, float_side))
            places = [
                _Place(node, weight, x, y, float_side.batch_size, device)
                for node, x, y in zip(nodes, *inputs, strict=True)
            ]
            before, after, kept = _round(model, name, places, recipe.never_worse, unit_seed(seed, number))
            del places  # before the next layer's features take their place
            yield LayerReport(name, before, after, kept, time.perf_counter() - begin)
        if progress:
            progress(number + 1, len(layers), name)


@dataclass(frozen=True)
class _Place:
    """A node that multiplies by the weight, and what enters it in the quantized and in the float network, (N, ...)."""

    node: fx.Node
    weight: Tensor
    quantized: Tensor
    reference: Tensor
    batch_size: int
    device: torch.device | str

    def moments(self, rows: Tensor, generator: torch.Generator) -> Moments:
        """Of some images, at positions drawn anew for each batch of them."""
        op, product, groups = op_of(self.node), _product(self.node), _groups(self.node)
        assert op is not None
        many = max(FEWEST_POSITIONS, -(-POSITIONS * _row_length(self.node, self.weight) // len(rows)))
        total: Moments | None = None
        for some in rows.split(self.batch_size):
            with torch.no_grad():
                x, reference = (take(values, some, self.device) for values in (self.quantized, self.reference))
                y = product.outputs(op.run(reference, self.weight, None, **self.node.kwargs), groups)
                chosen = torch.randperm(y.shape[3], generator=generator)[:many]
                x = product.columns(x, self.weight.shape, chosen, **self.node.kwargs)
                y = y.index_select(3, chosen.to(y.device)).permute(1, 2, 0, 3).flatten(2)
                sums = x @ x.mT, y @ x.mT, y.square().sum(2)
            part = Moments(*(value.cpu().double() for value in sums))
            total = part if total is None else total + part
        assert total is not None
        return total

    def rows(self, weight: Tensor) -> Tensor:
        """A weight as float64 rows (G, O, K) on the CPU."""
        return _product(self.node).rows(weight.cpu(), _groups(self.node)).double()


def _round(
    model: QuantModel, name: str, places: Sequence[_Place], never_worse: bool, seed: int
) -> tuple[float, float, bool]:
    """Round a weight and keep what helps on the judging images; relative errors before and after, and whether kept."""
    images = torch.arange(len(places[0].quantized))
    held_out = never_worse and len(images) >= FEWEST
    generator = torch.Generator().manual_seed(seed)
    learned = _sum([p.moments(images[images % HELD_OUT != 0] if held_out else images, generator) for p in places])
    judging = _sum([p.moments(images[::HELD_OUT], generator) for p in places]) if held_out else learned
    if not torch.isfinite(learned.gram).all() or not torch.isfinite(learned.cross).all():
        raise QuantizationError(name, "reads NaN or infinite activations", "check the calibration images")
    quantizer, place = model.weight_quantizers[name], places[0]
    start = quantizer.get()
    found = rounded(place.weight, start, place.node, learned)
    energy = max(float(judging.energy.sum()), 1e-30)
    before, after = (float(judging.errors(place.rows(q.dequantize())).sum()) / energy for q in (start, found))
    if after < before:
        quantizer.set(found)
    return before, after, after < before


def rounded(weight: Tensor, start: QTensor, node: fx.Node, moments: Moments) -> QTensor:
    """Codes and scales of small output error; zero points, grid and bits of channels are those of `start`.

    Args:
        weight: float32, the parameter.
        start: its codes, whose scales are the first.
        node: an op with a product that multiplies by it.
        moments: of the op's inputs and wanted outputs.
    """
    product, groups = _product(node), _groups(node)
    cpu, zero = weight.detach().cpu(), start.zero_point.cpu()
    scales = torch.arange(zero.numel()).reshape(zero.shape)
    owner = product.rows(aligned(scales, cpu, start.granularity).expand(cpu.shape), groups)[:, :, 0]
    low, high = (limit - zero.reshape(-1).double() for limit in _limits(start))
    levels = start.levels
    if levels is not None:
        levels = levels.cpu().double().reshape(-1, levels.shape[-1]).expand(zero.numel(), -1)
    grid = RowGrid(start.scale.cpu().reshape(-1).double(), low, high, owner, levels)
    integers, grid = round_rows(product.rows(cpu, groups).double(), moments, grid)
    codes = product.weight(integers, cpu.shape) + aligned(zero, cpu, start.granularity)
    scale = grid.scale.float().reshape(start.scale.shape)
    return replace(start, codes=codes.to(weight.device, start.grid.dtype), scale=scale.to(weight.device))


def _limits(value: QTensor) -> tuple[Tensor | int, Tensor | int]:
    """Lowest and highest code, of each channel where channels differ in bits."""
    if value.channel_bits is None:
        return value.grid.qmin, value.grid.qmax
    return code_limits(value.channel_bits.cpu(), value.grid.signed)


def _inputs(side: Features, nodes: Sequence[fx.Node]) -> list[Tensor]:
    """What enters each of the nodes, to the first of which the features have advanced."""
    sources = [activations_of(node)[0].name for node in nodes]
    later = [name for name in dict.fromkeys(sources) if name not in side.live]
    found = dict(side.live)
    if later:  # the network as it is now, up to the last of the nodes
        ahead = [n.name for n in side.order[side.done : side.position[nodes[-1].name]]]
        found |= dict(zip(later, side.run(ahead, later), strict=True))
    return [found[name] for name in sources]


def _sum(parts: Sequence[Moments]) -> Moments:
    return sum(parts[1:], parts[0])


def _product_or_none(node: fx.Node) -> Product | None:
    op = op_of(node)
    return op.product if op else None


def _product(node: fx.Node) -> Product:
    product = _product_or_none(node)
    assert product is not None
    return product


def _row_length(node: fx.Node, weight: Tensor) -> int:
    """How many weights an output channel has."""
    return _product(node).rows(weight, _groups(node)).shape[2]


def _groups(node: fx.Node) -> int:
    groups = node.kwargs.get("groups", 1)
    assert isinstance(groups, int)
    return groups
