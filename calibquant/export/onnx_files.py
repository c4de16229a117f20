"""ONNX files as bytes: collecting tensors and nodes, packing low-bit tensors, adding outputs to a finished file.

Nothing here knows networks or quantization. `onnx` is imported where bytes are made or read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

OPSET, IR = 21, 10  # ONNX 1.16: the first with 4-bit tensors, and with GroupNormalization as torch computes it
OPSET_2_BIT, IR_2_BIT = 25, 13  # ONNX 1.20: the first with 2-bit tensors; ONNX Runtime 1.24 reads it
PACKED = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}  # containers of less than a byte, and their bits

Shape = tuple[int, ...]
Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of an ONNX file.

    Args:
        values: its elements, one array element each.
        container: "INT4", "UINT4", "INT2" or "UINT2"; None for the type of the array.
    """

    values: Array
    container: str | None = None

    @property
    def content(self) -> tuple[Any, ...]:
        """Equal for equal tensors."""
        return self.container, self.values.dtype.str, self.values.shape, self.values.tobytes()


@dataclass(frozen=True)
class StoredNode:
    """A node of an ONNX graph with one output; an absent optional input is an empty string."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]


class OnnxGraph:
    """An ONNX graph while it is written.

    Args:
        reserved: names of values that nodes are going to make; tensors get other names.
    """

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        self.reserved = set(reserved)
        self.inputs: list[tuple[str, Shape, Any]] = []
        self.tensors: dict[str, StoredTensor] = {}
        self.nodes: list[StoredNode] = []
        self._constants: dict[Any, str] = {}

    def input(self, name: str, shape: Shape, dtype: Any) -> None:
        """Declare an input of shape (N, *shape[1:])."""
        self.inputs.append((name, shape, dtype))

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append a node; attributes that are None are left out.

        Returns:
            `output`.
        """
        given = {key: value for key, value in sorted(attributes.items()) if value is not None}
        self.nodes.append(StoredNode(op, tuple(inputs), output, given))
        self.reserved.add(output)
        return output

    def tensor(self, name: str, values: Array, container: str | None = None) -> str:
        """Store a tensor, once however often it is given.

        Returns:
            `name`, or that with a number where it already means something else.
        """
        stored, wanted, number = StoredTensor(np.asarray(values), container), name, 0
        while wanted in self.reserved or (wanted in self.tensors and self.tensors[wanted].content != stored.content):
            number += 1
            wanted = f"{name}.{number}"
        self.tensors.setdefault(wanted, stored)
        return wanted

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """Store a small tensor whose name does not matter."""
        stored = StoredTensor(np.asarray(values, dtype))
        if stored.content not in self._constants:
            self._constants[stored.content] = self.tensor(f"constant.{len(self._constants)}", stored.values)
        return self._constants[stored.content]

    def free(self, name: str) -> str:
        """A name for a value in between, not used yet."""
        number, wanted = 0, name
        while wanted in self.reserved or wanted in self.tensors:
            number += 1
            wanted = f"{name}.{number}"
        return wanted

    def to_bytes(self, output: str, shape: Shape, batch: int, metadata: Mapping[str, str]) -> bytes:
        """The file; equal graphs give equal bytes.

        Args:
            output: name of the result, float32.
            shape: of the result for a batch of `batch`.
            batch: how many images `shape` and the inputs' shapes are for; that dimension is written as N.
            metadata: what the file says about itself.
        """
        from onnx import TensorProto, helper

        two = any(t.container in ("INT2", "UINT2") for t in self.tensors.values())
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), _dims(dims, batch))
            for name, dims, dtype in self.inputs
        ]
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, _dims(shape, batch))
        nodes = [helper.make_node(n.op, n.inputs, [n.output], name=n.output, **n.attributes) for n in self.nodes]
        graph = helper.make_graph(
            nodes, "calibquant", inputs, [result], [_tensor_proto(n, t) for n, t in self.tensors.items()]
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET_2_BIT if two else OPSET)],
            ir_version=IR_2_BIT if two else IR,
            producer_name="calibquant",
            producer_version=_version(),
        )
        helper.set_model_props(model, dict(metadata))
        return model.SerializeToString(deterministic=True)


def pack_low_bits(values: Array, bits: int) -> bytes:
    """Integers of 2 or 4 bits as ONNX stores them: row-major, the first in the lowest bits of byte 0, padded once.

    (https://onnx.ai/onnx/technical/int4.html and int2.html.)

    Args:
        values: integers that fit, signed (two's complement) or unsigned, any shape.

    Example:
        >>> pack_low_bits(np.array([1, 2, -1]), 4).hex()
        '210f'
    """
    per_byte = 8 // bits
    flat = values.reshape(-1).astype(np.int16) & ((1 << bits) - 1)
    padded = np.zeros(-(-flat.size // per_byte) * per_byte, np.uint8)
    padded[: flat.size] = flat
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1).astype(np.uint8).tobytes()


def with_outputs(model: bytes, names: Sequence[str]) -> bytes:
    """An ONNX file that also gives values in between.

    Args:
        model: an ONNX file.
        names: of values that nodes make; they follow the file's own outputs, in this order.

    Raises:
        KeyError: no node makes such a value.

    Example:
        >>> session.run(None, {"x": images})  # of with_outputs(model, ["layer1_0_conv1"])  # doctest: +SKIP
        [logits, codes]
    """
    import onnx

    proto = onnx.load_from_string(model)
    made = {name for node in proto.graph.node for name in node.output}
    own = {output.name for output in proto.graph.output}
    for name in names:
        if name not in made:
            raise KeyError(f"no node of the file makes '{name}'")
        if name not in own:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))  # its type follows from the node that makes it
    return proto.SerializeToString(deterministic=True)


def _tensor_proto(name: str, tensor: StoredTensor) -> onnx.TensorProto:
    from onnx import TensorProto, numpy_helper

    if tensor.container is None:
        return numpy_helper.from_array(np.asarray(tensor.values, order="C"), name)
    return TensorProto(
        name=name,
        data_type=TensorProto.DataType.Value(tensor.container),
        dims=tensor.values.shape,
        raw_data=pack_low_bits(tensor.values, PACKED[tensor.container]),
    )


def _dims(shape: Shape, batch: int) -> list[str | int | None]:
    """A network's dimension 0 is its batch, unless that was merged with others."""
    return [*(["N" if shape[0] == batch else None] if shape else []), *shape[1:]]


def _version() -> str:
    try:
        return version("calibquant")
    except PackageNotFoundError:
        return "unknown"
