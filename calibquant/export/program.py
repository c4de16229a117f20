"""The integer program: what an integer runtime executes, in the order in which it does.

One list of steps serves the ONNX writer, the integer executor and the overflow audit; `lowering` makes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from calibquant.graph.ops import OPS
from calibquant.numerics.grid import PerChannel
from calibquant.numerics.levels import places_of

# The ops of a program that are not canonical.
QUANTIZE = "quantize"  # float or codes in, codes on another grid out
TABLE = "table"  # codes in, what a table of 256 codes gives for each out


@dataclass(frozen=True)
class ActivationGrid:
    """What an activation's codes mean: value = (code - zero_point) * scale.

    Args:
        scale: float32.
        zero_point: a code.
        bits: of the codes.
        low, high: limits of the codes that the step which makes them keeps; within 0 … 2^bits - 1.
        levels: the codes that occur, ascending; None: any.
    """

    scale: np.float32
    zero_point: int
    bits: int
    low: int
    high: int
    levels: tuple[int, ...] | None = None

    @property
    def stored_bits(self) -> int:
        """Bits that tell one of its codes from the others."""
        return self.bits if self.levels is None else max(1, (len(self.levels) - 1).bit_length())


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight as an integer kernel takes it: value = (codes - zero_point) * 2^shift * scale, per channel of `axis`.

    Args:
        name: of the parameter.
        codes: on the grid, uint8 or int8, the parameter's shape.
        zero_point: of each channel, int32 (C,); zeros for a signed grid.
        scale: of each channel, float32 (C,): the quantizer's divided by 2^shift; see `quantization.biases.kernel_scale`
            for channels without bits.
        bits: of the codes; where channels differ, of the widest.
        signed: whether the grid is signed.
        axis: output-channel axis.
        shift: see `quantization.biases.kernel_shift`.
        levels: the codes that occur, ascending, int8 (n,), or (C, n) for each channel its own; None: any of the grid.
        file_bits: of a code as files hold it, its place among the levels; None: `bits`.
        offset: 0 where kernels take int8. 128 where the sum of two products could leave 16 bits: kernels then take
            uint8, centered codes + 128 with zero point 128, which no processor saturates, but which is slower.
    """

    name: str
    codes: npt.NDArray[Any]
    zero_point: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]
    bits: int
    signed: bool
    axis: int
    shift: int = 0
    levels: npt.NDArray[np.int8] | None = None
    file_bits: int | None = None
    offset: int = 0

    @property
    def stored_bits(self) -> int:
        """Bits of a code as files hold it."""
        return self.bits if self.file_bits is None else self.file_bits

    @property
    def places(self) -> npt.NDArray[np.uint8]:
        """The place of each code among its levels, uint8."""
        assert self.levels is not None
        granularity, codes = PerChannel(self.axis), torch.from_numpy(self.codes)
        found = places_of(codes, torch.from_numpy(self.levels), granularity)
        return found.numpy().astype(np.uint8)

    @property
    def centered(self) -> npt.NDArray[np.int8]:
        """(codes - zero_point) * 2^shift, int8: what a kernel multiplies by."""
        centered = self.codes.astype(np.int32) - self.zero_point.reshape(self._shape)
        return (centered << self.shift).astype(np.int8)

    def values(self) -> npt.NDArray[np.float32]:
        """The float32 values that the simulation uses."""
        return self.centered.astype(np.float32) * self.scale.reshape(self._shape)

    @property
    def _shape(self) -> list[int]:
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return shape


@dataclass(frozen=True, eq=False)
class Step:
    """One operation.

    Args:
        op: a canonical op, `quantize` or `table`.
        inputs: names of values, as the op's positional arguments: a name, None, or a tuple of names (cat). Parameters
            are named too; None stands for `weight`, and for the bias of an integer product.
        output: name of the value it makes, that of the graph node whose value it is.
        attributes: the canonical op's keyword arguments.
        grid: of the output; None for a float output.
        weight: a quantized weight, in the place where the op takes its weight.
        bias: of an integer product, int32 (C,), on the scale of its accumulator: input scale * weight scale.
        on_codes: the op moves, selects or looks up codes; moved and selected ones keep their grid.
        integer: an integer kernel computes it: products with int32 accumulators, and sums of two codes. All other
            steps compute in float32 on dequantized inputs and round to `grid`, if there is one.
        table: of a `table` step, uint8 (256,): the code of `grid` that each code of its input becomes.
    """

    op: str
    inputs: tuple[Any, ...]
    output: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    grid: ActivationGrid | None = None
    weight: IntegerWeight | None = None
    bias: npt.NDArray[np.int32] | None = None
    on_codes: bool = False
    integer: bool = False
    table: npt.NDArray[np.uint8] | None = None

    @property
    def is_product(self) -> bool:
        """Whether it sums products with `weight` in int32 accumulators."""
        return self.integer and OPS[self.op].accumulates


@dataclass(frozen=True, eq=False)
class Program:
    """A network in integers.

    Args:
        inputs: names of the float inputs.
        steps: in execution order.
        output: name of the result.
        parameters: float32 or integer tensors that steps name.
        notes: what was changed so that it runs, and what stays float, in words.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    output: str
    parameters: Mapping[str, npt.NDArray[Any]]
    notes: tuple[str, ...]

    @property
    def grids(self) -> dict[str, ActivationGrid | None]:
        """The grid of each value; None for float values."""
        return {**dict.fromkeys(self.inputs), **{step.output: step.grid for step in self.steps}}


def names_of(inputs: Any) -> Iterator[str]:
    """All names among a step's inputs."""
    if isinstance(inputs, tuple):
        for item in inputs:
            yield from names_of(item)
    elif isinstance(inputs, str):
        yield inputs
