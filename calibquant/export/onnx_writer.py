"""The network as ONNX files of standard float ops: the folded float network, and the simulation.

A value of the graph node `conv1` is named `conv1`; in the simulation it is rounded to `conv1.quantized`, which is what
other nodes read. The integer network is written in `onnx_deploy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, fx

from calibquant.export.at_node import at_node
from calibquant.export.onnx_calls import BATCH, Call, example_inputs, infer_shapes, numpy_dtype, resolve
from calibquant.export.onnx_files import OnnxGraph
from calibquant.export.onnx_ops import ROWS
from calibquant.export.program import Step, names_of
from calibquant.graph.nodes import op_of
from calibquant.graph.ops import OPS
from calibquant.numerics.affine import MIN_SCALE, code_limits
from calibquant.numerics.levels import nearest_levels
from calibquant.quantization import QuantModel
from calibquant.quantization.model import parameter_tensors
from calibquant.quantization.quantizers import ActivationQuantizer


def float_onnx(model: QuantModel, example: Tensor | Sequence[Tensor]) -> bytes:
    """float.onnx: the float network, BatchNorm folded.

    Args:
        model: its teacher is written.
        example: input(s) of shape (N, ...); only their types and dimensions after the first count.

    Returns:
        an ONNX file (opset 21) of any batch size; its values have the names of the graph's nodes.
    """
    return _FloatFile(model, example, simulated=False).write()


def fake_quant_onnx(model: QuantModel, example: Tensor | Sequence[Tensor]) -> bytes:
    """fake_quant.onnx: what the quantized network simulates, in float ops that any runtime has.

    An activation is divided by its scale, rounded half to even, limited to its grid and multiplied again, which gives
    what `numerics.affine.fake_quantize` gives, bit for bit; weights are dequantized, biases rounded as the simulation
    rounds them. Any placement and bits, stored and dynamic ranges.

    Args:
        model: calibrated.
        example: input(s) of shape (N, ...); only their types and dimensions after the first count.

    Returns:
        an ONNX file (opset 21) of any batch size; what node `conv1` gives is `conv1`, rounded `conv1.quantized`.

    Raises:
        QuantizationError: a quantizer is not calibrated.
    """
    return _FloatFile(model, example, simulated=True).write()


class _FloatFile:
    """Walks through the graph once."""

    def __init__(self, model: QuantModel, example: Tensor | Sequence[Tensor], simulated: bool) -> None:
        self.model, self.simulated = model, simulated
        self.quantizers = model.activation_quantizers if simulated else {}
        nodes = model.teacher.graph.nodes
        self.inputs = example_inputs(example, [n.name for n in nodes if n.op == "placeholder"])
        self.parameters = parameter_tensors(model.teacher)
        self.steps = [_step(n) for n in nodes if n.op == "call_function"]
        if simulated:
            self._round_biases()
        (self.result,) = (n.all_input_nodes[0].name for n in nodes if n.op == "output")
        made = [*self.inputs, *(step.output for step in self.steps)]
        self.graph = OnnxGraph([*made, *(f"{name}.quantized" for name in made)])

    def write(self) -> bytes:
        values = infer_shapes(self.steps, self.inputs | self.parameters)
        shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
        names: dict[str, str] = {}
        for name, tensor in self.inputs.items():
            self.graph.input(name, shapes[name], numpy_dtype(tensor))
            names[name] = self._quantized(name)
        for name in dict.fromkeys(name for step in self.steps for name in names_of(step.inputs)):
            if name in self.parameters:
                names[name] = self.graph.tensor(name, self._parameter(name))
        for step in self.steps:
            inputs, known = resolve(step.inputs, names), resolve(step.inputs, shapes)
            output = step.output
            with at_node(output, "written"):
                ROWS[step.op](Call(self.graph, inputs, known, output, shapes[output], step.attributes))
            names[output] = self._quantized(output)
        file = "fake_quant" if self.simulated else "float"
        return self.graph.to_bytes(names[self.result], shapes[self.result], BATCH, {"calibquant.file": file})

    def _round_biases(self) -> None:
        """Each product gets the bias that the simulation gives it; several may share one parameter."""
        biases = self.model.simulated_biases()
        for i, step in enumerate(self.steps):
            if step.output in biases:
                name = f"{step.output}.rounded_bias"
                self.parameters[name] = biases[step.output]
                place = OPS[step.op].bias
                inputs = tuple(name if j == place else value for j, value in enumerate(step.inputs))
                self.steps[i] = replace(step, inputs=inputs)

    def _parameter(self, name: str) -> Any:
        if self.simulated and name in self.model.weight_quantizers:
            return self.model.weight_quantizers[name].get().dequantize().detach().cpu().numpy()
        return self.parameters[name].detach().cpu().numpy()

    def _quantized(self, name: str) -> str:
        """The name under which others read a value."""
        quantizer = self.quantizers.get(name)
        return name if quantizer is None else write_fake_quantize(self.graph, name, quantizer)


def write_fake_quantize(graph: OnnxGraph, name: str, quantizer: ActivationQuantizer) -> str:
    """Nodes that round the value `name`; returns the name of the rounded value."""
    grid = quantizer.plan.grid
    if quantizer.dynamic:
        scale, zero_point = _dynamic_range(graph, name, quantizer)
    else:
        stored_scale, stored_zero_point = (_of_channels(t, quantizer) for t in quantizer.get())
        scale = graph.tensor(f"{name}.scale", stored_scale.astype(np.float32))
        zero_point = graph.tensor(f"{name}.zero_point", stored_zero_point.astype(np.float32))
    steps = graph.node("Div", [name, scale], graph.free(f"{name}.steps"))
    rounded = graph.node("Round", [steps], graph.free(f"{name}.rounded"))
    moved = graph.node("Add", [rounded, zero_point], graph.free(f"{name}.moved"))
    if quantizer.channel_bits is None:
        low, high = graph.constant(grid.qmin), graph.constant(grid.qmax)
        codes = graph.node("Clip", [moved, low, high], graph.free(f"{name}.codes"))
    else:  # Clip takes no limits for each channel
        ends = (_of_channels(end, quantizer) for end in code_limits(quantizer.channel_bits, grid.signed))
        low, high = (graph.tensor(f"{name}.limit", end.astype(np.float32)) for end in ends)
        raised = graph.node("Max", [moved, low], graph.free(f"{name}.raised"))
        codes = graph.node("Min", [raised, high], graph.free(f"{name}.codes"))
    if quantizer.levels is not None:
        table = graph.constant(nearest_levels(quantizer.levels.cpu()).float().numpy())
        places = graph.node("Cast", [codes], graph.free(f"{name}.index"), to=6)  # TensorProto.INT32
        codes = graph.node("Gather", [table, places], graph.free(f"{name}.level"), axis=0)
    centered = graph.node("Sub", [codes, zero_point], graph.free(f"{name}.centered"))
    return graph.node("Mul", [centered, scale], f"{name}.quantized")


def _of_channels(values: Tensor, quantizer: ActivationQuantizer) -> Any:
    """Values () or (C,) as an array that broadcasts against the activation."""
    array = values.detach().cpu().numpy()
    return array.reshape(-1, 1, 1) if quantizer.per_channel else array


def _dynamic_range(graph: OnnxGraph, name: str, quantizer: ActivationQuantizer) -> tuple[str, str]:
    """Scale and zero point of each batch's own range, as `quantizers.activation_affine` computes them."""
    grid, zero = quantizer.plan.grid, graph.constant(0)

    def add(op: str, *inputs: str, **attributes: Any) -> str:
        return graph.node(op, inputs, graph.free(f"{name}.range.{op.lower()}"), **attributes)

    low = add("Min", add("ReduceMin", name, keepdims=0), zero)
    high = add("Max", add("ReduceMax", name, keepdims=0), zero)
    smallest = graph.constant(MIN_SCALE)
    scale = add("Max", add("Div", add("Sub", high, low), graph.constant(grid.steps)), smallest)
    first, last = graph.constant(grid.qmin), graph.constant(grid.qmax)
    zero_point = add("Clip", add("Sub", first, add("Round", add("Div", low, scale))), first, last)
    if not quantizer.plan.symmetric:
        return scale, zero_point
    even = add("Max", add("Div", add("Max", add("Neg", low), high), graph.constant(grid.steps / 2)), smallest)
    negative, middle = add("Less", low, zero), graph.constant(grid.qmin + (1 << (grid.bits - 1)))
    return add("Where", negative, even, scale), add("Where", negative, middle, zero_point)


def _step(node: fx.Node) -> Step:
    op = op_of(node)
    assert op is not None
    return Step(op.name, _named(node.args), node.name, node.kwargs)


def _named(argument: Any) -> Any:
    """Nodes by the names of their values, parameters by their own."""
    if isinstance(argument, (list, tuple)):
        return tuple(_named(a) for a in argument)
    if not isinstance(argument, fx.Node):
        return argument
    return str(argument.target) if argument.op == "get_attr" else argument.name
