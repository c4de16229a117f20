"""The integer network as an ONNX file whose quantize-dequantize pairs ONNX Runtime fuses to integer kernels.

Names: the uint8 codes of a program's value `conv1` are `conv1`, dequantized `conv1.float`; a value without a grid is
float32 under its own name. Before rounding it is `conv1.unrounded`, before its limits `conv1.unlimited`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibquant.export.at_node import at_node
from calibquant.export.kernels import EXACT_FLOAT32, mean_factor
from calibquant.export.onnx_calls import BATCH, Call, example_inputs, infer_shapes, numpy_dtype, resolve
from calibquant.export.onnx_files import OnnxGraph, Shape
from calibquant.export.onnx_ops import ROWS
from calibquant.export.program import QUANTIZE, TABLE, ActivationGrid, IntegerWeight, Program, Step, names_of
from calibquant.graph.ops import OPS

Storage = Literal["packed", "int8"]


def deploy_onnx(program: Program, example: Tensor | Sequence[Tensor], storage: Storage = "packed") -> bytes:
    """deploy.onnx: the integer program for ONNX Runtime's integer kernels.

    Args:
        program: what it computes.
        example: input(s) of shape (N, ...); only their types and dimensions after the first count.
        storage: "packed" stores weights of 2 bits as INT2 or UINT2, of 3 and 4 as INT4 or UINT4, of more as INT8, for
            ONNX Runtime 1.24 and newer; "int8" stores all as INT8, which every version reads.

    Returns:
        an ONNX file of any batch size; opset 21, or 25 if it holds 2-bit tensors.
    """
    return _DeployFile(program, example, storage).write()


class _DeployFile:
    """Walks through the program once."""

    def __init__(self, program: Program, example: Tensor | Sequence[Tensor], storage: Storage) -> None:
        self.program, self.storage = program, storage
        self.grids = program.grids
        self.inputs = example_inputs(example, program.inputs)
        self.weights = {step.weight.name: step.weight for step in program.steps if step.weight is not None}
        self.steps = [_with_weight_named(step) for step in program.steps]
        values = [*program.inputs, *(step.output for step in program.steps)]
        ends = ("", ".float", ".unrounded", ".unlimited", ".weight.float", ".bias.float")
        self.graph = OnnxGraph(value + end for value in values for end in ends)
        self.dequantized: dict[str, str] = {}
        self.shared: dict[tuple[str, ...], str] = {}
        self.scales: dict[ActivationGrid, tuple[str, str]] = {}
        # OpenVINO 2026.4 adds what the 8-bit QuantizeLinear before an Add would have rounded
        self.added = {name for step in self.steps if step.op == "add" for name in names_of(step.inputs)}
        self.shapes = self._shapes()

    def write(self) -> bytes:
        for name, tensor in self.inputs.items():
            self.graph.input(name, self.shapes[name], numpy_dtype(tensor))
        for step in self.steps:
            with at_node(step.output, "written"):
                self._write_step(step)
        result = self.program.output
        return self.graph.to_bytes(self._float(result), self.shapes[result], BATCH, self._metadata())

    def _write_step(self, step: Step) -> None:
        if step.op == QUANTIZE:
            self._quantize(self._float(step.inputs[0]), step)
        elif step.op == TABLE:
            self._look_up(step)
        elif step.on_codes:
            self._on_codes(step)
        elif step.op == "mean" and self.grids[step.inputs[0]] is not None:
            self._mean_of_codes(step)
        elif step.op == "linear" and step.integer and len(self.shapes[step.inputs[0]]) != 2:
            self._linear_of_rows(step)
        else:
            self._computed(step)

    # --- steps --------------------------------------------------------------------------------------------------------

    def _on_codes(self, step: Step) -> None:
        """ONNX Runtime has uint8 kernels for all that moves or selects; see `onnx_ops`."""
        assert step.grid is not None
        zero = np.uint8(step.grid.zero_point)
        ROWS[step.op](self._call(step, step.inputs, step.output, zero))

    def _look_up(self, step: Step) -> None:
        """Codes of a table, with all codes in one row: there GatherElements takes 0.9 ms for a million, Gather 8.

        Neither takes indices of 8 bits.
        """
        table = self.graph.tensor(f"{step.output}.table", step.table)  # type: ignore[arg-type]
        row, shape = (self.graph.constant(dims, np.int64) for dims in ((-1,), (-1, *self.shapes[step.output][1:])))
        codes = self.graph.node("Reshape", [step.inputs[0], row], self.graph.free(f"{step.output}.row"))
        places = self.graph.node("Cast", [codes], self.graph.free(f"{step.output}.index"), to=6)  # TensorProto.INT32
        found = self.graph.node("GatherElements", [table, places], self.graph.free(f"{step.output}.found"), axis=0)
        self.graph.node("Reshape", [found, shape], step.output)

    def _computed(self, step: Step) -> None:
        """On dequantized inputs, then rounded; where `step.integer`, ONNX Runtime makes one integer kernel of it."""
        row = OPS[step.op]
        weight = None if step.weight is None else row.weight
        bias = None if step.bias is None else row.bias
        inputs = [
            self._weight(step) if place == weight else self._bias(step) if place == bias else self._float(value)
            for place, value in enumerate(step.inputs)
        ]
        output = step.output if step.grid is None else f"{step.output}.unrounded"
        if step.op == "conv_transpose2d" and inputs[2] is not None:
            self._with_float_bias(step, inputs, output)
        elif step.op == "softmax" and step.grid is not None:
            self._unfused_softmax(step, inputs, output)
        else:
            ROWS[step.op](self._call(step, tuple(inputs), output))
        if step.grid is not None:
            self._quantize(output, step)

    def _with_float_bias(self, step: Step, inputs: list[Any], output: str) -> None:
        """A ConvTranspose and its bias apart.

        Together, before a QuantizeLinear, ONNX Runtime rounds the bias to int32 steps of input scale * weight scale:
        with 4-bit weights a fifth of the codes moved.
        """
        product = self.graph.free(f"{step.output}.product")
        ROWS[step.op](self._call(step, (*inputs[:2], None), product))
        column = self.graph.constant((-1, 1, 1), np.int64)
        bias = self.graph.node("Reshape", [inputs[2], column], self.graph.free(f"{step.output}.bias.column"))
        self.graph.node("Add", [product, bias], output)

    def _unfused_softmax(self, step: Step, inputs: list[Any], output: str) -> None:
        """A Softmax in float: ONNX Runtime's QLinearSoftmax takes floor(1 / scale) for 1 / scale.

        The maximum with 0 changes nothing, and keeps ONNX Runtime from fusing.
        """
        product = self.graph.free(f"{step.output}.softmax")
        ROWS[step.op](self._call(step, tuple(inputs), product))
        self.graph.node("Max", [product, self.graph.constant(0)], output)

    def _mean_of_codes(self, step: Step) -> None:
        """The sum of the codes, less that of their zero points, times one factor: no order of adding changes it.

        Whole numbers up to 2^24 are added in float32 without rounding, and as fast as values; larger sums in int32.
        """
        source, grid, a = step.inputs[0], self.grids[step.inputs[0]], step.attributes
        assert grid is not None
        count = math.prod(self.shapes[source][d] for d in a["dims"])
        exact, number = (np.float32, 1) if count * grid.high <= EXACT_FLOAT32 else (np.int32, 6)  # TensorProto's
        output = step.output if step.grid is None else f"{step.output}.unrounded"
        dims = self.graph.constant(a["dims"], np.int64)

        def add(op: str, *inputs: str, **attributes: Any) -> str:
            return self.graph.node(op, inputs, self.graph.free(f"{step.output}.{op.lower()}"), **attributes)

        sums = add("ReduceSum", add("Cast", source, to=number), dims, keepdims=int(a["keepdim"]))
        if grid.zero_point:
            sums = add("Sub", sums, self.graph.constant(count * grid.zero_point, exact))
        sums = sums if exact is np.float32 else add("Cast", sums, to=1)
        factor = self.graph.constant(mean_factor(grid, self.shapes[source], a["dims"]))
        self.graph.node("Mul", [sums, factor], output)
        if step.grid is not None:
            self._quantize(output, step)

    def _linear_of_rows(self, step: Step) -> None:
        """A Gemm of matrices between reshapes of codes: MatMul and a float bias would not be one integer kernel."""
        source, shape = step.inputs[0], self.shapes[step.output]
        rows, result = self.graph.free(f"{source}.rows"), self.graph.free(f"{step.output}.rows")
        width = self.shapes[source][-1]
        self.graph.node("Reshape", [source, self.graph.constant((-1, width), np.int64)], rows)
        self.grids |= {rows: self.grids[source], result: step.grid}
        self.shapes |= {rows: (-1, width), result: (-1, shape[-1])}
        self._computed(replace(step, inputs=(rows, *step.inputs[1:]), output=result))
        self.graph.node("Reshape", [result, self.graph.constant((-1, *shape[1:]), np.int64)], step.output)

    def _call(self, step: Step, inputs: tuple[Any, ...], output: str, zero: np.generic | None = None) -> Call:
        known = resolve(step.inputs, self.shapes)
        call = Call(self.graph, inputs, known, output, self.shapes[step.output], step.attributes)
        return call if zero is None else replace(call, zero=zero)

    # --- values -------------------------------------------------------------------------------------------------------

    def _float(self, value: Any) -> Any:
        """The float32 form of a value, a parameter, None or a tuple of them."""
        if isinstance(value, tuple):
            return tuple(self._float(v) for v in value)
        if value is None:
            return None
        if value not in self.grids:
            return self.graph.tensor(value, self.program.parameters[value])
        grid = self.grids[value]
        if grid is None:
            return value
        if value not in self.dequantized:
            names = [value, *self._scale(value, grid)]
            self.dequantized[value] = self.graph.node("DequantizeLinear", names, f"{value}.float")
        return self.dequantized[value]

    def _quantize(self, source: str, step: Step) -> None:
        """Codes of a float value: QuantizeLinear, whose uint8 saturates, and limits where the grid's are tighter."""
        value, grid = step.output, step.grid
        assert grid is not None
        limits = [(op, limit) for op, limit, end in (("Max", grid.low, 0), ("Min", grid.high, 255)) if limit != end]
        if not limits and (self._only_rounds_again(step) or value in self.added):
            limits = [("Max", 0)]  # changes nothing, and keeps runtimes from dropping the rounding
        first = f"{value}.unlimited" if limits else value
        codes = self.graph.node("QuantizeLinear", [source, *self._scale(value, grid)], first)
        for op, limit in limits:
            last = value if op == limits[-1][0] else self.graph.free(f"{value}.raised")
            codes = self.graph.node(op, [codes, self.graph.constant(limit, np.uint8)], last)

    def _only_rounds_again(self, step: Step) -> bool:
        """Whether codes go to another grid with nothing between that ONNX Runtime keeps.

        Of QuantizeLinear, DequantizeLinear, QuantizeLinear, DequantizeLinear it makes one pair, which rounds once
        instead of twice (measured with 1.24.4 and 1.31.1).
        """
        return self.grids.get(step.inputs[0]) is not None and (step.op == QUANTIZE or OPS[step.op].limits)

    def _scale(self, value: str, grid: ActivationGrid) -> tuple[str, str]:
        """Scale and zero point, stored once for all values on a grid."""
        key = replace(grid, bits=8, low=0, high=255, levels=None)
        if key not in self.scales:
            scale = self.graph.tensor(f"{value}.scale", np.asarray(grid.scale, np.float32))
            self.scales[key] = scale, self.graph.tensor(f"{value}.zero_point", np.uint8(grid.zero_point))  # type: ignore[arg-type]
        return self.scales[key]

    # --- weights ------------------------------------------------------------------------------------------------------

    def _weight(self, step: Step) -> str:
        """The dequantized weight.

        Zero points are subtracted as integers, for ONNX Runtime's kernels take weights around 0. DequantizeLinear gets
        zeros all the same: without them ONNX Runtime 1.24 and 1.31 leave a Gemm in float.
        """
        weight = step.weight
        assert weight is not None
        container = container_of(weight) if self.storage == "packed" else None
        scale = self.graph.tensor(f"{weight.name}.scale", weight.scale)
        if container is None:
            codes = self.graph.tensor(f"{weight.name}.codes", _kernel_codes(weight, weight.centered))
        elif weight.levels is not None:
            codes = self._from_levels(weight, weight.levels, container)
        else:
            codes = self._unpacked(weight, container)
        zeros = self.graph.constant(np.full(weight.scale.shape, weight.offset), np.uint8 if weight.offset else np.int8)
        return self.graph.node(
            "DequantizeLinear", [codes, scale, zeros], f"{step.output}.weight.float", axis=weight.axis
        )

    def _unpacked(self, weight: IntegerWeight, container: str) -> str:
        """The weight as its kernel takes it, computed from codes of less than a byte when the file is loaded."""
        stored = self.graph.tensor(f"{weight.name}.codes", weight.codes, container)
        codes = self._cached("Cast", [stored], f"{stored}.wide", to=6)  # TensorProto.INT32, which Mul takes
        if weight.zero_point.any():
            zero = weight.zero_point.reshape([-1 if a == weight.axis else 1 for a in range(weight.codes.ndim)])
            name = self.graph.tensor(f"{weight.name}.zero_point", zero.astype(np.int32))
            codes = self._cached("Sub", [codes, name], f"{stored}.centered")
        factor = self.graph.constant(1 << weight.shift, np.int32)
        codes = self._cached("Mul", [codes, factor], f"{stored}.shifted")
        if weight.offset:
            codes = self._cached("Add", [codes, self.graph.constant(weight.offset, np.int32)], f"{stored}.offset")
            return self._cached("Cast", [codes], f"{stored}.uint8", to=2)  # TensorProto.UINT8
        return self._cached("Cast", [codes], f"{stored}.int8", to=3)  # TensorProto.INT8

    def _from_levels(self, weight: IntegerWeight, levels: npt.NDArray[np.int8], container: str) -> str:
        """The int8 weight as packed places among its levels, looked up."""
        stored = self.graph.tensor(f"{weight.name}.codes", weight.places, container)
        places = self._cached("Cast", [stored], f"{stored}.wide", to=6)  # TensorProto.INT32
        if levels.ndim == 2:  # a channel's levels begin behind those of the channels before it
            first = (np.arange(len(levels)) * levels.shape[1]).astype(np.int32)
            shape = [-1 if a == weight.axis else 1 for a in range(weight.codes.ndim)]
            offsets = self.graph.tensor(f"{weight.name}.first_level", first.reshape(shape))
            places = self._cached("Add", [places, offsets], f"{stored}.places")
        table = self.graph.tensor(f"{weight.name}.levels", _kernel_codes(weight, levels.reshape(-1)))
        return self._cached("Gather", [table, places], f"{stored}.{'uint8' if weight.offset else 'int8'}", axis=0)

    def _bias(self, step: Step) -> str:
        """The int32 bias, on the scale of the product's accumulator."""
        grid, weight = self.grids[step.inputs[0]], step.weight
        assert grid is not None
        assert weight is not None
        codes = self.graph.tensor(f"{step.output}.bias.codes", step.bias)  # type: ignore[arg-type]
        scale = self.graph.tensor(f"{step.output}.bias.scale", grid.scale * weight.scale)
        return self.graph.node("DequantizeLinear", [codes, scale], f"{step.output}.bias.float", axis=0)

    def _cached(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """A node that several steps may share."""
        key = (op, *inputs)
        if key not in self.shared:
            self.shared[key] = self.graph.node(op, inputs, self.graph.free(output), **attributes)
        return self.shared[key]

    # --- about the file -----------------------------------------------------------------------------------------------

    def _shapes(self) -> dict[str, Shape]:
        known = dict(self.inputs)
        known |= {name: torch.from_numpy(array) for name, array in self.program.parameters.items()}
        known |= {name: torch.empty(weight.codes.shape, device="meta") for name, weight in self.weights.items()}
        return {name: tuple(value.shape) for name, value in infer_shapes(self.steps, known).items()}

    def _metadata(self) -> dict[str, str]:
        def text(value: Any) -> str:
            return json.dumps(value, separators=(",", ":"))

        return {
            "calibquant.file": "deploy",
            "calibquant.storage": self.storage,
            "calibquant.weights": text({name: weight.stored_bits for name, weight in self.weights.items()}),
            "calibquant.activations": text(
                {s.output: s.grid.stored_bits for s in self.program.steps if s.grid is not None}
            ),
            "calibquant.notes": text(list(self.program.notes)),
        }


def _kernel_codes(weight: IntegerWeight, centered: npt.NDArray[np.int8]) -> npt.NDArray[Any]:
    """Centered codes in the form that the weight's kernel takes: int8, or uint8 around 128."""
    return (centered.astype(np.int16) + weight.offset).astype(np.uint8) if weight.offset else centered


def container_of(weight: IntegerWeight) -> str | None:
    """The type of less than a byte that holds a weight's codes; None if INT8 does."""
    bits = 2 if weight.stored_bits <= 2 else 4 if weight.stored_bits <= 4 else None
    return None if bits is None else f"{'' if weight.signed and weight.levels is None else 'U'}INT{bits}"


def _with_weight_named(step: Step) -> Step:
    """With the weight's name where the op takes it."""
    if step.weight is None:
        return step
    place = OPS[step.op].weight
    return replace(step, inputs=tuple(step.weight.name if i == place else v for i, v in enumerate(step.inputs)))
