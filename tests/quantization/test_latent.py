"""What quantization-aware training learns, against numpy and the gradients of LSQ, PACT and ULQ written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_leveling import GRIDS, plan_of, weight_of
from torch import Tensor

from calibquant.errors import QuantizationError
from calibquant.numerics.affine import QTensor, fake_quantize, quantize_tensor
from calibquant.numerics.grid import Granularity, Grid, PerChannel, PerTensor
from calibquant.quantization.latent import LatentWeight, LearnedEnds, RangedWeight, straight_through
from calibquant.quantization.leveling import leveled_weight
from calibquant.quantization.plan import TensorPlan
from calibquant.quantization.quantizers import ActivationQuantizer, WeightQuantizer

Array = np.ndarray
UNIFORM: list[tuple[Grid, Granularity]] = [
    (Grid(2), PerChannel(0)), (Grid(4, signed=True), PerChannel(0)), (Grid(3), PerTensor()), (Grid(8), PerChannel(1)),
]  # fmt: skip


def uniform(grid: Grid, granularity: Granularity) -> tuple[Tensor, QTensor]:
    """A random weight, and codes of which a third are not the nearest ones."""
    weight = weight_of()
    channels = () if isinstance(granularity, PerTensor) else (weight.shape[granularity.axis],)
    scale = torch.linspace(0.8, 1.2, channels[0]) if channels else torch.ones(())
    scale = scale * 4 * float(weight.std()) / grid.steps
    zero = torch.full(channels, 0 if grid.signed else (grid.steps + 1) // 2, dtype=torch.int32)
    start = quantize_tensor(weight, scale, zero, grid, granularity)
    moved = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 1 / 3
    codes = torch.where(moved, start.codes.int() + 1, start.codes.int()).clamp(grid.qmin, grid.qmax)
    return weight, QTensor(codes.to(grid.dtype), scale, zero, grid, granularity)


def wide(parameter: Tensor, start: QTensor) -> Array:
    """A scale or zero point in float64, against the codes."""
    shape = [1] * start.codes.dim()
    if isinstance(start.granularity, PerChannel):
        shape[start.granularity.axis] = -1
    return parameter.detach().double().numpy().reshape(shape)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("grid", "granularity"), UNIFORM)
def test_it_begins_with_the_codes_that_were_found(grid: Grid, granularity: Granularity, relative: bool) -> None:
    weight, start = uniform(grid, granularity)
    latent = LatentWeight(weight, start, relative)
    assert torch.equal(latent.hard().codes, start.codes)
    assert torch.equal(latent(), start.dequantize())
    nearest = quantize_tensor(weight, start.scale, start.zero_point, grid, granularity).codes == start.codes
    assert 0.5 < float(nearest.float().mean()) < 0.95
    torch.testing.assert_close(latent.weight[nearest], weight[nearest], rtol=1e-6 if relative else 0, atol=0)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("levels", GRIDS, ids=lambda p: f"{p.kind} {p.count}")
def test_on_levels_it_begins_with_the_codes_and_stays_among_the_levels(levels, relative: bool) -> None:  # type: ignore[no-untyped-def]
    weight = weight_of()
    start = leveled_weight(weight, plan_of(levels), levels)
    latent = LatentWeight(weight, start, relative)
    assert torch.equal(latent.hard().codes, start.codes)
    with torch.no_grad():
        latent.latent.add_(
            (3.0 if relative else 0.3) * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        )
        latent.learned_scale.add_(0.1)
    hard = latent.hard()
    assert torch.equal(latent(), hard.dequantize())
    assert not torch.equal(hard.codes, start.codes)
    assert start.levels is not None
    table = start.levels if start.levels.dim() == 2 else start.levels.expand(len(weight), -1)
    for row, own in zip(hard.codes, table, strict=True):
        assert set(row.unique().tolist()) <= set(own.tolist())


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("grid", "granularity"), UNIFORM)
def test_gradients_are_lsqs(grid: Grid, granularity: Granularity, relative: bool) -> None:
    """Esser et al. 2020, eq. 3: dv/ds = round(w/s) - w/s inside and the clipped code outside; 1 or 0 for the weight."""
    weight, start = uniform(grid, granularity)
    latent = LatentWeight(weight, start, relative)
    scale, zero = wide(start.scale, start), wide(start.zero_point, start)
    pull = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (latent() * pull).sum().backward()
    steps = latent.weight.detach().double().numpy() / scale
    inside = (steps + zero > grid.qmin) & (steps + zero < grid.qmax)
    codes = np.clip(np.round(steps) + zero, grid.qmin, grid.qmax) - zero
    by_scale = pull.double().numpy() * (codes - inside * steps)
    axes = tuple(i for i in range(4) if isinstance(granularity, PerTensor) or i != granularity.axis)
    wanted = by_scale.sum(axes, keepdims=isinstance(granularity, PerChannel))
    values = weight.numel() / max(1, start.scale.numel())
    wanted = wanted * scale if relative else wanted / np.sqrt(values * grid.steps / 2)
    assert latent.latent.grad is not None
    assert latent.learned_scale.grad is not None
    by_weight = pull.double().numpy() * inside * (scale if relative else 1.0)
    np.testing.assert_allclose(latent.latent.grad.numpy(), by_weight, atol=1e-6)
    np.testing.assert_allclose(latent.learned_scale.grad.numpy().ravel(), wanted.ravel(), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_arq_follows_the_range_in_every_step(signed: bool) -> None:
    """AMCT: s = max / (2^(b-1) - 1), or |min| / 2^(b-1) where the negative side is the larger one."""
    grid = Grid(4, signed=signed)
    weight, start = uniform(grid, PerChannel(0))
    latent = RangedWeight(weight, start, symmetric=signed)
    with torch.no_grad():
        latent.latent.mul_(1.7).add_(0.01)
    rows = latent.weight.detach().double().reshape(6, -1).numpy()
    low, high = rows.min(1), rows.max(1)
    scale = np.where(-low > high, -low / 8, high / 7)
    hard = latent.hard()
    np.testing.assert_allclose(hard.scale.numpy(), scale, rtol=1e-6)
    middle = 0 if signed else 8
    codes = np.clip(np.round(rows / scale[:, None]) + middle, grid.qmin, grid.qmax)
    assert np.abs(codes - hard.codes.reshape(6, -1).numpy()).max() <= (rows % 1 == 0.5).any()
    assert torch.equal(latent(), hard.dequantize())
    latent().sum().backward()
    assert latent.learned_scale.grad is None
    assert latent.latent.grad is not None


def test_the_second_value_passes_and_the_first_gets_the_gradient() -> None:
    x = torch.tensor([0.2, -1.7], requires_grad=True)
    value = straight_through(x, torch.tensor([0.0, -2.0]))
    (value * torch.tensor([3.0, 5.0])).sum().backward()
    assert value.tolist() == [0.0, -2.0]
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 5.0]


def ends(kind: str, low: float, high: float, relative: bool = False, symmetric: bool = False) -> LearnedEnds:
    plan = TensorPlan(Grid(3), symmetric)
    quantizer = ActivationQuantizer("x", plan)
    quantizer.set_range(torch.tensor(low), torch.tensor(high))
    quantizer.start_learning_ends(kind, relative)
    assert quantizer.ends is not None
    return quantizer.ends


X = torch.tensor([-3.0, -0.9, -0.2, 0.1, 0.33, 0.77, 1.4, 2.9, 6.0, 9.0])


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kind", ["ulq", "pact"])
@pytest.mark.parametrize(("low", "high", "symmetric"), [(0.0, 3.5, False), (-1.0, 6.0, False), (-2.0, 2.0, True)])
def test_ends_give_the_grid_of_their_range(kind: str, low: float, high: float, symmetric: bool, relative: bool) -> None:
    learned = ends(kind, low, high, relative, symmetric)
    scale, zero_point = learned.current()
    wanted = fake_quantize(X, scale, zero_point, Grid(3), PerTensor())
    assert torch.equal(learned(X), wanted)
    assert len(learned.parameters_learned()) == (2 if low < 0 and not symmetric else 1)


def test_pacts_ends_get_the_gradients_of_what_they_clip() -> None:
    learned = ends("pact", -1.0, 6.0)
    pull = torch.arange(1.0, len(X) + 1)
    x = X.clone().requires_grad_()
    (learned(x) * pull).sum().backward()
    assert learned.high.grad is not None
    assert learned.low.grad is not None
    low, high = (float(e.detach()) for e in learned.ends())
    assert float(learned.high.grad) == pytest.approx(float(pull[high < X].sum()) + float(pull[high == X].sum()) / 2)
    assert float(learned.low.grad) == pytest.approx(float(pull[low > X].sum()))
    assert x.grad is not None
    assert x.grad[(low < X) & (high > X)].tolist() == pull[(low < X) & (high > X)].tolist()
    assert x.grad[(low > X) | (high < X)].abs().sum() == 0


def test_ulqs_ends_move_all_values() -> None:
    """d value/d high and d low, with the rounding of x and of the zero point passed through, by hand."""
    learned, grid = ends("ulq", -1.0, 6.0), Grid(3)
    pull = torch.arange(1.0, len(X) + 1)
    (learned(X[None].clone().requires_grad_()) * pull).sum().backward()
    low, high = (float(e.detach()) for e in learned.ends())
    scale = (high - low) / grid.steps
    zero = round(-low / scale)
    x, weights = X.double().numpy(), pull.double().numpy()
    codes = np.round(x / scale) + zero
    clipped = np.clip(codes, 0, grid.steps)
    inside = codes == clipped
    by_scale = clipped - zero - inside * x / scale
    by_zero = np.where(inside, 0.0, -scale)
    factor = (len(x) * grid.qmax) ** -0.5
    # scale = (high - low) / steps and zero = -low / scale
    scale_high, scale_low = 1 / grid.steps, -1 / grid.steps
    zero_high, zero_low = low / scale**2 * scale_high, low / scale**2 * scale_low - 1 / scale
    wanted_high = (weights * (by_scale * scale_high + by_zero * zero_high)).sum() * factor
    wanted_low = (weights * (by_scale * scale_low + by_zero * zero_low)).sum() * factor
    assert learned.high.grad is not None
    assert learned.low.grad is not None
    assert float(learned.high.grad) == pytest.approx(wanted_high, rel=1e-4)
    assert float(learned.low.grad) == pytest.approx(wanted_low, rel=1e-4)


def test_an_end_at_zero_stays_and_none_crosses_it() -> None:
    learned = ends("ulq", 0.0, 3.5)
    assert not learned.low.requires_grad
    with torch.no_grad():
        learned.high.sub_(10)
    scale, zero_point = learned.current()
    assert float(scale) > 0
    assert int(zero_point) == 0


def test_what_cannot_be_trained_says_so() -> None:
    levels = GRIDS[0]
    quantizer = WeightQuantizer("conv.weight", plan_of(levels))
    quantizer.set(leveled_weight(weight_of(), plan_of(levels), levels))
    with pytest.raises(QuantizationError, match=r"conv\.weight: has levels of its own.*; set finetune\.weights=lsq"):
        quantizer.start_training(weight_of(), "arq")
    channels = ActivationQuantizer("relu", TensorPlan(Grid(4), False, PerChannel(1)))
    channels.set_range(torch.zeros(3), torch.ones(3))
    with pytest.raises(QuantizationError, match="relu: has a scale for each channel; learn scales per tensor only"):
        channels.start_learning_ends("ulq")


def test_a_quantizer_keeps_what_was_trained() -> None:
    weight, start = uniform(Grid(4), PerChannel(0))
    quantizer = WeightQuantizer("w", TensorPlan(Grid(4), False, PerChannel(0)))
    quantizer.set(start)
    latent = quantizer.start_training(weight, "lsq")
    with torch.no_grad():
        latent.weight.mul_(1.3)
        latent.learned_scale.mul_(0.9)
    trained = quantizer(weight)
    quantizer.stop_learning()
    assert quantizer.rounding is None
    assert torch.equal(quantizer(weight), trained)
    assert torch.allclose(quantizer.scale, start.scale * 0.9)
