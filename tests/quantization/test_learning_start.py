"""Learned roundings begin at given codes: nearest ones as AdaRound does, others so that they come back."""

from __future__ import annotations

import pytest
import torch

from calibquant.numerics.affine import QTensor, aligned, quantize_tensor
from calibquant.numerics.grid import Grid, PerChannel
from calibquant.quantization.learning import SoftRounding

GRID = Grid(3)


def given(seed: int, spread: float) -> tuple[torch.Tensor, QTensor]:
    """A weight and any codes on the grid, near the nearest ones or, with a larger spread, far from them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 40, generator=generator)
    scale, zero = 0.3 + 0.3 * torch.rand(8, generator=generator), torch.randint(2, 6, (8,), generator=generator)
    nearest = quantize_tensor(weight, scale, zero.to(torch.int32), GRID, PerChannel(0))
    moved = (nearest.codes + torch.randn(weight.shape, generator=generator) * spread).round().clamp(0, 7)
    return weight, QTensor(moved.to(GRID.dtype), nearest.scale, nearest.zero_point, GRID, PerChannel(0))


@pytest.mark.parametrize("spread", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_it_rounds_to_the_codes_it_begins_with(seed: int, spread: float) -> None:
    weight, start = given(seed, spread)
    assert torch.equal(SoftRounding(weight, start).hard().codes, start.codes)


@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_it_begins_between_the_float_weight_and_the_codes(spread: float) -> None:
    """At the float weight (clipped) where the code is nearest, else strictly nearer to the code than any other code."""
    weight, start = given(7, spread)
    scale, zero = aligned(start.scale, weight, PerChannel(0)), aligned(start.zero_point, weight, PerChannel(0))
    steps = (SoftRounding(weight, start)() / scale).detach()
    clipped, codes = (weight / scale).clamp(-zero, 7 - zero), start.codes - zero
    nearest = (clipped - codes).abs() <= 0.5
    assert 0 < int(nearest.sum()) < nearest.numel()
    torch.testing.assert_close(steps[nearest], clipped[nearest], atol=1e-4, rtol=1e-4)
    off, ahead = (steps - codes)[~nearest], (clipped - codes)[~nearest]
    assert (off.abs() < 0.5).all()
    assert (off * ahead > 0).all()


def test_every_rounding_of_other_codes_can_still_be_learned() -> None:
    weight, start = given(3, 4.0)
    rounding = SoftRounding(weight, start)
    soft = rounding.soft()
    assert ((soft > 0) & (soft < 1)).all()
