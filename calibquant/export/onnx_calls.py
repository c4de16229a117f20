"""What a row of the ONNX table sees of one operation: names, shapes and attributes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibquant.export.onnx_files import OnnxGraph, Shape
from calibquant.export.program import Step
from calibquant.graph.ops import OPS

BATCH = 2  # the batch that shapes are inferred for; dimension 0 is written as N or -1


@dataclass(frozen=True)
class Call:
    """One canonical op that is written as ONNX nodes.

    Args:
        graph: takes the nodes.
        inputs: names of ONNX values as the op's positional arguments: a name, None, or a tuple of names (cat).
        shapes: of the inputs, in the same form, dimension 0 of activations for BATCH images.
        output: name of the ONNX value to make.
        shape: of the output.
        attributes: the canonical op's keyword arguments.
        zero: what stands for 0.0: float32 0, or the zero point when the op works on uint8 codes.
    """

    graph: OnnxGraph
    inputs: tuple[Any, ...]
    shapes: tuple[Any, ...]
    output: str
    shape: Shape
    attributes: Mapping[str, Any]
    zero: np.generic = np.float32(0)  # noqa: RUF009  (a frozen value)

    def last(self, op: str, *inputs: str | None, **attributes: Any) -> None:
        """The node that makes the output; without inputs named, of the call's own."""
        self.graph.node(op, _names(inputs or self.inputs), self.output, **attributes)

    def before(self, op: str, *inputs: str | None, **attributes: Any) -> str:
        """A node before the last one; returns the name of its value."""
        return self.graph.node(op, _names(inputs), self.graph.free(f"{self.output}.{op.lower()}"), **attributes)

    def floats(self, values: Any) -> str:
        """A float32 constant."""
        return self.graph.constant(values)

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.graph.constant(values, np.int64)


def infer_shapes(steps: Iterable[Step], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All values as tensors of the meta device, which have shapes and types but no elements.

    Args:
        steps: in execution order.
        known: inputs and parameters by name.
    """
    values = {name: torch.empty_like(tensor, device="meta") for name, tensor in known.items()}
    for step in steps:
        arguments = resolve(step.inputs, values)
        row = OPS.get(step.op)
        values[step.output] = arguments[0] if row is None else row.run(*arguments, **step.attributes)
    return values


def resolve(inputs: Any, table: Mapping[str, Any]) -> Any:
    """The entries of a table in place of their names, through tuples; None stays."""
    if isinstance(inputs, (tuple, list)):
        return tuple(resolve(item, table) for item in inputs)
    return None if inputs is None else table[inputs]


def example_inputs(example: Tensor | Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of BATCH images with the shapes and types of an example, on the meta device."""
    tensors = [example] if isinstance(example, Tensor) else list(example)
    if len(tensors) != len(names):
        raise ValueError(f"the network has {len(names)} inputs, the example {len(tensors)}")
    return {
        name: torch.empty((BATCH, *t.shape[1:]), dtype=t.dtype, device="meta")
        for name, t in zip(names, tensors, strict=True)
    }


def numpy_dtype(tensor: Tensor) -> Any:
    """The NumPy type of a tensor's elements."""
    return torch.empty(0, dtype=tensor.dtype).numpy().dtype


def _names(inputs: Sequence[str | None]) -> list[str]:
    """An absent input is an empty name in ONNX, and nothing at the end."""
    names = ["" if name is None else name for name in inputs]
    while names and not names[-1]:
        names.pop()
    return names
