"""What is inside an ONNX file: nodes, tensors with their bytes, limits of activations, and what stays float."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibquant.errors import ModelError
from calibquant.export.session import brief, import_onnx
from calibquant.reading import read_file

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
BITS = {"BOOL": 8, "FLOAT": 32, "DOUBLE": 64}  # the other types have them in their names


@dataclass(frozen=True)
class StoredTensors:
    """The stored tensors of one type."""

    type: str
    count: int
    values: int
    bytes: int


@dataclass(frozen=True)
class OnnxContent:
    """What an ONNX file holds.

    Args:
        bytes: of the file.
        ir, opset: versions.
        producer: who wrote it.
        nodes: how many of each op type.
        tensors: stored tensors by type.
        activation_bits: bits -> how many quantized activations are limited to so many.
        integer: convolutions and products whose input and weight are quantized.
        stays_float: names of those that are not.
        notes: what the file says about itself: what was changed so that it runs, and what is computed in float.
    """

    bytes: int
    ir: int
    opset: int
    producer: str
    nodes: dict[str, int]
    tensors: tuple[StoredTensors, ...]
    activation_bits: dict[int, int]
    integer: int
    stays_float: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries, ready for JSON."""
        return asdict(self)


def read_onnx(path: Path) -> OnnxContent:
    """`onnx_content` of a file.

    Raises:
        ModelError: it cannot be read; see `onnx_content`.
    """
    return onnx_content(str(path), read_file(path, ModelError, "give the path of an ONNX file"))


def onnx_content(name: str, data: bytes) -> OnnxContent:
    """Read an ONNX file.

    Args:
        name: of the file, for errors.
        data: its bytes.

    Raises:
        ModelError: onnx is not installed, or the file is no ONNX file.
    """
    model = parse(name, data)
    try:
        return _content(name, data, model)
    except Exception as error:  # onnx and protobuf raise nearly anything where a tensor or a text is damaged
        problem = f"is a damaged ONNX file ({brief(error)})"
        raise ModelError(name, problem, "give a file that calibquant export wrote") from None


def _content(name: str, data: bytes, model: ModelProto) -> OnnxContent:
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    tensors = {t.name: t for t in graph.initializer}
    products = [node for node in graph.node if node.op_type in COMPUTE]
    floats = tuple(n.name or n.output[0] for n in products if not _is_integer(n, makers))
    return OnnxContent(
        len(data),
        model.ir_version,
        opset_of(name, data),
        f"{model.producer_name} {model.producer_version}".strip(),
        dict(Counter(node.op_type for node in graph.node).most_common()),
        _by_type(graph),
        _activation_bits(graph, makers, tensors),
        len(products) - len(floats),
        floats,
        _notes(model),
    )


def opset_of(name: str, data: bytes) -> int:
    """The version of ONNX's own operators that a file uses; see `onnx_content` for errors."""
    return next((o.version for o in parse(name, data).opset_import if o.domain in ("", "ai.onnx")), 0)


def parse(name: str, data: bytes) -> ModelProto:
    """An ONNX file as its protobuf message.

    Raises:
        ModelError: onnx is not installed, or the file is no ONNX file.
    """
    onnx = import_onnx()
    from google.protobuf.message import DecodeError  # onnx needs this package

    try:
        model: ModelProto = onnx.load_from_string(data)
    except DecodeError:
        model = onnx.ModelProto()
    if not model.graph.node and not model.graph.output:
        raise ModelError(name, "is not an ONNX file, or is damaged", "give a file that calibquant export wrote")
    return model


def _notes(model: ModelProto) -> tuple[str, ...]:
    """What `onnx_deploy` wrote."""
    for entry in model.metadata_props:
        if entry.key == "calibquant.notes":
            with suppress(ValueError):
                return tuple(str(text) for text in json.loads(entry.value))
    return ()


def _by_type(graph: GraphProto) -> tuple[StoredTensors, ...]:
    from onnx import TensorProto

    found: dict[str, list[tuple[int, int]]] = {}
    for tensor in graph.initializer:
        kind = TensorProto.DataType.Name(tensor.data_type)
        count = int(np.prod(tensor.dims, dtype=np.int64))
        found.setdefault(kind, []).append((count, -(-count * _bits(kind) // 8)))
    rows = [StoredTensors(k, len(v), sum(c for c, _ in v), sum(b for _, b in v)) for k, v in found.items()]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return BITS[kind] if kind in BITS else int(digits.group()) if digits else 8


def _is_integer(node: NodeProto, makers: dict[str, NodeProto]) -> bool:
    """Whether both factors come from DequantizeLinear, so that a runtime may compute in integers."""
    factors = [makers.get(name) for name in node.input[:2]]
    return all(maker is not None and maker.op_type == "DequantizeLinear" for maker in factors)


def _activation_bits(
    graph: GraphProto, makers: dict[str, NodeProto], tensors: dict[str, TensorProto]
) -> dict[int, int]:
    """Bits that the codes of each QuantizeLinear are limited to, by an integer Min or Clip behind it."""
    from onnx import numpy_helper

    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    bits: Counter[int] = Counter()
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in tensors:
            continue
        highest, output = 255, node.output[0]
        while len(readers.get(output, [])) == 1 and readers[output][0].op_type in ("Min", "Max", "Clip"):
            reader = readers[output][0]
            position = {"Min": 1, "Max": 9, "Clip": 2}[reader.op_type]
            limit = tensors.get(reader.input[position]) if len(reader.input) > position else None
            highest = highest if limit is None else min(highest, int(numpy_helper.to_array(limit).max()))
            output = reader.output[0]
        bits[highest.bit_length()] += 1
    return dict(sorted(bits.items()))
