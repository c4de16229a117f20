"""Functions of one quantized tensor as tables of its codes: sigmoid, SiLU, hardswish, x * sigmoid(x), x + relu(x).

A tensor on a grid of 8 bits has at most 256 values, so whatever is computed from it value by value is a table of 256
entries. The tables are computed in float64, where the result does not depend on how a processor computes a sigmoid: no
value of a function comes so near a tie that the last bits of a float64 decide. They give what the simulation gives in
float64, its own roundings between the functions included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from calibquant.export.kernels import level_table
from calibquant.export.program import ActivationGrid
from calibquant.graph.nodes import op_of
from calibquant.graph.ops import Kind

CODES = 256
ELEMENT_WISE = {Kind.ACTIVATION, Kind.ADD, Kind.MUL}


@dataclass(frozen=True, eq=False)
class Function:
    """What a node computes from the codes of one value.

    Args:
        source: name of the value.
        values: float64 (256,), what each of its codes gives; codes that do not occur give what the nearest does.
    """

    source: str
    values: Tensor

    def codes(self, grid: ActivationGrid) -> npt.NDArray[np.uint8]:
        """The values rounded to a grid: its codes, uint8 (256,)."""
        codes = torch.round(self.values / float(grid.scale)) + grid.zero_point
        if grid.levels is None:
            return codes.clamp(grid.low, grid.high).to(torch.uint8).numpy()
        wide = codes.clamp(0, CODES - 1).to(torch.uint8).numpy()
        return level_table(grid)[wide]

    def rounded(self, grid: ActivationGrid) -> Function:
        """The function whose values were rounded to a grid."""
        return Function(self.source, _values(self.codes(grid), grid))


def identity_of(source: str, grid: ActivationGrid) -> Function:
    """The value itself."""
    codes = np.arange(CODES).clip(grid.low, grid.high)
    return Function(source, _values(codes, grid))


def function_of(node: fx.Node, operand: Callable[[fx.Node], Function | Tensor | None]) -> Function | None:
    """What an element-wise node computes, if it is a function of one value on a grid.

    Args:
        node: of a canonical graph.
        operand: what an argument of the node is: a function, the tensor of a parameter, or None if it is neither.

    Returns:
        None where it reads several values, a parameter of more than one element or a value without a grid, or where
        codes that occur give infinity or NaN.
    """
    op = op_of(node)
    if op is None or op.kind not in ELEMENT_WISE:
        return None
    arguments = [operand(argument) for argument in node.args if isinstance(argument, fx.Node)]
    functions = [argument for argument in arguments if isinstance(argument, Function)]
    constants = [argument for argument in arguments if isinstance(argument, Tensor)]
    if len({f.source for f in functions}) != 1 or len(functions) + len(constants) < len(arguments):
        return None
    if any(constant.numel() != 1 or constant.dim() > 1 for constant in constants):
        return None
    values = op.run(*(a.values if isinstance(a, Function) else a.double() for a in arguments), **node.kwargs)  # type: ignore[union-attr]
    return Function(functions[0].source, values) if bool(torch.isfinite(values).all()) else None


def _values(codes: npt.NDArray[np.integer], grid: ActivationGrid) -> Tensor:
    """float64 values of codes on a grid."""
    return torch.from_numpy((codes.astype(np.float64) - grid.zero_point) * float(grid.scale))
