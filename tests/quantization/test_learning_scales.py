"""Learned scales of weights, relative scales of activations, decided roundings and learned biases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import Tensor, nn

from calibquant.graph import capture
from calibquant.numerics.grid import Grid
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.quantization.learning import DecidedRounding, SoftRounding, decided
from calibquant.quantization.plan import TensorPlan
from calibquant.quantization.quantizers import ActivationQuantizer
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe

FORMS = [SoftRounding, DecidedRounding]


def layer(granularity: str = "per_channel") -> tuple[QuantModel, Tensor]:
    """A convolution at W3A4 with an integer bias, calibrated."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    x = torch.rand(6, 2, 7, 7, generator=torch.Generator().manual_seed(1))
    graph = capture(network, x[:2])
    recipe = QuantRecipe(
        weights=WeightRecipe(bits=3, granularity=granularity),  # type: ignore[arg-type]
        activations=ActivationRecipe(bits=4), placement="integer", boundary="none",
    )  # fmt: skip
    model = QuantModel(graph, make_plan(graph, recipe))
    calibrate_weights(model, recipe)
    calibrate_activations(model, recipe.activations, [x])
    return model, x


def first_weight(model: QuantModel) -> tuple[Tensor, SoftRounding]:
    name, quantizer = next(iter(model.weight_quantizers.items()))
    weight = dict(model.teacher.named_buffers())[name]
    return weight, SoftRounding(weight, quantizer.get())


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("form", FORMS)
def test_a_learned_weight_scale_multiplies_what_its_codes_mean(form: type[SoftRounding], granularity: str) -> None:
    model, _ = layer(granularity)
    weight, start = first_weight(model)
    rounding = form(weight, start.start)
    before = rounding().detach().double()
    change = rounding.learn_scale()
    with torch.no_grad():
        change.copy_(torch.linspace(-0.4, 0.3, change.numel()).view_as(change))
    factor = change.detach().double().exp()
    torch.testing.assert_close(rounding().double(), before * factor, rtol=1e-6, atol=1e-8)
    hard = rounding.hard()
    assert hard.scale.shape == start.start.scale.shape
    torch.testing.assert_close(hard.scale.double(), start.start.scale.double() * factor.reshape(hard.scale.shape))
    # d(sum of w * g)/d(log of the change) is the sum of w * g over the channel
    (gradient,) = torch.autograd.grad((rounding() * weight).sum(), [change])
    wanted = (before * factor * weight).double().sum_to_size(change.shape)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_decided_rounding_runs_as_its_codes_and_learns_by_the_sigmoids_slope() -> None:
    model, _ = layer()
    weight, start = first_weight(model)
    rounding = DecidedRounding(weight, start.start)
    with torch.no_grad():
        rounding.alpha.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(rounding(), rounding.hard().dequantize())
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    (gradient,) = torch.autograd.grad((rounding() * upstream).sum(), [rounding.alpha])
    alpha = rounding.alpha.detach().double().numpy()
    reach = (rounding.base + rounding.zero_point).numpy()
    codes = reach + (alpha >= 0)
    within = (codes >= rounding.grid.qmin) & (codes <= rounding.grid.qmax)
    slope = expit(alpha) * (1 - expit(alpha)) * rounding.scale.double().numpy() * within
    np.testing.assert_allclose(gradient.numpy(), upstream.double().numpy() * slope, rtol=1e-4, atol=1e-7)


def test_decided_is_a_step_that_passes_gradients() -> None:
    share = torch.tensor([0.0, 0.49999, 0.5, 1.0], requires_grad=True)
    assert decided(share).tolist() == [0.0, 0.0, 1.0, 1.0]
    (gradient,) = torch.autograd.grad((decided(share) * torch.arange(4.0)).sum(), [share])
    assert gradient.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_relative_scale_is_learned_as_the_logarithm_of_its_change() -> None:
    quantizer = ActivationQuantizer("x", TensorPlan(Grid(3), symmetric=False))
    quantizer.set_range(torch.tensor(0.0), torch.tensor(2.1))
    x = torch.linspace(-0.5, 3, 50)
    before = quantizer(x)
    parameter = quantizer.start_learning(relative=True)
    assert torch.equal(quantizer(x).detach(), before)
    with torch.no_grad():
        parameter.fill_(float(np.log(1.5)))
    during, scale = quantizer(x).detach(), quantizer.current_scale().detach()
    assert float(scale) == pytest.approx(0.45, rel=1e-6)
    quantizer.stop_learning()
    assert torch.equal(quantizer.get()[0], scale)
    assert quantizer.learned_scale is None
    assert torch.equal(quantizer(x), during)


@pytest.mark.parametrize("bits", [2, 4])
def test_values_of_bfloat16_are_quantized_as_float32s_but_for_ties(bits: int) -> None:
    quantizer = ActivationQuantizer("x", TensorPlan(Grid(bits), symmetric=False))
    quantizer.set_range(torch.tensor(0.0), torch.tensor(1.0))
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    quantizer.start_learning(relative=True)
    low = quantizer(x.bfloat16().requires_grad_()).detach().float()
    step = 1 / (2**bits - 1)
    close = ((x / step) % 1 - 0.5).abs() < 2**bits * 2.0**-7  # bfloat16 has 8 digits: near a tie either may be taken
    torch.testing.assert_close(low[~close], quantizer(x).detach()[~close], rtol=2**-7, atol=0)


def test_a_learned_bias_moves_the_output_by_whole_units_and_keeps_its_correction() -> None:
    model, x = layer()
    name, delta = next(iter(model.bias_deltas.items()))
    bias = model.bias_of(name)
    delta.add(torch.full_like(bias, 0.25))
    parameter = delta.start_learning(len(bias), 2.0)
    assert torch.equal(delta(bias).detach(), bias + 0.25)
    with torch.no_grad():
        parameter.copy_(torch.tensor([0.5, -1.0, 0.0, 3.0]))
    wanted = bias + 0.25 + torch.tensor([1.0, -2.0, 0.0, 6.0])
    torch.testing.assert_close(delta(bias).detach(), wanted)
    during = model(x).detach()
    model(x).sum().backward()
    assert parameter.grad is not None
    assert bool((parameter.grad != 0).any())
    delta.stop_learning()
    torch.testing.assert_close(delta(bias), wanted)
    assert torch.equal(model(x), during)
