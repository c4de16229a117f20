"""Learned roundings (AdaRound) and scales (LSQ) against numpy, finite differences and their papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from calibquant.numerics.affine import QTensor, fake_quantize, quantize_tensor
from calibquant.numerics.grid import Granularity, Grid, PerChannel, PerTensor
from calibquant.quantization.learning import SoftRounding, learned_fake_quantize
from calibquant.quantization.plan import TensorPlan
from calibquant.quantization.quantizers import ActivationQuantizer, WeightQuantizer

Array = np.ndarray
CASES: dict[str, tuple[Grid, Granularity, tuple[int, ...]]] = {
    "2 bits, a channel": (Grid(2), PerChannel(0), (6, 5, 3, 3)),
    "4 bits, signed, a channel": (Grid(4, signed=True), PerChannel(0), (6, 5, 3, 3)),
    "3 bits, a tensor": (Grid(3), PerTensor(), (7, 9)),
    "8 bits, signed, a tensor": (Grid(8, signed=True), PerTensor(), (7, 9)),
    "4 bits, second axis": (Grid(4), PerChannel(1), (3, 6, 2, 2)),
}


def start(case: str, seed: int = 0, shrink: float = 1.0) -> tuple[Tensor, QTensor]:
    """A random weight and its codes; `shrink` < 1 leaves values outside the clipping range."""
    grid, granularity, shape = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    channels = () if isinstance(granularity, PerTensor) else (shape[granularity.axis],)
    scale = torch.full(channels, 5.0 * shrink / grid.steps) * (0.7 + 0.6 * torch.rand(channels, generator=generator))
    middle = grid.qmin + (grid.steps + 1) // 2
    zero_point = torch.randint(middle - 1, middle + 1, channels, generator=generator).to(torch.int32)
    return weight, quantize_tensor(weight, scale, zero_point, grid, granularity)


def wide(parameter: Tensor, start: QTensor) -> Array:
    """A scale or zero point in float64, against the codes."""
    values = parameter.double().numpy()
    if isinstance(start.granularity, PerTensor):
        return values
    shape = [1] * start.codes.dim()
    shape[start.granularity.axis] = -1
    return values.reshape(shape)


def perturbed(case: str, seed: int = 1) -> tuple[SoftRounding, QTensor, Array]:
    """A rounding on its way, and its alpha."""
    weight, codes = start(case, shrink=0.6)
    rounding = SoftRounding(weight, codes)
    alpha = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 2
    rounding.alpha.data.copy_(alpha)
    return rounding, codes, alpha.double().numpy()


def sigmoid_h(alpha: Array) -> Array:
    """Nagel et al. 2020, eq. 23: h = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), zeta = 1.1, gamma = -0.1."""
    return np.clip(1.2 / (1 + np.exp(-alpha)) - 0.1, 0, 1)


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [2.5, 0.4])
@pytest.mark.parametrize("case", CASES)
def test_it_starts_at_the_float_weight_clipped_to_the_range(case: str, shrink: float) -> None:
    weight, codes = start(case, shrink=shrink)
    scale, zero = wide(codes.scale, codes), wide(codes.zero_point, codes)
    low, high = (codes.grid.qmin - zero) * scale, (codes.grid.qmax - zero) * scale
    want = np.clip(weight.double().numpy(), low, high)
    got = SoftRounding(weight, codes)().detach().double().numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert (np.abs(got - weight.numpy()).max() > 0.1) == (shrink < 1), "only the narrow range clips"


@pytest.mark.parametrize("case", CASES)
def test_its_hard_codes_start_at_the_nearest(case: str) -> None:
    weight, codes = start(case, shrink=0.6)
    rounding = SoftRounding(weight, codes)
    scaled = weight.double().numpy() / wide(codes.scale, codes)
    clear = np.abs(scaled - np.floor(scaled) - 0.5) > 1e-4
    assert clear.mean() > 0.9
    hard = rounding.hard().codes
    assert hard.dtype == codes.codes.dtype == codes.grid.dtype
    assert np.array_equal(hard.numpy()[clear], codes.codes.numpy()[clear])


@pytest.mark.parametrize("case", CASES)
def test_soft_and_hard_values_follow_the_formula(case: str) -> None:
    rounding, codes, alpha = perturbed(case)
    weight, _ = start(case, shrink=0.6)
    scale, zero, grid = wide(codes.scale, codes), wide(codes.zero_point, codes), codes.grid
    h = sigmoid_h(alpha)
    assert ((h == 0) | (h == 1)).any()
    assert ((h > 0) & (h < 1)).any()
    np.testing.assert_allclose(rounding.soft().detach().numpy(), h, atol=1e-6)
    base = np.floor((weight / torch.from_numpy(np.asarray(scale, np.float32))).double().numpy())
    want = scale * (np.clip(base + h + zero, grid.qmin, grid.qmax) - zero)
    np.testing.assert_allclose(rounding().detach().numpy(), want, atol=1e-5)
    hard = np.clip(base + (h >= 0.5) + zero, grid.qmin, grid.qmax)
    clear = np.abs(h - 0.5) > 1e-6
    assert np.array_equal(rounding.hard().codes.numpy()[clear], hard[clear])
    assert rounding.settled() == pytest.approx(((h == 0) | (h == 1)).mean(), abs=2 / h.size)


@pytest.mark.parametrize("beta", [20.0, 7.3, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_the_regularizer_sums_one_minus_distance_from_a_half(case: str, beta: float) -> None:
    """Nagel et al. 2020, eq. 24: sum 1 - |2h - 1|^beta."""
    rounding, _, alpha = perturbed(case)
    want = (1 - np.abs(2 * sigmoid_h(alpha) - 1) ** beta).sum()
    assert rounding.regularizer(beta).item() == pytest.approx(want, rel=1e-5)


def test_the_regularizer_vanishes_exactly_where_all_is_decided() -> None:
    rounding, _, _ = perturbed("3 bits, a tensor")
    rounding.alpha.data.copy_(torch.where(rounding.alpha > 0, 5.0, -5.0))
    assert rounding.regularizer(2.0).item() == 0
    assert rounding.settled() == 1


@pytest.mark.parametrize("beta", [None, 20.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_to_alpha_is_that_of_finite_differences(case: str, beta: float | None) -> None:
    """Of a random linear function of the value plus the regularizer; in float64, where differences are exact enough."""
    weight, codes = start(case, shrink=0.6)
    rounding = SoftRounding(weight, codes).double()
    generator = torch.Generator().manual_seed(3)
    rounding.alpha.data.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    mix = torch.randn(weight.shape, generator=generator, dtype=torch.float64)

    def objective() -> Tensor:
        value = (rounding() * mix).sum()
        return value if beta is None else value + 0.3 * rounding.regularizer(beta)

    (gradient,) = torch.autograd.grad(objective(), [rounding.alpha])
    assert (gradient != 0).float().mean() > 0.2
    flat, step = rounding.alpha.data.view(-1), 1e-6
    for index in range(0, flat.numel(), max(1, flat.numel() // 40)):
        at = float(flat[index])
        slopes = []
        for move in (step, -step):
            flat[index] = at + move
            slopes.append(objective().item())
        flat[index] = at
        assert float(gradient.view(-1)[index]) == pytest.approx((slopes[0] - slopes[1]) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_weight_quantizer_learns_and_keeps_the_decided_codes(case: str) -> None:
    weight, codes = start(case)
    quantizer = WeightQuantizer("w", TensorPlan(codes.grid, False, codes.granularity))
    quantizer.set(codes)
    assert torch.equal(quantizer(weight), codes.dequantize())
    rounding = quantizer.start_learning(weight)
    assert torch.equal(quantizer(weight), rounding())
    up = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    rounding.alpha.data.copy_(torch.where(up, 9.0, -9.0))
    soft = quantizer(weight).detach()
    quantizer.stop_learning()
    assert quantizer.rounding is None
    assert torch.equal(quantizer(weight), soft), "what has settled softly is what the codes say, bit for bit"
    assert not torch.equal(quantizer.get().codes, codes.codes)
    assert torch.equal(quantizer.scale, codes.scale)
    assert torch.equal(quantizer.zero_point, codes.zero_point)


# --- learned scales ---------------------------------------------------------------------------------------------------

GRIDS = [
    (Grid(2), 0), (Grid(2), 1), (Grid(4), 0), (Grid(4), 6), (Grid(8), 0), (Grid(8), 127), (Grid(3, signed=True), 0),
    (Grid(8, signed=True), -128),
]  # fmt: skip


def tensor_on(grid: Grid, zero_point: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values a good way beyond both ends of the range, and a scale."""
    scale = torch.tensor(0.0371)
    low, high = (grid.qmin - zero_point - 0.8 * grid.steps), (grid.qmax - zero_point + 0.8 * grid.steps)
    draw = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(seed))
    return (low + draw * (high - low)) * scale, scale


@pytest.mark.parametrize(("grid", "zero_point"), GRIDS)
def test_learned_values_are_those_of_fake_quantize(grid: Grid, zero_point: int) -> None:
    """To the last digit of the scale; a value on the border between two codes may fall to either."""
    x, scale = tensor_on(grid, zero_point)
    zero = torch.tensor(zero_point, dtype=torch.int32)
    want = fake_quantize(x, scale, zero, grid, PerTensor())
    got = learned_fake_quantize(x, scale.clone().requires_grad_(), zero, grid)
    scaled = x.double() / scale.double()
    clear = (scaled - scaled.floor() - 0.5).abs() > 1e-4
    assert clear.double().mean() > 0.95
    torch.testing.assert_close(got[clear], want[clear], rtol=3e-7, atol=0)


@pytest.mark.parametrize(("grid", "zero_point"), GRIDS)
def test_gradients_are_those_of_the_paper(grid: Grid, zero_point: int) -> None:
    """Esser et al. 2020, eq. 3 and 5, and section 2.2's factor, in numpy.

    Compared where a value lies clearly inside or outside: within half a step of the ends the paper's eq. 3 and its
    authors' pseudocode differ.
    """
    x, scale = tensor_on(grid, zero_point)
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(x.shape, generator=generator)
    v = x.double().numpy() / float(scale)
    below, above = v < grid.qmin - zero_point - 0.5, v > grid.qmax - zero_point + 0.5
    assert below.any()
    assert above.any()
    per_value = np.where(below, grid.qmin - zero_point, np.where(above, grid.qmax - zero_point, np.round(v) - v))
    want = (per_value * upstream.double().numpy()).sum() / np.sqrt(x.numel() * grid.qmax)

    x.requires_grad_()
    learned = scale.clone().requires_grad_()
    value = learned_fake_quantize(x, learned, torch.tensor(zero_point, dtype=torch.int32), grid)
    gx, gs = torch.autograd.grad(value, [x, learned], upstream)
    assert float(gs) == pytest.approx(want, rel=2e-4, abs=1e-4)
    assert torch.equal(gx[torch.from_numpy(below | above)], torch.zeros(int((below | above).sum())))
    inside = torch.from_numpy(~(below | above))
    torch.testing.assert_close(gx[inside], upstream[inside], rtol=1e-6, atol=0)


def plain(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, kept: Tensor | None) -> Tensor:
    """LSQ and LSQ+ as chains of differentiable ops, straight-through rounding by detaching."""

    def through(v: Tensor) -> Tensor:
        return (torch.round(v) - v).detach() + v

    factor = (x.numel() * grid.qmax) ** -0.5
    scale = (scale - scale * factor).detach() + scale * factor
    zero = through((zero_point - zero_point * factor).detach() + zero_point * factor)
    value = ((through(x / scale) + zero).clamp(grid.qmin, grid.qmax) - zero) * scale
    return value if kept is None else torch.where(kept > 0, value, x)


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize(("grid", "zero_point"), GRIDS)
def test_one_pass_gives_the_values_and_gradients_of_the_chain_of_ops(
    grid: Grid, zero_point: int, dropping: bool
) -> None:
    x, scale = tensor_on(grid, zero_point)
    clear = ((x / scale) - (x / scale).floor() - 0.5).abs() > 1e-3  # on a border the two may round differently
    x = torch.where(clear, x, torch.zeros(()))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    kept = (torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.5).float() if dropping else None
    results = []
    for function in (learned_fake_quantize, plain):
        leaves = [x.clone(), scale.clone(), torch.tensor(float(zero_point))]
        for leaf in leaves:
            leaf.requires_grad_()
        value = function(*leaves, grid, kept)
        results.append((value.detach(), *torch.autograd.grad(value, leaves, upstream)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
    assert float(results[0][3].abs()) > 1e-4, "clipped values ask the zero point to move"


def quantizer_on(grid: Grid, low: float, high: float) -> ActivationQuantizer:
    quantizer = ActivationQuantizer("a", TensorPlan(grid, False))
    quantizer.set_range(torch.tensor(low), torch.tensor(high))
    return quantizer


@pytest.mark.parametrize("start_at", [-0.3, 0.0, 0.2])
def test_the_scale_stays_positive(start_at: float) -> None:
    """Steps over zero are reflected before the scale is used, and again when it is taken."""
    quantizer = quantizer_on(Grid(4), 0, 1)
    learned = quantizer.start_learning()
    with torch.no_grad():
        learned.fill_(start_at)
    x = torch.rand(50, generator=torch.Generator().manual_seed(0))
    value = quantizer(x)
    assert bool(torch.isfinite(value).all())
    assert learned.item() == pytest.approx(max(abs(start_at), 2**-23))
    assert value.min() >= 0
    with torch.no_grad():
        learned.neg_()
    quantizer.stop_learning()
    assert quantizer.learned_scale is None
    assert quantizer.scale is not None
    assert not quantizer.scale.requires_grad
    assert float(quantizer.scale) == pytest.approx(max(abs(start_at), 2**-23))


def test_learning_a_scale_lowers_the_error_that_it_is_learned_for() -> None:
    """A range three times too wide shrinks; the zero point stays."""
    x = torch.rand(2000, generator=torch.Generator().manual_seed(0)) - 0.3
    quantizer = quantizer_on(Grid(3), -0.9, 2.1)
    before, zero = float((quantizer(x) - x).pow(2).mean()), quantizer.zero_point.clone()
    optimizer = torch.optim.Adam([quantizer.start_learning()], lr=2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        (quantizer(x) - x).pow(2).sum().backward()
        optimizer.step()
    quantizer.stop_learning()
    assert float((quantizer(x) - x).pow(2).mean()) < before / 3
    assert torch.equal(quantizer.zero_point, zero)


# --- drop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.25, 0.5, 230 / 256])
@pytest.mark.parametrize("learning", [False, True])
def test_drop_keeps_the_stated_share_and_leaves_the_rest_as_it_is(keep: float, learning: bool) -> None:
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 1e-3  # no value lies on the grid
    quantizer = quantizer_on(Grid(2), 0, 1)
    whole = quantizer(x)
    quantizer.drop = 1 - keep
    if learning:
        quantizer.start_learning()
    torch.manual_seed(5)
    mixed = quantizer(x).detach()
    kept = mixed == x
    differs = whole != x
    share = float((mixed != x)[differs].float().mean())
    assert share == pytest.approx(keep, abs=4 * (keep * (1 - keep) / 20_000) ** 0.5)
    torch.testing.assert_close(mixed[~kept], whole[~kept], rtol=3e-7, atol=0)
    assert not torch.equal(quantizer(x).detach(), mixed), "drawn anew at every call"
    torch.manual_seed(5)
    assert torch.equal(quantizer(x).detach(), mixed)


def test_without_drop_nothing_is_drawn() -> None:
    x = torch.rand(100, generator=torch.Generator().manual_seed(0))
    quantizer = quantizer_on(Grid(2), 0, 1)
    state = torch.random.get_rng_state()
    first = quantizer(x)
    assert torch.equal(quantizer(x), first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_dropped_value_passes_its_gradient_whole_and_none_to_the_scale() -> None:
    x = (torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 3).requires_grad_()  # a third fits the range
    quantizer = quantizer_on(Grid(2), 0, 1)
    quantizer.start_learning()
    quantizer.drop = 0.5
    torch.manual_seed(1)
    value = quantizer(x)
    (gradient,) = torch.autograd.grad(value.sum(), [x])
    dropped = value.detach() == x.detach()
    assert bool((gradient[dropped] == 1).all())
    outside = (x.detach() > 1.2) & ~dropped
    assert bool((gradient[outside] == 0).all())
    assert int(outside.sum()) > 500
