"""The integer executor: runs an integer program in NumPy as ONNX Runtime runs deploy.onnx, to the bit.

It is the golden model for bringing up hardware: it needs no ONNX Runtime, and gives the codes of every value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from calibquant.export import kernels
from calibquant.export.at_node import at_node
from calibquant.export.audit import in_pairs
from calibquant.export.kernels import Codes, Floats
from calibquant.export.program import QUANTIZE, TABLE, ActivationGrid, Program, Step, names_of
from calibquant.graph.ops import OPS

Array = npt.NDArray[Any]
Grids = Mapping[str, ActivationGrid | None]

EXACT = {
    QUANTIZE, "add", "sub", "mul", "div", "cat", "relu", "clamp", "leaky_relu", "prelu", "mul_scalar", "add_scalar",
    "max_pool2d", "adaptive_max_pool2d", "amax", "flatten", "reshape", "permute", "slice_", "pad", "pad_value",
    "upsample_nearest", "pixel_shuffle", "pixel_unshuffle", "embedding",
}  # fmt: skip
"""Ops in which no sum has an order and no function is approximated: float32 leaves them one result."""


@dataclass(frozen=True, eq=False)
class Execution:
    """What a program computed.

    Args:
        output: float32; dequantized if it lies on a grid.
        values: each step's value by name, if they were asked for: uint8 codes on a grid, float32 without one.
        approximate: steps that ONNX Runtime computes in float32 in an order of its own, or by an approximation of its
            own. Their codes may differ from these by one step, and so may what reads them.
    """

    output: Floats
    values: Mapping[str, Array]
    approximate: frozenset[str]


def execute(
    program: Program,
    images: Array | Sequence[Array],
    keep: bool = False,
    given: Mapping[str, Array] | None = None,
    saturating: bool = False,
) -> Execution:
    """Run an integer program.

    Args:
        program: what to run.
        images: float32 (N, C, H, W), or whatever the network takes; a sequence of arrays if it takes several.
        keep: keep the value of every step.
        given: codes by step. Each step that reads such a value is fed these codes instead of the executor's own, so
            that every step can be compared with a runtime by itself.
        saturating: compute as ONNX Runtime does on x86 without VNNI, whose kernels add two products in 16 bits.

    Returns:
        the output, and the values if they are kept.

    Raises:
        ValueError: the program takes another number of inputs.
        ModelError: a step cannot be computed.

    Example:
        >>> execute(make_program(model), images).output.argmax(1)  # doctest: +SKIP
        array([3, 8, 8])
    """
    inputs = (images,) if isinstance(images, np.ndarray) else tuple(images)
    if len(inputs) != len(program.inputs):
        raise ValueError(f"the program takes {len(program.inputs)} inputs, not {len(inputs)}")
    run, given = _Run(program, dict(zip(program.inputs, inputs, strict=True)), saturating), given or {}
    made: dict[str, Array] = {}
    for position, step in enumerate(program.steps):
        with at_node(step.output, "computed"):
            value = run.compute(step)
        if keep:
            made[step.output] = value
        run.values[step.output] = given.get(step.output, value)
        run.forget(position)
    return Execution(run.floats(program.output), made, frozenset(run.approximate))


class _Run:
    """The values of a program for one batch."""

    def __init__(self, program: Program, inputs: dict[str, Array], saturating: bool) -> None:
        self.program, self.grids, self.saturating = program, program.grids, saturating
        self.values: dict[str, Array] = dict(inputs)
        self.approximate: set[str] = set()
        self.last = {name: i for i, step in enumerate(program.steps) for name in names_of(step.inputs)}

    def forget(self, position: int) -> None:
        """Drop values that no step behind this one reads."""
        kept = {n: v for n, v in self.values.items() if self.last.get(n, -1) > position or n == self.program.output}
        self.values = kept

    def compute(self, step: Step) -> Array:
        """The value of a step: codes if it has a grid, else float32."""
        if step.op == TABLE:
            return self._looked_up(step)
        if step.on_codes:
            return self._moved(step)
        if step.is_product:
            return self._product(step)
        fused = self._fused(step)
        if fused is not None:
            return fused
        value = self._mean(step)
        if value is None:
            floats = {name for name in names_of(step.inputs) if self.grids.get(name) is None}
            if step.op not in EXACT or floats & self.approximate:
                self.approximate.add(step.output)
            value = self._float(step)
        return value if step.grid is None else kernels.quantize(value, step.grid)

    def floats(self, name: str) -> Array:
        """A value or a parameter in float32; an input of indices stays as it is."""
        if name in self.program.parameters:
            return self.program.parameters[name]
        grid = self.grids[name]
        return self.values[name] if grid is None else kernels.dequantize(self.values[name], grid)

    def _moved(self, step: Step) -> Codes:
        """Moves codes; what is padded with zero is padded with their zero point."""
        grid = step.grid
        assert grid is not None
        inputs = _tensors(step.inputs, lambda name: kernels.centered(self.values[name], grid).astype(np.float32))
        moved = OPS[step.op].run(*inputs, **step.attributes).numpy()
        return (moved + grid.zero_point).astype(np.uint8)

    def _looked_up(self, step: Step) -> Codes:
        """What the table gives for each code."""
        assert step.table is not None
        return step.table[self.values[step.inputs[0]]]

    def _product(self, step: Step) -> Array:
        """A convolution or a linear layer on int32 accumulators."""
        sums = sums_of(step, self.values[step.inputs[0]], self.grids, self.saturating)
        multiplier = multiplier_of(step, self.grids)
        if step.grid is None:
            return sums.astype(np.float32) * multiplier
        shape = [1] * sums.ndim
        shape[-1 if step.op == "linear" else 1] = -1
        return kernels.requantize(sums, multiplier.reshape(shape), step.grid)

    def _fused(self, step: Step) -> Codes | None:
        """What one kernel makes of codes, where ONNX Runtime has one for the op; None where it has not."""
        names = list(names_of(step.inputs))
        grids = [self.grids.get(name) for name in names]
        sources = [grid for grid in grids if grid is not None]
        if step.op not in _FUSED or step.grid is None or len(sources) < len(grids):
            return None
        return _FUSED[step.op](step, [self.values[name] for name in names], sources, step.grid)

    def _mean(self, step: Step) -> Floats | None:
        """A mean of codes, whose sum has no order; None for other steps."""
        grid = self.grids.get(step.inputs[0]) if step.op == "mean" else None
        return None if grid is None else kernels.mean(self.values[step.inputs[0]], grid, **step.attributes)

    def _float(self, step: Step) -> Array:
        """A canonical op on float32 values."""
        inputs = list(_tensors(step.inputs, self.floats))
        if step.op == QUANTIZE:
            return inputs[0].numpy()
        row = OPS[step.op]
        if step.weight is not None:
            inputs[row.weight or 0] = torch.from_numpy(step.weight.values())
        with torch.inference_mode():
            return row.run(*inputs, **step.attributes).numpy()


def _tensors(inputs: Any, value: Callable[[str], Array]) -> Any:
    """Tensors in place of a step's names."""
    if isinstance(inputs, tuple):
        return tuple(_tensors(item, value) for item in inputs)
    return None if inputs is None else torch.from_numpy(np.ascontiguousarray(value(inputs)))


# --- products ---------------------------------------------------------------------------------------------------------


def sums_of(step: Step, codes: Codes, grids: Grids, saturating: bool = False) -> kernels.Sums:
    """The int32 accumulators of an integer product, as float64.

    Args:
        step: a convolution or a linear layer with `integer`.
        codes: what it reads.
        grids: of its program.
        saturating: as kernels of x86 without VNNI sum; see `kernels.lost_in_pairs`.
    """
    grid, weight, a = grids[step.inputs[0]], step.weight, step.attributes
    assert grid is not None
    assert weight is not None
    pairs = saturating and in_pairs(step)
    if step.op == "linear":
        sums = kernels.multiply_matrix(kernels.centered(codes, grid), weight.centered, step.bias)
        return sums - kernels.lost_in_pairs(codes, weight.centered) if pairs else sums
    image, kernel, settings = codes, weight.centered, dict(step.attributes)
    if step.op == "conv1d":  # an image of one row
        image, kernel = image[:, :, None], kernel[:, :, None]
        settings |= {"stride": (1, a["stride"]), "padding": (0, a["padding"]), "dilation": (1, a["dilation"])}
    sums = kernels.convolve(kernels.centered(image, grid), kernel, step.bias, **settings)
    if pairs:
        sums = sums - kernels.lost_in_convolution(image, kernel, np.uint8(grid.zero_point), **settings)
    return sums[:, :, 0] if step.op == "conv1d" else sums


def multiplier_of(step: Step, grids: Grids) -> Floats:
    """What an integer product multiplies its accumulators by, float32 (C,); without a grid that gives its output."""
    grid, weight = grids[step.inputs[0]], step.weight
    assert grid is not None
    assert weight is not None
    if step.grid is None:
        return kernels.product_scale(grid.scale, weight.scale)
    return kernels.multipliers(grid.scale, weight.scale, step.grid.scale)


# --- steps on codes that ONNX Runtime makes one kernel of -------------------------------------------------------------

Fused = Callable[[Step, list[Codes], list[ActivationGrid], ActivationGrid], "Codes | None"]


def _add(_: Step, codes: list[Codes], grids: list[ActivationGrid], grid: ActivationGrid) -> Codes:
    return kernels.add(codes[0], codes[1], grids[0], grids[1], grid)


def _mul(_: Step, codes: list[Codes], grids: list[ActivationGrid], grid: ActivationGrid) -> Codes:
    return kernels.multiply(codes[0], codes[1], grids[0], grids[1], grid)


def _matmul(_: Step, codes: list[Codes], grids: list[ActivationGrid], grid: ActivationGrid) -> Codes:
    """QLinearMatMul: a product of two activations, requantized as any."""
    left, right = (kernels.centered(c, g).astype(np.float64) for c, g in zip(codes, grids, strict=True))
    multiplier = kernels.multipliers(grids[0].scale, np.asarray(grids[1].scale), grid.scale)
    return kernels.requantize(left @ right, multiplier, grid)


def _avg_pool2d(step: Step, codes: list[Codes], grids: list[ActivationGrid], grid: ActivationGrid) -> Codes | None:
    """One kernel, unless torch divides by other numbers than ONNX, for which deploy.onnx has a factor in float."""
    a, spatial = step.attributes, codes[0].shape[2:]
    size = _pooled(step, codes[0])
    sides = zip(spatial, size, a["kernel"], a["stride"], a["padding"], strict=True)
    beyond = any((n - 1) * s + k > m + 2 * p for m, n, k, s, p in sides)
    if a["divisor"] not in (None, math.prod(a["kernel"])) or (a["count_padding"] and beyond and not a["divisor"]):
        return None
    return kernels.average_pool(
        kernels.dequantize(codes[0], grids[0]), grid, kernel=a["kernel"], stride=a["stride"], padding=a["padding"],
        size=size, count_padding=a["count_padding"] or a["divisor"] is not None,
    )  # fmt: skip


def _adaptive_avg_pool2d(
    step: Step, codes: list[Codes], grids: list[ActivationGrid], grid: ActivationGrid
) -> Codes | None:
    """One kernel for windows of one size; others are products with torch's weights in float."""
    spatial, size = codes[0].shape[2:], _pooled(step, codes[0])
    if any(m % n for m, n in zip(spatial, size, strict=True)):
        return None
    kernel = [m // n for m, n in zip(spatial, size, strict=True)]
    values = kernels.dequantize(codes[0], grids[0])
    return kernels.average_pool(
        values, grid, kernel=kernel, stride=kernel, padding=(0, 0), size=size, count_padding=False
    )


def _pooled(step: Step, codes: Codes) -> tuple[int, ...]:
    """Spatial size of what a pool makes."""
    return tuple(OPS[step.op].run(torch.empty(codes.shape, device="meta"), **step.attributes).shape[2:])


_FUSED: dict[str, Fused] = {
    "add": _add,
    "mul": _mul,
    "matmul": _matmul,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
}
