"""The audit's bounds are reached by inputs chosen by the signs of the weights, and no input passes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from networks import NETWORKS, folded, quantized

from calibquant.export import kernels
from calibquant.export.audit import AccumulatorRow, audit, signed_bits, summarize
from calibquant.export.executor import execute, sums_of
from calibquant.export.lowering import make_program
from calibquant.export.program import ActivationGrid, IntegerWeight, Program, Step
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe


def program_of(name: str, bits: int) -> Program:
    recipe = QuantRecipe(
        placement="integer",
        weights=WeightRecipe(bits=bits, observer="minmax"),
        activations=ActivationRecipe(bits=bits, observer="minmax"),
    )
    return make_program(quantized(folded(name), recipe, NETWORKS[name].example(4, seed=1)))


def single(codes: np.ndarray, bias: Any, low: int, high: int, zero_point: int, **attributes: Any) -> Program:
    """A program of one convolution or linear layer."""
    count = len(codes)
    weight = IntegerWeight("w", codes, np.zeros(count, np.int32), np.ones(count, np.float32), 8, True, 0)
    grid = ActivationGrid(np.float32(1), zero_point, 8, low, high)
    op = "linear" if codes.ndim == 2 else "conv2d"
    bias = None if bias is None else np.asarray(bias, np.int32)
    step = Step(op, ("q", None, None), "y", attributes, grid, weight, bias, integer=True)
    return Program(("x",), (Step("quantize", ("x",), "q", grid=grid), step), "y", {}, ())


def extreme_sum(row: AccumulatorRow, step: Step, grid: ActivationGrid, highest: bool) -> int:
    """The accumulator of one channel for the window that drives it to one end, by plain multiplication."""
    assert step.weight is not None
    weights = step.weight.centered[row.channel].astype(int).reshape(-1)
    up, down = grid.high - grid.zero_point, grid.low - grid.zero_point
    window = np.where((weights > 0) == highest, up, down)
    return int(window @ weights) + (0 if step.bias is None else int(step.bias[row.channel]))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["cifar_resnet", "mobilenet_v2", "token_convolution"])
def test_extreme_windows_reach_the_bounds(name: str, bits: int) -> None:
    program = program_of(name, bits)
    steps = {step.output: step for step in program.steps}
    rows = audit(program)
    products = [step for step in program.steps if step.is_product]
    assert [(r.step, r.channel) for r in rows] == [(s.output, c) for s in products for c in range(len(s.weight.codes))]  # type: ignore[union-attr]
    for row in rows:
        grid = program.grids[steps[row.step].inputs[0]]
        assert grid is not None
        assert grid.low <= grid.zero_point <= grid.high
        assert extreme_sum(row, steps[row.step], grid, True) == row.highest
        assert extreme_sum(row, steps[row.step], grid, False) == row.lowest


def test_a_convolution_reaches_the_bounds_inside_and_stays_within_at_its_edges() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (3, 2, 3, 3), dtype=np.int8)
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    program = single(codes, [10, -10, 0], 20, 200, 50, **geometry)
    step, grid = program.steps[1], program.grids["q"]
    assert grid is not None
    for row in audit(program):
        for highest, bound in ((True, row.highest), (False, row.lowest)):
            window = np.where((codes[row.channel] > 0) == highest, 200, 20).astype(np.uint8)
            sums = sums_of(step, window[None], program.grids)[0, row.channel]
            assert sums[1, 1] == bound
            assert row.lowest <= sums.min()
            assert sums.max() <= row.highest


def test_no_input_passes_the_bounds() -> None:
    program = program_of("cifar_resnet", 4)
    images = NETWORKS["cifar_resnet"].example(4, seed=5).numpy() * 100
    values = execute(program, images, keep=True).values
    rows = {(row.step, row.channel): row for row in audit(program)}
    for step in program.steps:
        if not step.is_product:
            continue
        sums = sums_of(step, values[step.inputs[0]], program.grids)
        for channel, got in enumerate(np.moveaxis(sums, 1, 0)):
            row = rows[step.output, channel]
            assert row.lowest <= got.min()
            assert got.max() <= row.highest


def test_padding_is_a_value_even_where_codes_exclude_it() -> None:
    geometry = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
    codes = np.full((1, 1, 2, 2), 3, np.int8)
    padded = audit(single(codes, None, 10, 20, 5, padding=(1, 0), **geometry))[0]
    whole = audit(single(codes, None, 10, 20, 5, padding=(0, 0), **geometry))[0]
    assert (padded.lowest, padded.highest) == (0, 4 * 3 * 15)
    assert (whole.lowest, whole.highest) == (4 * 3 * 5, 4 * 3 * 15)


def test_saturating_accumulators_hold_every_sum_on_the_way() -> None:
    row = audit(single(np.int8([[100, -100]]), [-30000], 0, 255, 0))[0]
    assert (row.lowest, row.highest) == (-30000 - 25500, 25500 - 30000)
    assert (row.bits, row.largest) == (17, 55500)
    assert row.saturating_bits == 17
    row = audit(single(np.int8([[100, 100]]), [-51000], 0, 255, 0))[0]
    assert (row.lowest, row.highest, row.bits) == (-51000, 0, 17)
    row = audit(single(np.int8([[127, 127]]), [-32768], 0, 255, 0))[0]
    assert (row.lowest, row.highest) == (-32768, 254 * 255 - 32768)
    assert row.fits(16)
    assert row.saturating_bits == 17, "without the bias the products pass 16 bits"


def test_bits() -> None:
    for lowest, highest in [
        (0, 0),
        (-1, 0),
        (0, 1),
        (-2, 1),
        (-3, 0),
        (0, 32767),
        (-32768, 0),
        (-32769, 0),
        (0, 32768),
    ]:
        bits = signed_bits(lowest, highest)
        assert -(2 ** (bits - 1)) <= lowest
        assert highest < 2 ** (bits - 1)
        assert bits == 1 or lowest < -(2 ** (bits - 2)) or highest >= 2 ** (bits - 2)


def test_summaries_take_the_worst_channel() -> None:
    program = program_of("cifar_resnet", 2)
    rows, summaries = audit(program), summarize(program)
    assert summaries == summarize(program, rows)
    first, last = summaries[0], summaries[-1]
    assert (first.op, first.channels, first.products, last.op) == ("conv2d", 8, 27, "linear")
    for summary in summaries:
        mine = [row for row in rows if row.step == summary.step]
        assert summary.largest == max(row.largest for row in mine)
        assert summary.fits == next(w for w in (16, 24, 32) if all(row.fits(w) for row in mine))
    assert {s.fits for s in summaries} == {16, 24}, "2-bit layers fit 16 bits, 8-bit ends do not"


def test_sums_are_exact_beyond_float32() -> None:
    x = np.full((1, 3000), 255, np.int16)
    weight = np.full((1, 3000), 127, np.int8)
    assert kernels.multiply_matrix(x, weight, np.int32([1]))[0, 0] == 3000 * 255 * 127 + 1
