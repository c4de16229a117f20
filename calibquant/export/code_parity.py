"""The codes of deploy.onnx in ONNX Runtime, step by step, against the integer executor and the simulation.

Each step of the executor is fed the runtime's own codes, so that a step is compared by itself: where it has an exact
integer form, no code may differ; where it is computed in float, codes may differ by one step of their grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibquant.errors import ModelError
from calibquant.export.at_node import REPORT
from calibquant.export.executor import execute
from calibquant.export.file_names import DEPLOY
from calibquant.export.onnx_files import with_outputs
from calibquant.export.program import Program, Step
from calibquant.export.session import Session, open_session
from calibquant.numerics.affine import aligned
from calibquant.quantization import QuantModel

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


@dataclass(frozen=True)
class CodesFound:
    """What a comparison of codes found.

    Args:
        simulation, executor: each step against them.
        approximate: steps whose codes may differ from the executor's by one.
        fault: the first step that differs by more than it may; None if there is none.
    """

    simulation: tuple[CodeParity, ...]
    executor: tuple[CodeParity, ...]
    approximate: tuple[str, ...]
    fault: CodeParity | None


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


class Codes:
    """Compares the codes of deploy.onnx, chunk by chunk.

    Args:
        data: the file.
        program: what it holds.
        model: the simulation.
        threads: of the session.

    Raises:
        ModelError: the file does not load.
    """

    def __init__(self, data: bytes, program: Program, model: QuantModel, threads: int | None) -> None:
        self.program = program
        steps = [step for step in program.steps if step.grid is not None]
        names = [step.output for step in steps]
        self.session: Session = open_session(DEPLOY, with_outputs(data, names), threads)
        self.own = self.session.outputs[0]
        self.steps = [name for name in names if name in self.session.outputs]
        self.sites = {s.output: site for s in steps if s.output in self.steps and (site := _site(s, model)) is not None}
        self.approximate: set[str] = set()
        self.simulation: dict[str, _Tally] = {}
        self.executor: dict[str, _Tally] = {}

    def add(self, inputs: tuple[Array, ...], simulated: Mapping[str, Array]) -> Array:
        """Compare the codes of some images.

        Args:
            inputs: what enters the network.
            simulated: codes by quantizer, see `simulated_codes`.

        Returns:
            the executor's output, float32.

        Raises:
            ModelError: the file fails at run time, or gives an output of another shape.
        """
        values = dict(zip(self.session.outputs, self.session.run(*inputs), strict=True))
        done = execute(self.program, inputs, keep=True, given={name: values[name] for name in self.steps})
        self.approximate |= done.approximate
        for name in self.steps:
            self.executor.setdefault(name, _Tally()).add(done.values[name], values[name])
            if name in self.sites:
                self.simulation.setdefault(name, _Tally()).add(simulated[self.sites[name]], values[name])
        if self.program.output not in self.steps:
            if values[self.own].shape != done.output.shape:
                raise ModelError(DEPLOY, "gives outputs of another shape than the integer network", REPORT)
            self.executor.setdefault(self.program.output, _Tally()).add(done.output, values[self.own])
        return done.output

    def result(self) -> CodesFound:
        """The codes against the simulation and the executor."""
        simulation, executor = (
            tuple(CodeParity(name, t.count, t.differing, t.largest) for name, t in tallies.items())
            for tallies in (self.simulation, self.executor)
        )
        beyond = (row for row in executor if row.largest > (row.step in self.approximate))
        order = tuple(step.output for step in self.program.steps if step.output in self.approximate)
        return CodesFound(simulation, executor, order, next(beyond, None))


def _site(step: Step, model: QuantModel) -> str | None:
    """The quantizer of the simulation that makes a step's codes; None where it makes them elsewhere."""
    name = step.output.removesuffix(".codes")
    quantizer = model.activation_quantizers.get(name)
    if quantizer is None or step.grid is None:
        return None
    scale, zero_point = quantizer.get()
    return name if (np.float32(scale.item()), int(zero_point)) == (step.grid.scale, step.grid.zero_point) else None


@contextmanager
def simulated_codes(model: QuantModel) -> Iterator[dict[str, Array]]:
    """The codes that the quantizers of the simulation give within the context, int32, by quantizer."""
    codes: dict[str, Array] = {}

    def keep(name: str) -> Any:
        def hook(quantizer: Any, _inputs: object, value: Tensor) -> None:
            if not quantizer.dynamic:
                span = quantizer.plan.granularity
                scale, zero_point = (aligned(t, value, span) for t in quantizer.get())
                codes[name] = (torch.round(value / scale) + zero_point).to(torch.int32).numpy()

        return hook

    handles = [q.register_forward_hook(keep(name)) for name, q in model.activation_quantizers.items()]
    try:
        yield codes
    finally:
        for handle in handles:
            handle.remove()
