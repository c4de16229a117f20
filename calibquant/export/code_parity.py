"""The values of exported files in ONNX Runtime, step by step, against the integer executor and the simulation.

Each step of the executor and each quantizer of the simulation is fed the runtime's own values, so that a step is
compared by itself. Against the executor no code may differ in a step with an exact integer form. Where a step is
computed in float, and against the simulation, codes may differ by one step of their grid.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibquant.errors import ModelError
from calibquant.export.at_node import REPORT
from calibquant.export.executor import execute
from calibquant.export.file_names import DEPLOY, FAKE_QUANT
from calibquant.export.onnx_files import with_outputs
from calibquant.export.program import Program, Step
from calibquant.export.session import open_session
from calibquant.numerics.affine import aligned
from calibquant.quantization import QuantModel
from calibquant.quantization.quantizers import ActivationQuantizer

Array = npt.NDArray[Any]
FLOAT_OUTPUT = 1e-4  # bound on a float output that is computed in another order, relative to the largest


@dataclass(frozen=True)
class CodeParity:
    """The values of one step of the integer network.

    Args:
        step: name of its value.
        count: codes compared; values, if the step gives the network's float output.
        differing: how many differ.
        largest: largest difference in steps of the grid; of a float output in 1e-4 of its largest value, rounded up.
    """

    step: str
    count: int
    differing: int
    largest: int


@dataclass
class _Tally:
    count: int = 0
    differing: int = 0
    largest: int = 0

    def add(self, want: Array, got: Array) -> None:
        got = got.reshape(want.shape)
        if want.dtype.kind == "f":
            scale = FLOAT_OUTPUT * max(1.0, float(np.abs(want).max(initial=0)))
            difference = np.ceil(np.abs(want.astype(np.float64) - got) / scale)
        else:
            difference = np.abs(want.astype(np.int32) - got.astype(np.int32))
        self.count += difference.size
        self.differing += int(np.count_nonzero(difference))
        self.largest = max(self.largest, int(difference.max(initial=0)))


class Simulated:
    """The simulation in float64, whose quantizers go on with a runtime's values.

    Args:
        model: the simulation; a copy of it is run.
    """

    def __init__(self, model: QuantModel) -> None:
        self.model = copy.deepcopy(model).double()
        self.tallies: dict[str, _Tally] = {}

    @property
    def names(self) -> list[str]:
        """The quantizers that have a stored grid."""
        return [name for name, quantizer in self.model.activation_quantizers.items() if not quantizer.dynamic]

    def run(self, inputs: Sequence[Tensor], values: Mapping[str, Array]) -> Array:
        """Compare the codes of some images.

        Args:
            inputs: what enters the network.
            values: by quantizer, what the runtime gave in its place; its own value is taken where there is none.

        Returns:
            the simulation's output, float32.
        """
        handles = [
            self.model.activation_quantizers[name].register_forward_hook(self._hook(name, torch.from_numpy(value)))
            for name, value in values.items()
        ]
        try:
            with torch.inference_mode():
                wide = (x.double() if x.is_floating_point() else x for x in inputs)
                output: Array = self.model(*wide).float().numpy()
        finally:
            for handle in handles:
                handle.remove()
        return output

    def _hook(self, name: str, given: Tensor) -> Any:
        """Counts how the runtime's codes differ, and goes on with its values."""

        def hook(quantizer: ActivationQuantizer, _inputs: object, own: Tensor) -> Tensor:
            theirs = given.reshape(own.shape).double()
            want, got = (_codes(quantizer, value) for value in (own, theirs))
            self.tallies.setdefault(name, _Tally()).add(want, got)
            return theirs

        return hook

    def rows(self) -> tuple[CodeParity, ...]:
        """Each quantizer's codes."""
        return _rows(self.tallies)

    def fault(self) -> CodeParity | None:
        """The first quantizer whose codes differ by more than one step; None if there is none."""
        return next((row for row in self.rows() if row.largest > 1), None)


class FakeQuantCodes:
    """Compares the rounded values of fake_quant.onnx with the simulation, chunk by chunk.

    Args:
        data: the file.
        model: the simulation.
        threads: of the session.

    Raises:
        ModelError: the file does not load.
    """

    def __init__(self, data: bytes, model: QuantModel, threads: int | None) -> None:
        self.simulated = Simulated(model)
        names = [f"{name}.quantized" for name in self.simulated.names]
        self.session = open_session(FAKE_QUANT, with_outputs(data, names), threads)

    def add(self, inputs: tuple[Tensor, ...]) -> Array:
        """Compare some images; returns the simulation's output, float32.

        Raises:
            ModelError: the file fails at run time.
        """
        values = dict(zip(self.session.outputs, self.session.run(*(x.numpy() for x in inputs)), strict=True))
        return self.simulated.run(inputs, {name: values[f"{name}.quantized"] for name in self.simulated.names})


class DeployCodes:
    """Compares the codes of deploy.onnx with the executor and the simulation, chunk by chunk.

    Args:
        data: the file.
        program: what it holds.
        model: the simulation.
        threads: of the session.

    Raises:
        ModelError: the file does not load.
    """

    def __init__(self, data: bytes, program: Program, model: QuantModel, threads: int | None) -> None:
        self.program, self.simulated = program, Simulated(model)
        self.steps = {step.output: step for step in program.steps if step.grid is not None}
        self.session = open_session(DEPLOY, with_outputs(data, list(self.steps)), threads)
        self.own = self.session.outputs[0]
        sites = {name: _site(step, model) for name, step in self.steps.items()}
        self.sites = {site: name for name, site in sites.items() if site is not None}
        self.approximate: set[str] = set()
        self.tallies: dict[str, _Tally] = {}

    def add(self, inputs: tuple[Tensor, ...]) -> tuple[Array, Array]:
        """Compare some images.

        Returns:
            the outputs of the executor and of the simulation, float32.

        Raises:
            ModelError: the file fails at run time, or gives an output of another shape.
        """
        arrays = tuple(x.numpy() for x in inputs)
        values = dict(zip(self.session.outputs, self.session.run(*arrays), strict=True))
        done = execute(self.program, arrays, keep=True, given={name: values[name] for name in self.steps})
        self.approximate |= done.approximate
        for name in self.steps:
            self.tallies.setdefault(name, _Tally()).add(done.values[name], values[name])
        if self.program.output not in self.steps:
            if values[self.own].shape != done.output.shape:
                raise ModelError(DEPLOY, "gives outputs of another shape than the integer network", REPORT)
            self.tallies.setdefault(self.program.output, _Tally()).add(done.output, values[self.own])
        given = {site: _dequantized(self.steps[name], values[name]) for site, name in self.sites.items()}
        return done.output, self.simulated.run(inputs, given)

    def rows(self) -> tuple[CodeParity, ...]:
        """Each step's codes against the executor's."""
        return _rows(self.tallies)

    def fault(self) -> CodeParity | None:
        """The first step that differs from the executor by more than it may; None if there is none."""
        return next((row for row in self.rows() if row.largest > (row.step in self.approximate)), None)

    def approximate_steps(self) -> tuple[str, ...]:
        """Steps whose codes may differ from the executor's by one, in order."""
        return tuple(step.output for step in self.program.steps if step.output in self.approximate)


def _rows(tallies: Mapping[str, _Tally]) -> tuple[CodeParity, ...]:
    return tuple(CodeParity(name, t.count, t.differing, t.largest) for name, t in tallies.items())


def _codes(quantizer: ActivationQuantizer, value: Tensor) -> Array:
    """The codes of rounded values, int32."""
    scale, zero_point = (aligned(t, value, quantizer.plan.granularity) for t in quantizer.get())
    codes: Array = (torch.round(value / scale) + zero_point).to(torch.int32).numpy()
    return codes


def _dequantized(step: Step, codes: Array) -> Array:
    """Values of codes, float64."""
    assert step.grid is not None
    values: Array = (codes.astype(np.float64) - step.grid.zero_point) * np.float64(step.grid.scale)
    return values


def _site(step: Step, model: QuantModel) -> str | None:
    """The quantizer of the simulation that makes a step's codes; None where it makes them elsewhere."""
    name = step.output.removesuffix(".codes")
    quantizer = model.activation_quantizers.get(name)
    if quantizer is None or step.grid is None:
        return None
    scale, zero_point = quantizer.get()
    return name if (np.float32(scale.item()), int(zero_point)) == (step.grid.scale, step.grid.zero_point) else None
