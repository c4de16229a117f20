"""The artifact: model.safetensors (codes, scales, float remainder) and graph.json, enough to rebuild the network.

Tensors of model.safetensors:

    <parameter>.codes        uint8, the codes packed flat at their grid's bits (numerics.packing)
    <parameter>.scale        float32, () or (C,)
    <parameter>.levels       int8, (n,) or (C, n), of a weight on a grid that is not uniform; its codes are places among
                             them, packed at ceil(log2(n)) bits
    <parameter>.zero_point   uint8, packed like codes; absent for symmetric weights
    <parameter>.channel_bits uint8, (C,), 0 to 8; only where channels share bits. Codes and zero points are then packed
                             channel after channel, each with its own bits
    <parameter>              float32, what is not quantized (biases, unfolded norms)
    activations.scale        float32, (A,), in the order of graph.json: those with one scale
    activations.zero_point   int32, (A,)
    activations.<node>.levels  uint8, (n,), the codes that occur, of an activation on a grid that is not uniform
    activations.<node>.scale, .zero_point, .channel_bits   (C,), of an activation with a scale for each channel
    bias_deltas.<node>       float32, (C,), what corrections add to the bias at a node; absent where there are none
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from calibquant.errors import RunFolderError
from calibquant.graph.serialize import from_json, input_shapes, to_json
from calibquant.numerics.affine import QTensor
from calibquant.numerics.allocation import MOST
from calibquant.numerics.grid import Grid, PerChannel, widest
from calibquant.numerics.levels import levels_at, places_of
from calibquant.numerics.packing import (
    channel_packed_bytes,
    pack,
    pack_channels,
    packed_bytes,
    unpack,
    unpack_channels,
)
from calibquant.quantization.model import QuantModel, parameter_tensors
from calibquant.quantization.plan import LevelPlan, QuantPlan, TensorPlan
from calibquant.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from calibquant.runfolder import FORMAT_VERSION, RunFolder, open_run

MODEL, GRAPH = "model.safetensors", "graph.json"
# What the parts of a damaged or hostile artifact raise: fields of other types, shapes beyond any memory.
DAMAGE = (
    KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, AssertionError, ArithmeticError,
    MemoryError, SafetensorError,
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Bytes of a network.

    Args:
        float32: all parameters as float32.
        packed: all tensors of model.safetensors.
        codes: the packed codes of the weights.
        scales: scales and zero points of weights and activations.
        remainder: what stays float32 (biases and their corrections, unfolded norms).
        weight_bits: average bits of a quantized weight.
    """

    float32: int
    packed: int
    codes: int
    scales: int
    remainder: int
    weight_bits: float


def artifact_tensors(model: QuantModel) -> dict[str, Tensor]:
    """The tensors of model.safetensors, by name.

    Raises:
        QuantizationError: a weight or an activation is not calibrated.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in parameter_tensors(model.teacher).items():
        if name not in model.weight_quantizers:
            tensors[name] = value.detach().cpu().contiguous()
            continue
        tensors |= _weight_tensors(name, model.weight_quantizers[name])
    single, channels = _stored_ranges(model)
    if single:
        pairs = [q.get() for q in single]
        tensors["activations.scale"] = torch.stack([scale.cpu() for scale, _ in pairs])
        tensors["activations.zero_point"] = torch.stack([zero_point.cpu() for _, zero_point in pairs])
    tensors |= {f"activations.{q.name}.levels": q.levels.cpu() for q in single if q.levels is not None}
    for activation in channels:
        scale, zero_point = activation.get()
        bits = activation.channel_bits
        own = {"scale": scale, "zero_point": zero_point}
        own |= {} if bits is None else {"channel_bits": bits.to(torch.uint8)}
        tensors |= {f"activations.{activation.name}.{key}": tensor.cpu() for key, tensor in own.items()}
    return tensors | {f"bias_deltas.{node}": delta.cpu() for node, delta in _deltas(model).items()}


def _deltas(model: QuantModel) -> dict[str, Tensor]:
    return {node: d.delta for node, d in model.bias_deltas.items() if d.delta is not None}


def _weight_tensors(name: str, quantizer: WeightQuantizer) -> dict[str, Tensor]:
    q, bits = quantizer.get(), quantizer.channel_bits
    tensors = {f"{name}.scale": q.scale.cpu()}
    if q.levels is not None:
        places = places_of(q.codes, q.levels, q.granularity).cpu()
        return tensors | {f"{name}.codes": pack(places, Grid(quantizer.plan.bits)), f"{name}.levels": q.levels.cpu()}
    if bits is None:
        tensors[f"{name}.codes"] = pack(q.codes, q.grid)
    else:
        tensors[f"{name}.codes"] = pack_channels(q.codes.movedim(_axis(quantizer.plan), 0), bits, q.grid.signed)
        tensors[f"{name}.channel_bits"] = bits.to(torch.uint8).cpu()
    if not quantizer.plan.symmetric:
        packed = pack(q.zero_point, q.grid) if bits is None else pack_channels(q.zero_point, bits, q.grid.signed)
        tensors[f"{name}.zero_point"] = packed
    return tensors


def _stored_ranges(model: QuantModel) -> tuple[list[ActivationQuantizer], list[ActivationQuantizer]]:
    """The activation quantizers with one stored scale, and those with one for each channel."""
    static = [q for q in model.activation_quantizers.values() if not q.dynamic]
    return [q for q in static if not q.per_channel], [q for q in static if q.per_channel]


def size_of(model: QuantModel) -> Size:
    """What a network takes before and after, from its plan alone.

    Where channels share bits, a network that is not calibrated yet is taken to have the average in all of them, and
    scales of activations for each channel do not count before they are known.
    """
    tensors = parameter_tensors(model.teacher)
    weights = [(tensors[name], q) for name, q in model.weight_quantizers.items()]
    each = [_weight_bytes(w, q) for w, q in weights]
    codes, scales = sum(c for c, _ in each), sum(s for _, s in each)
    single, channels = _stored_ranges(model)
    scales += sum(8 + (0 if q.levels is None else len(q.levels)) for q in single) + sum(
        8 * len(q.zero_point) + (0 if q.channel_bits is None else len(q.channel_bits))
        for q in channels
        if q.scale is not None
    )
    remainder = sum(4 * t.numel() for name, t in tensors.items() if name not in model.weight_quantizers)
    deltas = sum(4 * d.numel() for d in _deltas(model).values())
    count = sum(w.numel() for w, _ in weights)
    bits = sum(w.numel() * q.mean_bits for w, q in weights) / max(count, 1)
    return Size(remainder + 4 * count, codes + scales + remainder + deltas, codes, scales, remainder + deltas, bits)


def _weight_bytes(weight: Tensor, quantizer: WeightQuantizer) -> tuple[int, int]:
    """Bytes of a weight's codes, and of its scales, zero points and bits of channels."""
    plan, bits = quantizer.plan, quantizer.channel_bits
    channels = weight.shape[plan.granularity.axis] if isinstance(plan.granularity, PerChannel) else 1
    if plan.levels is not None:
        table = plan.levels.count * (channels if plan.levels.own else 1)
        return packed_bytes(weight.numel(), plan.bits), 4 * channels + table
    if bits is None:
        codes, points, counts = packed_bytes(weight.numel(), plan.grid.bits), packed_bytes(channels, plan.grid.bits), 0
    else:
        codes, points = (channel_packed_bytes(count, bits) for count in (weight.numel() // channels, 1))
        counts = channels
    return codes, 4 * channels + counts + (0 if plan.symmetric else points)


def compressed_codes(model: QuantModel) -> tuple[float, int]:
    """How far the weights' codes could be compressed: few levels, or rare ones, gain what packing does not show.

    Returns:
        the entropy of a code in bits, of each weight's own frequencies, mean over all codes; and the bytes of all codes
        after deflate (zlib level 9), one byte for each (two beyond 8 bits), weight by weight.
    """
    bits, size, count = 0.0, 0, 0
    for quantizer in model.weight_quantizers.values():
        codes = quantizer.get().codes.cpu()
        shares = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
        bits += float(torch.special.entr(shares).sum() / math.log(2)) * codes.numel()
        raw = codes.numpy().astype("<i1" if codes.element_size() == 1 else "<i2")  # beyond its range it wraps around
        size, count = size + len(zlib.compress(raw.tobytes(), 9)), count + codes.numel()
    return bits / max(count, 1), size


def save_artifact(model: QuantModel, folder: RunFolder) -> None:
    """Write model.safetensors and graph.json into a run folder."""
    plan = model.plan
    shapes = {name: list(t.shape) for name, t in parameter_tensors(model.teacher).items()}
    description = {
        "format_version": FORMAT_VERSION,
        "placement": plan.placement,
        "boundary": plan.boundary,
        **({} if plan.reach == "auto" else {"reach": plan.reach}),
        "input": input_shapes(model.teacher.graph),
        "nodes": to_json(model.teacher.graph),
        "weights": {n: {"shape": shapes[n], **p.to_json()} for n, p in plan.weights.items()},
        "activations": [{"node": n, **p.to_json()} for n, p in plan.activations.items()],
        "dynamic": any(q.dynamic for q in model.activation_quantizers.values()),
    }
    # One key only: safetensors writes several in random order, and equal runs shall give equal bytes.
    folder.write(MODEL, save_safetensors(artifact_tensors(model), {"calibquant": str(FORMAT_VERSION)}))
    folder.write(GRAPH, json.dumps(description, separators=(",", ":"), allow_nan=False) + "\n")


def load(run: str | Path) -> QuantModel:
    """The quantized network of a run folder. Runs no user code and no pickle.

    Its float weights are the dequantized codes; its logits equal the saved network's bit for bit.

    Raises:
        RunFolderError: the folder is missing, incomplete, damaged or of another version.

    Example:
        >>> model = load("runs/cifar_resnet20-w4a4-001")  # doctest: +SKIP
        >>> logits = model(images)  # doctest: +SKIP
    """
    return load_artifact(open_run(Path(run)))


def load_artifact(folder: RunFolder) -> QuantModel:
    """`load`, from an opened run folder."""
    description, data = folder.read_json(GRAPH), folder.read(MODEL)
    try:
        stored = load_safetensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:  # the others: types that torch does not have
        raise RunFolderError(folder.path / MODEL, f"is damaged ({error})", "restore it or quantize again") from None
    try:
        return _rebuild(description, stored)
    except RunFolderError as error:  # of the graph, which does not know its folder
        raise RunFolderError(folder.path / error.where, error.problem, error.mend) from None
    except DAMAGE as error:
        raise RunFolderError(
            folder.path / GRAPH,
            f"does not fit {MODEL} ({type(error).__name__}: {str(error)[:200]})",
            "restore it or quantize again",
        ) from None


def _rebuild(description: dict[str, Any], stored: dict[str, Tensor]) -> QuantModel:
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {description['format_version']} is not {FORMAT_VERSION}")
    rows, plan = description["weights"], plan_of(description)
    codes = {name: _read_weight(stored, name, tuple(rows[name]["shape"]), p) for name, p in plan.weights.items()}
    names = [row["parameter"] for row in description["nodes"] if row["op"] == "get_attr"]
    tensors = {name: codes[name].dequantize() if name in codes else stored[name] for name in names}
    teacher = from_json(description["nodes"], tensors, description.get("input"))  # runs of earlier versions have none
    model = QuantModel(teacher, plan, description["dynamic"])
    if len(model.quantizers) != len(plan.weights) + len(plan.activations):
        raise ValueError("it plans quantizers for nodes that are not there")
    restore(model, stored)
    return model


def plan_of(description: dict[str, Any]) -> QuantPlan:
    """The plan that graph.json holds.

    Raises:
        KeyError, TypeError: it is no such description.
    """
    return QuantPlan(
        {name: TensorPlan.from_json(row) for name, row in description["weights"].items()},
        {row["node"]: TensorPlan.from_json(row) for row in description["activations"]},
        description["placement"],
        description["boundary"],
        description.get("reach", "auto"),
    )


def restore(model: QuantModel, stored: dict[str, Tensor]) -> None:
    """Give a model's quantizers the codes, scales and zero points of `artifact_tensors`.

    Raises:
        KeyError, ValueError: the tensors are those of another network or plan.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in parameter_tensors(model.teacher).items()}
    for name, quantizer in model.weight_quantizers.items():
        quantizer.set(_read_weight(stored, name, shapes[name], quantizer.plan))
    single, channels = _stored_ranges(model)
    if single:
        ranges = zip(stored["activations.scale"], stored["activations.zero_point"], strict=True)
        for activation, (scale, zero_point) in zip(single, ranges, strict=True):
            activation.scale, activation.zero_point = scale.clone(), zero_point.clone()
            if activation.plan.levels is not None:
                activation.levels = _read_codes(stored[f"activations.{activation.name}.levels"], activation)
    for activation in channels:
        own = f"activations.{activation.name}"
        activation.scale, activation.zero_point = (stored[f"{own}.{key}"].clone() for key in ("scale", "zero_point"))
        if activation.plan.allocation != "none":
            activation.channel_bits = _read_bits(stored, own, len(activation.scale))
    for node, correction in model.bias_deltas.items():
        delta = stored.get(f"bias_deltas.{node}")
        if delta is not None and tuple(delta.shape) != model.bias_shape(node):
            raise ValueError(f"bias_deltas.{node} has the shape {tuple(delta.shape)}")
        correction.delta = None if delta is None else delta.clone()


def _read_codes(levels: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """The levels of an activation."""
    assert quantizer.plan.levels is not None
    fits = levels.dtype == torch.uint8 and levels.dim() == 1 and 1 <= len(levels) <= quantizer.plan.levels.count
    if not fits or (levels[1:] <= levels[:-1]).any():
        raise ValueError(f"activations.{quantizer.name}.levels are not up to {quantizer.plan.levels.count} codes")
    return levels.clone()


def _read_weight(stored: dict[str, Tensor], name: str, shape: tuple[int, ...], plan: TensorPlan) -> QTensor:
    scale = stored[f"{name}.scale"]
    if tuple(scale.shape) != ((shape[plan.granularity.axis],) if isinstance(plan.granularity, PerChannel) else ()):
        raise ValueError(f"{name}.scale has the shape {tuple(scale.shape)}")
    if plan.allocation != "none":
        return _read_channels(stored, name, shape, plan)
    if plan.levels is not None:
        return _read_levels(stored, name, shape, plan, plan.levels)
    if plan.symmetric:
        zero_point = torch.full_like(scale, 0 if plan.grid.signed else 1 << (plan.grid.bits - 1), dtype=torch.int32)
    else:
        zero_point = unpack(stored[f"{name}.zero_point"], tuple(scale.shape), plan.grid).to(torch.int32)
    return QTensor(unpack(stored[f"{name}.codes"], shape, plan.grid), scale, zero_point, plan.grid, plan.granularity)


def _read_levels(
    stored: dict[str, Tensor], name: str, shape: tuple[int, ...], plan: TensorPlan, levels: LevelPlan
) -> QTensor:
    """A weight whose codes are places among levels."""
    scale, table = stored[f"{name}.scale"], stored[f"{name}.levels"]
    rows = (shape[_axis(plan)],) if levels.own else ()
    if tuple(table.shape) != (*rows, levels.count) or table.dtype != torch.int8:
        raise ValueError(f"{name}.levels has the shape {tuple(table.shape)}")
    places = unpack(stored[f"{name}.codes"], shape, Grid(levels.bits)).long()
    if int(places.max()) >= levels.count:
        raise ValueError(f"{name}.codes hold {int(places.max())} of {levels.count} levels")
    codes = levels_at(places, table, plan.granularity)
    return QTensor(codes, scale, torch.zeros_like(scale, dtype=torch.int32), plan.grid, plan.granularity, levels=table)


def _read_channels(stored: dict[str, Tensor], name: str, shape: tuple[int, ...], plan: TensorPlan) -> QTensor:
    """A weight whose channels have their own bits."""
    scale, axis, signed = stored[f"{name}.scale"], _axis(plan), plan.grid.signed
    bits = _read_bits(stored, name, len(scale))
    grid = widest(bits, signed)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    codes = unpack_channels(stored[f"{name}.codes"], moved, bits, signed).movedim(0, axis).contiguous().to(grid.dtype)
    zero_point = torch.zeros_like(bits) if signed else 2**bits // 2  # of symmetric weights, as for equal bits
    if not plan.symmetric:
        zero_point = unpack_channels(stored[f"{name}.zero_point"], tuple(scale.shape), bits, signed).to(torch.int32)
    return QTensor(codes, scale, zero_point, grid, plan.granularity, bits)


def _read_bits(stored: dict[str, Tensor], owner: str, channels: int) -> Tensor:
    """The bits of each channel, int32 (C,)."""
    bits = stored[f"{owner}.channel_bits"].to(torch.int32)
    if tuple(bits.shape) != (channels,) or int(bits.max()) > MOST:
        raise ValueError(f"{owner}.channel_bits are not {channels} numbers of 0 to {MOST}")
    return bits


def _axis(plan: TensorPlan) -> int:
    assert isinstance(plan.granularity, PerChannel)
    return plan.granularity.axis
