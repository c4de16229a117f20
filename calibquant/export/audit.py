"""The overflow audit: how large the accumulators of an integer program can get, from its weights, biases and codes.

The bounds hold for every input, and inputs reach them: what an accumulator of so many bits cannot hold can happen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibquant.export.program import ActivationGrid, Program, Step

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
    """

    step: str
    channel: int
    lowest: int
    highest: int
    bits: int
    saturating_bits: int

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
    """

    step: str
    op: str
    channels: int
    products: int
    largest: int
    bits: int
    saturating_bits: int
    fits: int | None


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


def _rows(step: Step, grids: Mapping[str, ActivationGrid | None]) -> list[AccumulatorRow]:
    grid, weight = grids[step.inputs[0]], step.weight
    assert grid is not None
    assert weight is not None
    low, high = grid.low - grid.zero_point, grid.high - grid.zero_point
    if _pads(step):  # with the zero point
        low, high = min(low, 0), max(high, 0)
    rows = np.moveaxis(weight.centered, weight.axis, 0).astype(np.int64)
    ends = np.sort(np.stack([rows.reshape(len(rows), -1) * low, rows.reshape(len(rows), -1) * high]), axis=0)
    bias = np.zeros(len(rows), np.int64) if step.bias is None else step.bias.astype(np.int64)
    lowest, highest = (end.sum(axis=1) + bias for end in ends)
    # on the way every term may be there or not, so only terms of one sign count
    least = np.minimum(ends[0], 0).sum(axis=1) + np.minimum(bias, 0)
    most = np.maximum(ends[1], 0).sum(axis=1) + np.maximum(bias, 0)
    values = zip(lowest.tolist(), highest.tolist(), least.tolist(), most.tolist(), strict=True)
    return [
        AccumulatorRow(step.output, channel, a, b, signed_bits(a, b), signed_bits(c, d))
        for channel, (a, b, c, d) in enumerate(values)
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
    )  # fmt: skip
