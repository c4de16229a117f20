"""The overflow audit: how large the accumulators of an integer program can get, from its weights, biases and codes.

The bounds hold for every input, and inputs reach them: what an accumulator of so many bits cannot hold can happen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibquant.export.program import ActivationGrid, IntegerWeight, Program, Step
from calibquant.numerics.reach import adds_pairs, may_saturate

WIDTHS = (16, 24, 32)  # of accumulators that hardware has


@dataclass(frozen=True)
class AccumulatorRow:
    """The accumulator of one output channel of an integer product.

    Args:
        step: name of the step.
        channel: of its output.
        lowest, highest: values of the whole sum, bias included, over all inputs on their grid.
        bits: of the narrowest two's complement integer that holds every such value. Sums on the way may pass it by and
            still come out right, if the accumulator wraps around.
        saturating_bits: the same for every sum on the way in any order, for accumulators that saturate.
        pairs_fit: no sum of two products passes 16 bits, so that x86 without VNNI gives the exact sum too.
    """

    step: str
    channel: int
    lowest: int
    highest: int
    bits: int
    saturating_bits: int
    pairs_fit: bool

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        return max(-self.lowest, self.highest)

    def fits(self, width: int) -> bool:
        """Whether an integer of so many bits holds it."""
        return self.bits <= width


@dataclass(frozen=True)
class AccumulatorSummary:
    """The accumulators of one step.

    Args:
        step, op: its name and canonical op.
        channels: of its output.
        products: added up for an output value.
        largest: magnitude over all channels.
        bits, saturating_bits: as in a row, over all channels.
        fits: the narrowest of 16, 24 and 32 bits that holds all; None if none does.
        pairs: how it stays exact where kernels add two products in 16 bits: "single" (its kernel adds none in pairs),
            "fit" (by the bound on its weights), "uint8" (by the form of its weight); "saturate" if it does not.
    """

    step: str
    op: str
    channels: int
    products: int
    largest: int
    bits: int
    saturating_bits: int
    fits: int | None
    pairs: str


def audit(program: Program) -> list[AccumulatorRow]:
    """The worst case of every accumulator, by step and channel.

    Example:
        >>> max(row.bits for row in audit(make_program(model)))  # doctest: +SKIP
        18
    """
    grids = program.grids
    return [row for step in program.steps if step.is_product for row in _rows(step, grids)]


def summarize(program: Program, rows: Sequence[AccumulatorRow] | None = None) -> list[AccumulatorSummary]:
    """The worst case of every integer product.

    Args:
        program: that was audited.
        rows: of its audit, if it was made already.
    """
    by_step: dict[str, list[AccumulatorRow]] = {}
    for row in audit(program) if rows is None else rows:
        by_step.setdefault(row.step, []).append(row)
    return [_summary(step, by_step[step.output]) for step in program.steps if step.output in by_step]


def signed_bits(lowest: int, highest: int) -> int:
    """Bits of the narrowest two's complement integer that holds both.

    Example:
        >>> signed_bits(-128, 127), signed_bits(0, 128), signed_bits(0, 0)
        (8, 9, 1)
    """
    return 1 + max((-lowest - 1).bit_length() if lowest < 0 else 0, highest.bit_length() if highest > 0 else 0)


def in_pairs(step: Step) -> bool:
    """Whether a kernel of x86 without VNNI adds the products of a step in pairs of 16 bits."""
    assert step.weight is not None
    return step.weight.offset == 0 and adds_pairs(step.weight.codes.shape, step.attributes.get("groups", 1))


def saturating_channels(step: Step, grids: Mapping[str, ActivationGrid | None]) -> npt.NDArray[np.bool_]:
    """Which output channels of an integer product may come out wrong where pairs of products saturate at 16 bits.

    Args:
        step: the product.
        grids: of its program.

    Returns:
        bool, (C,).
    """
    grid, weight = grids[step.inputs[0]], step.weight
    assert grid is not None
    assert weight is not None
    if not in_pairs(step):
        return np.zeros(len(weight.scale), np.bool_)
    return may_saturate(_by_channel(weight), grid.high)


def saturating_steps(program: Program) -> list[str]:
    """The integer products whose result depends on whether a processor saturates pairs of products."""
    grids = program.grids
    return [s.output for s in program.steps if s.is_product and saturating_channels(s, grids).any()]


def _by_channel(weight: IntegerWeight) -> npt.NDArray[np.int8]:
    """Centered codes, a row for each output channel."""
    rows = np.moveaxis(weight.centered, weight.axis, 0)
    return rows.reshape(len(rows), -1)


def _rows(step: Step, grids: Mapping[str, ActivationGrid | None]) -> list[AccumulatorRow]:
    grid, weight = grids[step.inputs[0]], step.weight
    assert grid is not None
    assert weight is not None
    low, high = grid.low - grid.zero_point, grid.high - grid.zero_point
    if _pads(step):  # with the zero point
        low, high = min(low, 0), max(high, 0)
    rows = _by_channel(weight).astype(np.int64)
    ends = np.sort(np.stack([rows * low, rows * high]), axis=0)
    bias = np.zeros(len(rows), np.int64) if step.bias is None else step.bias.astype(np.int64)
    lowest, highest = (end.sum(axis=1) + bias for end in ends)
    # on the way every term may be there or not, so only terms of one sign count
    least = np.minimum(ends[0], 0).sum(axis=1) + np.minimum(bias, 0)
    most = np.maximum(ends[1], 0).sum(axis=1) + np.maximum(bias, 0)
    fit = ~saturating_channels(step, grids)
    values = zip(lowest.tolist(), highest.tolist(), least.tolist(), most.tolist(), fit.tolist(), strict=True)
    return [
        AccumulatorRow(step.output, channel, a, b, signed_bits(a, b), signed_bits(c, d), e)
        for channel, (a, b, c, d, e) in enumerate(values)
    ]


def _pads(step: Step) -> bool:
    padding = step.attributes.get("padding", 0)
    return any(padding) if isinstance(padding, Sequence) else bool(padding)


def _summary(step: Step, rows: Sequence[AccumulatorRow]) -> AccumulatorSummary:
    assert step.weight is not None
    bits = max(row.bits for row in rows)
    return AccumulatorSummary(
        step.output, step.op, len(rows), step.weight.codes.size // len(rows), max(row.largest for row in rows), bits,
        max(row.saturating_bits for row in rows), next((width for width in WIDTHS if bits <= width), None),
        _pairs(step, rows),
    )  # fmt: skip


def _pairs(step: Step, rows: Sequence[AccumulatorRow]) -> str:
    assert step.weight is not None
    if not in_pairs(step):
        return "uint8" if step.weight.offset else "single"
    return "fit" if all(row.pairs_fit for row in rows) else "saturate"
