"""The artifact: model.safetensors (codes, scales, float remainder) and graph.json, enough to rebuild the network.

Tensors of model.safetensors:

    <parameter>.codes        uint8, the codes packed flat at their grid's bits (numerics.packing)
    <parameter>.scale        float32, () or (C,)
    <parameter>.zero_point   uint8, packed like codes; absent for symmetric weights
    <parameter>              float32, what is not quantized (biases, unfolded norms)
    activations.scale        float32, (A,), in the order of graph.json
    activations.zero_point   int32, (A,)
    bias_deltas.<node>       float32, (C,), what corrections add to the bias at a node; absent where there are none
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from calibquant.errors import RunFolderError
from calibquant.graph.serialize import from_json, to_json
from calibquant.numerics.affine import QTensor
from calibquant.numerics.grid import PerChannel
from calibquant.numerics.packing import pack, packed_bytes, unpack
from calibquant.quantization.model import QuantModel, parameter_tensors
from calibquant.quantization.plan import QuantPlan, TensorPlan
from calibquant.runfolder import FORMAT_VERSION, RunFolder, open_run

MODEL, GRAPH = "model.safetensors", "graph.json"


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
        q = model.weight_quantizers[name].get()
        tensors[f"{name}.codes"] = pack(q.codes, q.grid)
        tensors[f"{name}.scale"] = q.scale.cpu()
        if not model.weight_quantizers[name].plan.symmetric:
            tensors[f"{name}.zero_point"] = pack(q.zero_point, q.grid)
    static = [q.get() for q in model.activation_quantizers.values() if not q.dynamic]
    if static:
        tensors["activations.scale"] = torch.stack([scale.cpu() for scale, _ in static])
        tensors["activations.zero_point"] = torch.stack([zero_point.cpu() for _, zero_point in static])
    return tensors | {f"bias_deltas.{node}": delta.cpu() for node, delta in _deltas(model).items()}


def _deltas(model: QuantModel) -> dict[str, Tensor]:
    return {node: d.delta for node, d in model.bias_deltas.items() if d.delta is not None}


def size_of(model: QuantModel) -> Size:
    """What a network takes before and after, from its plan alone."""
    tensors = parameter_tensors(model.teacher)
    weights = {name: (tensors[name], q.plan) for name, q in model.weight_quantizers.items()}
    codes = sum(packed_bytes(w.numel(), p.grid.bits) for w, p in weights.values())
    channels = [
        (w.shape[p.granularity.axis] if isinstance(p.granularity, PerChannel) else 1, p) for w, p in weights.values()
    ]
    scales = sum(4 * c + (0 if p.symmetric else packed_bytes(c, p.grid.bits)) for c, p in channels)
    scales += sum(0 if q.dynamic else 8 for q in model.activation_quantizers.values())
    remainder = sum(4 * t.numel() for name, t in tensors.items() if name not in weights)
    deltas = sum(4 * d.numel() for d in _deltas(model).values())
    count = sum(w.numel() for w, _ in weights.values())
    bits = sum(w.numel() * p.grid.bits for w, p in weights.values()) / max(count, 1)
    float32 = remainder + 4 * count
    return Size(float32, codes + scales + remainder + deltas, codes, scales, remainder + deltas, bits)


def save_artifact(model: QuantModel, folder: RunFolder) -> None:
    """Write model.safetensors and graph.json into a run folder."""
    plan = model.plan
    shapes = {name: list(t.shape) for name, t in parameter_tensors(model.teacher).items()}
    description = {
        "format_version": FORMAT_VERSION,
        "placement": plan.placement,
        "boundary": plan.boundary,
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
    description = folder.read_json(GRAPH)
    try:
        stored = load_safetensors(folder.read(MODEL))
    except SafetensorError as error:
        raise RunFolderError(folder.path / MODEL, f"is damaged ({error})", "restore it or quantize again") from None
    try:
        return _rebuild(description, stored)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RunFolderError(
            folder.path / GRAPH,
            f"does not fit {MODEL} ({type(error).__name__}: {error})",
            "restore it or quantize again",
        ) from None


def _rebuild(description: dict[str, Any], stored: dict[str, Tensor]) -> QuantModel:
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {description['format_version']} is not {FORMAT_VERSION}")
    rows = description["weights"]
    plan = QuantPlan(
        {name: TensorPlan.from_json(row) for name, row in rows.items()},
        {row["node"]: TensorPlan.from_json(row) for row in description["activations"]},
        description["placement"],
        description["boundary"],
    )
    codes = {name: _read_weight(stored, name, tuple(rows[name]["shape"]), p) for name, p in plan.weights.items()}
    names = [row["parameter"] for row in description["nodes"] if row["op"] == "get_attr"]
    tensors = {name: codes[name].dequantize() if name in codes else stored[name] for name in names}
    model = QuantModel(from_json(description["nodes"], tensors), plan, description["dynamic"])
    if len(model.quantizers) != len(plan.weights) + len(plan.activations):
        raise ValueError("it plans quantizers for nodes that are not there")
    restore(model, stored)
    return model


def restore(model: QuantModel, stored: dict[str, Tensor]) -> None:
    """Give a model's quantizers the codes, scales and zero points of `artifact_tensors`.

    Raises:
        KeyError, ValueError: the tensors are those of another network or plan.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in parameter_tensors(model.teacher).items()}
    for name, quantizer in model.weight_quantizers.items():
        quantizer.set(_read_weight(stored, name, shapes[name], quantizer.plan))
    static = [q for q in model.activation_quantizers.values() if not q.dynamic]
    if static:
        ranges = zip(stored["activations.scale"], stored["activations.zero_point"], strict=True)
        for activation, (scale, zero_point) in zip(static, ranges, strict=True):
            activation.scale, activation.zero_point = scale.clone(), zero_point.clone()
    for node, correction in model.bias_deltas.items():
        delta = stored.get(f"bias_deltas.{node}")
        if delta is not None and tuple(delta.shape) != model.bias_shape(node):
            raise ValueError(f"bias_deltas.{node} has the shape {tuple(delta.shape)}")
        correction.delta = None if delta is None else delta.clone()


def _read_weight(stored: dict[str, Tensor], name: str, shape: tuple[int, ...], plan: TensorPlan) -> QTensor:
    scale = stored[f"{name}.scale"]
    if tuple(scale.shape) != ((shape[plan.granularity.axis],) if isinstance(plan.granularity, PerChannel) else ()):
        raise ValueError(f"{name}.scale has the shape {tuple(scale.shape)}")
    if plan.symmetric:
        zero_point = torch.full_like(scale, 0 if plan.grid.signed else 1 << (plan.grid.bits - 1), dtype=torch.int32)
    else:
        zero_point = unpack(stored[f"{name}.zero_point"], tuple(scale.shape), plan.grid).to(torch.int32)
    return QTensor(unpack(stored[f"{name}.codes"], shape, plan.grid), scale, zero_point, plan.grid, plan.granularity)
