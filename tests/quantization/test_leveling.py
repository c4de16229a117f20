"""Weights on levels beyond uniform: every grid as a row of one table, and what makes each of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calibquant.errors import CalibQuantError
from calibquant.numerics.affine import affine_from_range, aligned, quantize_tensor
from calibquant.numerics.clipping import mse_range
from calibquant.numerics.gram import RowGrid
from calibquant.numerics.grid import Granularity, Grid, PerChannel, PerTensor
from calibquant.numerics.levels import levels_at, on_levels, places_of
from calibquant.quantization.learning import DecidedLevelRounding, LevelRounding, rounding_of
from calibquant.quantization.leveling import leveled_weight
from calibquant.quantization.plan import LevelPlan, TensorPlan
from calibquant.recipe import WeightRecipe, make_recipe

GRIDS = [
    LevelPlan("power-of-two", 7), LevelPlan("power-of-two", 15), LevelPlan("apot", 15), LevelPlan("apot", 31),
    LevelPlan("ternary", 3), LevelPlan("binary", 2), LevelPlan("binary", 8), LevelPlan("codebook", 2),
    LevelPlan("codebook", 4), LevelPlan("codebook", 6), LevelPlan("codebook", 5, own=True), LevelPlan("nuq", 32),
]  # fmt: skip


def weight_of(shape: tuple[int, ...] = (6, 5, 3, 3), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(shape[0], generator=generator).add(0.05).reshape(-1, *[1] * (len(shape) - 1))
    return torch.randn(shape, generator=generator) * spread


def plan_of(levels: LevelPlan, granularity: Granularity | None = None) -> TensorPlan:
    return TensorPlan(Grid(8, signed=True), True, granularity or PerChannel(0), levels=levels)


def made(levels: LevelPlan, weight: Tensor, granularity: Granularity | None = None) -> Any:
    return leveled_weight(weight, plan_of(levels, granularity), levels)


def square(weight: Tensor, value: Any) -> float:
    return float((value.dequantize().double() - weight.double()).square().sum())


@pytest.mark.parametrize("levels", GRIDS, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_are_the_nearest_of_few_integers(levels: LevelPlan, axis: int) -> None:
    weight = weight_of() if axis == 0 else weight_of((6, 5, 3, 3)).transpose(0, 1).contiguous()
    found = made(levels, weight, PerChannel(axis))
    assert found.levels.dtype == found.codes.dtype == torch.int8
    assert found.levels.shape[-1] == levels.count
    assert torch.equal(found.zero_point, torch.zeros(6, dtype=torch.int32))
    for channel in range(6):
        table = (found.levels[channel] if levels.own else found.levels).double()
        row = weight.select(axis, channel).double() / float(found.scale[channel])
        codes = found.codes.select(axis, channel).double()
        assert set(codes.unique().tolist()) <= set(table.tolist())
        distance = (row[..., None] - table).abs().amin(-1)
        assert torch.allclose((row - codes).abs(), distance, atol=1e-4)
    assert torch.equal(found.dequantize(), found.codes.float() * aligned(found.scale, weight, PerChannel(axis)))


@pytest.mark.parametrize("levels", GRIDS, ids=str)
def test_places_and_codes_are_each_others_inverse(levels: LevelPlan) -> None:
    found = made(levels, weight_of())
    places = places_of(found.codes, found.levels, found.granularity)
    assert 0 <= int(places.min()) <= int(places.max()) < levels.count
    assert torch.equal(levels_at(places, found.levels, found.granularity), found.codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_a_codebook_is_closer_to_the_weight_than_uniform_levels(bits: int, seed: int) -> None:
    weight = weight_of((8, 16, 3, 3), seed)
    low, high = mse_range(weight, Grid(bits), False, PerChannel(0))
    uniform = quantize_tensor(weight, *affine_from_range(low, high, Grid(bits), False), Grid(bits), PerChannel(0))
    shared, own = (made(LevelPlan("codebook", 2**bits, own), weight) for own in (False, True))
    assert square(weight, own) < 0.95 * square(weight, uniform)
    assert square(weight, shared) < square(weight, uniform)


def test_one_bit_is_the_mean_magnitude() -> None:
    weight = weight_of()
    found = made(LevelPlan("binary", 2), weight)
    assert torch.equal(found.codes, torch.where(weight > 0, 1, -1).to(torch.int8))
    assert torch.allclose(found.scale, weight.abs().mean((1, 2, 3)), rtol=1e-5)


def test_nuq_keeps_the_scales_of_8_bits_and_few_of_its_integers() -> None:
    weight = weight_of((8, 32, 3, 3))
    found = made(LevelPlan("nuq", 32), weight)
    assert torch.allclose(found.scale, weight.abs().amax((1, 2, 3)) / 127)
    assert len(found.codes.unique()) <= 32
    eight = torch.round(weight / aligned(found.scale, weight, PerChannel(0)))
    assert (found.codes - eight).abs().max() < 16
    # The error falls with the square of the number of levels, so a quarter of them have about sixteen times as much.
    assert square(weight, found) < 20 * square(weight, made(LevelPlan("nuq", 128), weight))


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.full((3, 4), 2.0), torch.eye(3)], ids=["0", "2", "eye"])
@pytest.mark.parametrize("levels", GRIDS, ids=str)
def test_weights_with_few_values(levels: LevelPlan, weight: Tensor) -> None:
    found = made(levels, weight)
    assert torch.isfinite(found.dequantize()).all()
    assert (found.scale > 0).all()
    if levels.kind == "codebook" and levels.count > 2:
        assert torch.allclose(found.dequantize(), weight, atol=1e-6)


def test_one_scale_for_all_channels() -> None:
    found = made(LevelPlan("codebook", 4), weight_of(), PerTensor())
    assert found.scale.shape == ()
    assert len(found.codes.unique()) <= 4


@pytest.mark.parametrize("levels", GRIDS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_a_learned_rounding_begins_where_its_codes_are(levels: LevelPlan, spread: float) -> None:
    """With `spread` the codes are not the nearest, as Gram rounding leaves them."""
    weight = weight_of()
    start = made(levels, weight)
    if spread:
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * spread * 20
        start = replace(start, codes=on_levels(start.codes + noise, start.levels, PerChannel(0)).to(torch.int8))
    rounding = rounding_of(weight, start)
    assert isinstance(rounding, LevelRounding)
    assert torch.equal(rounding.hard().codes, start.codes)
    assert torch.equal(rounding_of(weight, start, True)().detach(), start.dequantize())
    soft = rounding.soft()
    assert ((soft > 0) & (soft < 1)).all()
    if not spread:
        scaled = weight / aligned(start.scale, weight, PerChannel(0))
        table = start.levels if levels.own else start.levels.expand(6, -1)
        low, high = (aligned(t.float(), weight, PerChannel(0)) for t in (table[:, 0], table[:, -1]))
        inside = (scaled > low + 0.5) & (scaled < high - 0.5)
        assert torch.allclose(
            rounding().detach()[inside], weight[inside], rtol=0.06, atol=0.05 * float(weight.abs().max())
        )


@pytest.mark.parametrize("levels", [LevelPlan("apot", 15), LevelPlan("codebook", 5, own=True)], ids=str)
def test_roundings_reach_both_neighbours_and_learn_their_scale(levels: LevelPlan) -> None:
    weight = weight_of()
    start = made(levels, weight)
    rounding = rounding_of(weight, start)
    values = []
    for alpha in (-20.0, 20.0):
        with torch.no_grad():
            rounding.alpha.fill_(alpha)
        values.append(rounding.hard().codes.double())
    assert (values[1] >= values[0]).all()
    assert ((values[0] == start.codes) | (values[1] == start.codes)).all()
    rounding.learn_scale()
    loss = (rounding() - weight).square().sum()
    loss.backward()
    assert rounding.log_change.grad is not None
    with torch.no_grad():
        rounding.log_change.fill_(0.5)
    assert torch.allclose(rounding.hard().scale, start.scale * np.exp(0.5))
    assert torch.equal(rounding.hard().levels, start.levels)
    assert isinstance(rounding_of(weight, start, True), DecidedLevelRounding)


@pytest.mark.parametrize("seed", range(3))
def test_gram_rows_round_to_the_nearest_level_of_each_scale(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    levels = torch.randint(-127, 128, (3, 5), generator=random).sort(1).values.double()
    owner = torch.tensor([[0, 1, 2, 1]])
    grid = RowGrid(torch.tensor([0.1, 0.2, 0.3]).double(), levels[:, 0], levels[:, -1], owner, levels)
    weight = torch.randn(1, 4, 30, generator=random).double() * 20
    found = grid.rounded(weight)
    for row in range(4):
        scaled, table = weight[0, row] / grid.scale[owner[0, row]], levels[owner[0, row]]
        assert (scaled - found[0, row]).abs().numpy() == pytest.approx((scaled[:, None] - table).abs().amin(1).numpy())
        assert set(found[0, row].tolist()) <= set(table.tolist())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, r"weights.bits: a uniform grid of 1 bit holds no sign; use the grid codebook or binary"),
        ({"levels": 8}, "weights.levels: a uniform grid has 2.bits levels; use"),
        ({"grid": "apot", "bits": 8}, "weights.bits: apot has no grid of 8 bits; use 2 to 6"),
        ({"grid": "ternary", "bits": 3}, "weights.bits: ternary has no grid of 3 bits; use 2"),
        ({"grid": "apot", "levels": 9}, "weights.levels: apot gives its levels itself"),
        ({"grid": "codebook", "allocation": "banner"}, "weights.allocation: shares bits of uniform grids"),
        ({"grid": "codebook", "codebook": "per_channel", "granularity": "per_tensor"}, "weights.codebook: gives each"),
        ({"grid": "kmeans"}, "quant.weights.grid"),
    ],
)
def test_a_grid_that_is_none_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibQuantError, match=message):
        make_recipe({"quant": {"weights": fields}})


@pytest.mark.parametrize(
    ("fields", "count"),
    [({"grid": "nuq", "bits": 8}, 32), ({"grid": "nuq", "bits": 8, "levels": 16}, 16), ({"grid": "codebook"}, 16),
     ({"grid": "codebook", "levels": 6}, 6), ({"grid": "apot"}, 15), ({"grid": "binary", "bits": 3}, 8),
     ({"grid": "ternary", "bits": 2}, 3)],
)  # fmt: skip
def test_how_many_levels(fields: dict[str, Any], count: int) -> None:
    assert WeightRecipe.model_validate(fields).level_count == count
