"""The integer program of a quantized network.

Activation functions that only limit values (ReLU, ReLU6) become limits of the codes, which is exact because rounding is
monotone. What else is computed value by value from one tensor of codes becomes a table of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from calibquant.errors import QuantizationError
from calibquant.export.at_node import at_node
from calibquant.export.audit import saturating_channels
from calibquant.export.functions import Function, function_of, identity_of
from calibquant.export.kernels import level_table
from calibquant.export.program import QUANTIZE, TABLE, ActivationGrid, IntegerWeight, Program, Step, names_of
from calibquant.graph.limits import limits_of
from calibquant.graph.nodes import activations_of, kind_of, op_of, operands_of, weight_of
from calibquant.graph.ops import Kind
from calibquant.numerics.affine import QTensor
from calibquant.numerics.grid import PerChannel
from calibquant.quantization import QuantModel
from calibquant.quantization.biases import bias_step, kernel_scale, kernel_shift, scale_factors, with_larger_scale
from calibquant.quantization.model import parameter_tensors


def refusal(model: QuantModel) -> str | None:
    """Why a network has no integer program, in words; None if it has one."""
    if model.plan.placement != "integer":
        return f"the {model.plan.placement} placement leaves inputs of convolutions and additions in float"
    if any(quantizer.dynamic for quantizer in model.activation_quantizers.values()):
        return "dynamic activation ranges are not stored"
    if any(quantizer.per_channel for quantizer in model.activation_quantizers.values()):
        return "activations with a scale for each channel exist in simulation only"
    wide = [q.name for q in model.quantizers if q.plan.grid.bits > 8]
    if wide:
        return f"{wide[0]} has 16 bits, for which integer kernels do not exist"
    return None


def make_program(model: QuantModel) -> Program:
    """The integer program of a calibrated network.

    Raises:
        QuantizationError: it has none, see `refusal`; or a quantizer is not calibrated.
    """
    reason = refusal(model)
    if reason is not None:
        raise QuantizationError("integer program", reason, "quantize with quant.placement=integer and stored ranges")
    return _Lowering(model).lower()


class _Lowering:
    """Walks through the graph once."""

    def __init__(self, model: QuantModel) -> None:
        self.model = model
        self.steps: list[Step] = []
        self.grids: dict[str, ActivationGrid | None] = {}
        self.value: dict[fx.Node, str] = {}  # the name of each node's value, once a step makes it
        self.functions: dict[fx.Node, Function] = {}  # steps make their values where another op reads them
        self.notes: list[str] = []
        self.tensors = {name: tensor.detach().cpu() for name, tensor in parameter_tensors(model.teacher).items()}
        self.weights = {name: _integer_weight(name, q.get()) for name, q in model.weight_quantizers.items()}
        self.biases, self.simulated = model.biases(), model.simulated_biases()

    def lower(self) -> Program:
        inputs, output = [], ""
        for node in self.model.teacher.graph.nodes:
            if node.op == "placeholder":
                inputs.append(node.name)
                self.grids[node.name], self.value[node] = None, node.name
                grid = self._grid(node)
                if grid is not None:
                    self.value[node] = self._quantized(node.name, grid, f"{node.name}.codes")
            elif node.op == "output":
                output = self._value(node.all_input_nodes[0])
            elif node.op == "call_function" and node not in self.value:
                with at_node(node.name, "made an integer step"):
                    self._lower_op(node)
        named = {name for step in self.steps for name in names_of(step.inputs)}
        parameters = {
            name: self.weights[name].values() if name in self.weights else tensor.numpy()
            for name, tensor in self.tensors.items()
            if name in named
        }
        return Program(tuple(inputs), tuple(self.steps), output, parameters, tuple(self.notes))

    def _lower_op(self, node: fx.Node) -> None:
        op, function = op_of(node), function_of(node, self._operand)
        assert op is not None
        if function is not None:
            grid = self._grid(node)
            self.functions[node] = function if grid is None else function.rounded(grid)
            return
        last, grid = self._result(node)
        if op.keeps_grid and last is node:
            self._lower_move(node)
        elif op.kind is Kind.CONCAT and grid is not None:
            parts = [self._on_grid(n, grid, node) for n in operands_of(node)]
            self._add(Step(op.name, (tuple(parts),), last.name, node.kwargs, grid, on_codes=True))
        else:
            self._lower_computed(node, last.name, grid)
        while last is not node:
            self.value[last] = self.steps[-1].output
            last = activations_of(last)[0]
        self.value[node] = self.steps[-1].output

    def _lower_move(self, node: fx.Node) -> None:
        """An op that keeps its input's grid works on codes where there are any."""
        inputs = self._inputs(node)
        grid = self.grids[inputs[0]]
        name = op_of(node).name  # type: ignore[union-attr]
        self._add(Step(name, inputs, node.name, node.kwargs, grid, on_codes=grid is not None))
        own = self._grid(node)
        if own is not None:
            self._quantized(node.name, own, f"{node.name}.codes")

    def _lower_computed(self, node: fx.Node, output: str, grid: ActivationGrid | None) -> None:
        op, inputs = op_of(node), list(self._inputs(node))
        assert op is not None
        source = [self.grids[self._value(n)] for n in operands_of(node)]
        parameter = weight_of(node)
        weight = None if parameter is None else self.weights.get(str(parameter.target))
        bias = None
        exact = op.bias is None or inputs[op.bias] is None or node.name in self.biases
        integer = None not in source and (
            (op.accumulates and weight is not None and exact and (grid is not None or op.name == "linear"))
            or (op.name == "add" and grid is not None and len(source) == 2)
        )
        if weight is not None:
            inputs[op.weight or 0] = None
            if integer and op.bias is not None and inputs[op.bias] is not None:
                weight, bias = self._with_bias(node)
                inputs[op.bias] = None
            elif node.name in self.simulated:  # computed in float, with the bias that the simulation has
                name = f"{node.name}.bias"
                self.tensors[name] = self.simulated[node.name].cpu()
                inputs[op.bias or 0] = name
        elif op.integer and not integer and op.kind is not Kind.POOL:
            self.notes.append(f"{node.name} ({op.name}) is computed in float on dequantized inputs")
        if weight is not None and not integer:
            self.notes.append(
                f"{node.name} ({op.name}) is computed in float, with its weight stored in {weight.stored_bits} bits"
            )
        step = Step(op.name, tuple(inputs), output, node.kwargs, grid, weight, bias, integer=integer)
        self._add(self._within_reach(step) if step.is_product else step)

    def _within_reach(self, step: Step) -> Step:
        """The step with its weight in the form that no processor saturates, unless the plan asks for full reach."""
        if self.model.plan.reach == "full" or not saturating_channels(step, self.grids).any():
            return step
        assert step.weight is not None
        self.notes.append(
            f"{step.output} ({step.op}): its weight is stored as uint8, because pairs of products pass 16 bits"
        )
        return replace(step, weight=replace(step.weight, offset=128))

    def _result(self, node: fx.Node) -> tuple[fx.Node, ActivationGrid | None]:
        """Where a node's value is quantized, behind functions that only limit it; without a grid, the node itself."""
        last, low, high = node, -math.inf, math.inf
        while True:
            grid = self._grid(last)
            if grid is not None:
                return last, _limited(grid, low, high)
            reader = next(iter(last.users)) if len(last.users) == 1 else None
            if reader is None:
                return node, None
            if kind_of(reader) is Kind.CONCAT and (grid := self._grid(reader)) is not None:
                return last, _limited(grid, low, high)
            limits = limits_of(reader)
            if limits is None:
                return node, None
            low, high = (min(max(value, limits[0]), limits[1]) for value in (low, high))
            last = reader

    def _with_bias(self, node: fx.Node) -> tuple[IntegerWeight, npt.NDArray[np.int32]]:
        """The weight and the bias in int32; where that does not fit yet, the weight with larger scales."""
        source, quantizer, values = self.biases[node.name]
        weight = quantizer.get()
        factors = scale_factors(weight, values, source)
        if (factors > 1).any():
            weight = with_larger_scale(weight, factors)
            count = int((factors > 1).sum())
            self.notes.append(f"{node.name}: the scales of {count} channels were raised so that the bias fits int32")
        steps = torch.round(values / bias_step(source.get()[0], weight))
        return _integer_weight(quantizer.name, weight), steps.double().cpu().numpy().astype(np.int32)

    # --- values -------------------------------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> str:
        """The name of a node's value; a step makes it, if none did."""
        if node not in self.value:
            grid = self._grid(node)
            if grid is None:  # a function in float
                self._lower_computed(node, node.name, None)
            else:
                self._look_up(self.functions[node], grid, node.name)
            self.value[node] = node.name
        return self.value[node]

    def _operand(self, node: fx.Node) -> Function | Tensor | None:
        """What a function reads: another function or a value on a grid, a parameter, or None for a float value."""
        if node.op == "get_attr":
            return self.tensors[str(node.target)]
        if node in self.functions:
            return self.functions[node]
        value = self.value[node]
        grid = self.grids[value]
        return None if grid is None else identity_of(value, grid)

    def _look_up(self, function: Function, grid: ActivationGrid, output: str) -> None:
        self._add(Step(TABLE, (function.source,), output, grid=grid, on_codes=True, table=function.codes(grid)))

    def _inputs(self, node: fx.Node) -> tuple[Any, ...]:
        def name(argument: Any) -> Any:
            if isinstance(argument, (list, tuple)):
                return tuple(name(a) for a in argument)
            if not isinstance(argument, fx.Node):
                return argument
            return str(argument.target) if argument.op == "get_attr" else self._value(argument)

        return tuple(name(argument) for argument in node.args)

    def _on_grid(self, source: fx.Node, grid: ActivationGrid, reader: fx.Node) -> str:
        """The value of a node on the grid of its reader: as it is, if it lies there already."""
        if source in self.functions and self._grid(source) is None:
            name = source.name if len(source.users) == 1 else f"{source.name}.{reader.name}"
            if name not in self.grids:
                self._look_up(self.functions[source], grid, name)
            return name
        value = self._value(source)
        name = f"{value}.{reader.name}"
        own = self.grids[value]
        same = own is not None and _meaning(own) == _meaning(grid)
        if same and grid.low <= own.low and own.high <= grid.high:  # type: ignore[union-attr]
            return value
        return self._quantized(value, grid, name)

    def _quantized(self, value: str, grid: ActivationGrid, name: str) -> str:
        if name not in self.grids:
            self._add(Step(QUANTIZE, (value,), name, grid=grid))
        return name

    def _grid(self, node: fx.Node) -> ActivationGrid | None:
        quantizer = self.model.activation_quantizers.get(node.name)
        if quantizer is None:
            return None
        scale, zero_point = quantizer.get()
        grid = quantizer.plan.grid
        levels = None if quantizer.levels is None else tuple(quantizer.levels.tolist())
        return ActivationGrid(np.float32(scale.item()), int(zero_point), grid.bits, grid.qmin, grid.qmax, levels)

    def _add(self, step: Step) -> None:
        """Take a step; the codes that it makes on a grid of few levels are rounded on to these."""
        grid = step.grid
        if grid is not None and grid.levels is not None and not step.on_codes:
            wide = f"{step.output}.wide"
            self._add(replace(step, output=wide, grid=replace(grid, levels=None)))
            step = Step(TABLE, (wide,), step.output, grid=grid, on_codes=True, table=level_table(grid))
        self.steps.append(step)
        self.grids[step.output] = step.grid


def _limited(grid: ActivationGrid, low: float, high: float) -> ActivationGrid:
    """A grid whose codes stay where values within the limits are rounded to.

    round is monotone, so limiting codes gives what rounding limited values would.
    """
    ends = [
        end if math.isinf(value) else min(max(_code(value, grid), grid.low), grid.high)
        for value, end in ((low, grid.low), (high, grid.high))
    ]
    return replace(grid, low=ends[0], high=ends[1])


def _meaning(grid: ActivationGrid) -> tuple[Any, ...]:
    return grid.scale, grid.zero_point, grid.levels


def _code(value: float, grid: ActivationGrid) -> int:
    return int(np.rint(np.float32(value) / grid.scale)) + grid.zero_point


def _integer_weight(name: str, q: QTensor) -> IntegerWeight:
    axis = q.granularity.axis if isinstance(q.granularity, PerChannel) else 0
    channels = q.codes.shape[axis]
    scale, zero_point = (
        value.detach().cpu().reshape(-1).expand(channels).contiguous().numpy()
        for value in (kernel_scale(q), q.zero_point)
    )
    shift = kernel_shift(q.grid.bits)
    codes = q.codes.cpu().numpy()
    levels = None if q.levels is None else q.levels.cpu().numpy()
    stored = None if levels is None else max(1, (levels.shape[-1] - 1).bit_length())
    return IntegerWeight(
        name, codes, zero_point.astype(np.int32), scale, q.grid.bits, q.grid.signed, axis, shift, levels, stored
    )
