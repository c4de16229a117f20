"""Calibration: the ranges are those of the original network's tensors, the errors those that the grids allow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibquant.errors import CalibQuantError, DataError, QuantizationError
from calibquant.graph import capture, fold_batch_norm
from calibquant.numerics.clipping import mse_range_exhaustive
from calibquant.numerics.grid import Grid, PerChannel, PerTensor
from calibquant.quantization import QuantModel, TensorPlan, calibrate_activations, calibrate_weights, make_plan
from calibquant.quantization.observers import make_observer
from calibquant.quantization.quantizers import ActivationQuantizer, activation_affine
from calibquant.recipe import ActivationRecipe, Observer, QuantRecipe, WeightRecipe

ALL_BITS = [2, 3, 4, 5, 6, 7, 8, 16]
OBSERVERS: list[Observer] = [
    "minmax", "moving-average", "percentile", "mse", "mse-batch", "mse-shrink", "kl", "ifmr", "hfmg",
]  # fmt: skip


class Net(nn.Module):
    """Modules whose outputs hooks can see, in the order of the plan's main sites."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.a, self.bn, self.act1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation()
        self.b, self.act2 = nn.Conv2d(8, 8, 3), activation()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn(self.a(x)))
        return self.fc(self.pool(self.act2(self.b(x))).flatten(1))


def network(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    net = Net(activation).eval()
    nn.init.uniform_(net.bn.running_var, 0.5, 2)
    nn.init.normal_(net.bn.running_mean)
    return net


def images(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def model_of(net: nn.Module, recipe: QuantRecipe) -> QuantModel:
    graph = fold_batch_norm(capture(net, images(2)))
    return QuantModel(graph, make_plan(graph, recipe), recipe.activations.dynamic)


# --- activation ranges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_ranges_are_those_of_the_original_networks_tensors(observer: Observer, activation: type[nn.Module]) -> None:
    net = network(activation)
    recipe = QuantRecipe(boundary="none", activations=ActivationRecipe(observer=observer, percentile=99.0))
    model = model_of(net, recipe)
    batches = [images(8, seed=1), images(8, seed=2), images(3, seed=3)]
    calibrate_activations(model, recipe.activations, batches)
    before = {"act1": ["a"], "act2": ["b"]} if activation is nn.Tanh else {}  # a ReLU only limits the codes
    order = ["x", *before.get("act1", []), "act1", *before.get("act2", []), "act2", "pool"]
    assert list(model.activation_quantizers) == order
    seen: dict[str, list[Tensor]] = {"x": batches}
    for name in order[1:]:
        module, values = net.get_submodule({"a": "bn"}.get(name, name)), seen.setdefault(name, [])  # folded into a
        module.register_forward_hook(lambda _m, _a, out, values=values: values.append(out.clone()))
    with torch.no_grad():
        for batch in batches:
            net(batch)
    for name, quantizer in model.activation_quantizers.items():
        by_hand = make_observer(recipe.activations, quantizer.plan)
        for value in seen[name]:
            by_hand.update(value)
        low, high = (v.clamp(max=0) if i == 0 else v.clamp(min=0) for i, v in enumerate(by_hand.range()))
        assert quantizer.scale is not None
        span = float(quantizer.scale) * quantizer.plan.grid.steps
        assert span == pytest.approx(float(high - low), rel=2e-2 if observer == "kl" else 1e-4)
        assert float(quantizer.zero_point) == pytest.approx(round(-float(low) / float(quantizer.scale)), abs=1)


def test_calibration_observes_the_float_network_whatever_is_switched_on() -> None:
    recipe = QuantRecipe(activations=ActivationRecipe(observer="minmax"))
    first, second = model_of(network(), recipe), model_of(network(), recipe)
    calibrate_activations(first, recipe.activations, [images()])
    calibrate_weights(second, recipe)
    calibrate_activations(second, recipe.activations, [images()])
    calibrate_activations(second, recipe.activations, [images()])
    for name, quantizer in first.activation_quantizers.items():
        assert torch.equal(quantizer.scale, second.activation_quantizers[name].scale)


def test_a_part_is_calibrated_inside_its_network() -> None:
    net = network()
    recipe = QuantRecipe(activations=ActivationRecipe(observer="minmax"))
    graph = capture(net, images(2), submodule="b")
    part = QuantModel(graph, make_plan(graph, recipe))

    def mount(part: nn.Module) -> nn.Module:
        host = network()
        host.b = part
        return host

    calibrate_activations(part, recipe.activations, [images()], mount)
    with torch.no_grad():
        fed = net.act1(net.bn(net.a(images())))
    assert float(part.activation_quantizers["x"].scale) == pytest.approx(float(fed.max()) / 255, rel=1e-5)


# --- dynamic ranges ---------------------------------------------------------------------------------------------------


def test_dynamic_ranges_are_those_of_each_batch() -> None:
    recipe = QuantRecipe(boundary="none", activations=ActivationRecipe(bits=3, dynamic=True))
    model = model_of(network(), recipe)
    calibrate_weights(model, recipe)
    calibrate_activations(model, recipe.activations, [images()])
    assert all(q.scale is None for q in model.activation_quantizers.values())
    assert model(images()).isfinite().all()
    quantizer = model.activation_quantizers["act1"]
    for factor in (1.0, 10.0):
        x = images(4, seed=9).relu() * factor
        levels = torch.unique(quantizer(x))
        torch.testing.assert_close(levels, torch.arange(8) * x.max() / 7)
    flat = quantizer(torch.zeros(2, 3))
    assert torch.equal(flat, torch.zeros(2, 3))


# --- errors that a grid allows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_lose_at_most_half_a_step(bits: int, granularity: str, symmetric: bool) -> None:
    weights = WeightRecipe(bits=bits, symmetric=symmetric, granularity=granularity, observer="minmax")  # type: ignore[arg-type]
    recipe = QuantRecipe(boundary="none", placement="academic", weights=weights)
    model = model_of(network(), recipe)
    done: list[tuple[int, int]] = []
    calibrate_weights(model, recipe, lambda i, n: done.append((i, n)))
    assert done == [(1, 3), (2, 3), (3, 3)]
    tensors = dict(model.teacher.named_buffers())
    for name, quantizer in model.weight_quantizers.items():
        q, weight = quantizer.get(), tensors[name]
        channels = len(weight) if granularity == "per_channel" else 1
        assert q.scale.numel() == q.zero_point.numel() == channels
        assert q.codes.shape == weight.shape
        lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        assert lowest <= int(q.codes.min())
        assert int(q.codes.max()) <= highest
        assert not symmetric or not q.zero_point.any()
        step = q.scale.reshape(-1, *[1] * (weight.dim() - 1)).double()
        error = (quantizer(weight).double() - weight.double()).abs() / step
        # A symmetric grid has no code for +absmax + half a step: its highest value may lose half a step more; and a
        # zero point rounded to an integer shifts an asymmetric grid by up to half a step at its ends.
        inside = error[quantizer(weight).abs() < quantizer(weight).abs().max() * 0.7]
        assert float(inside.max()) <= 0.5 + 2e-3
        assert float(error.max()) <= 1.0 + 2e-3
        used = weight.reshape(channels, -1)
        span = 2 * used.abs().amax(1) if symmetric else used.amax(1).clamp(min=0) - used.amin(1).clamp(max=0)
        torch.testing.assert_close(q.scale.reshape(-1), span / (2**bits - 1))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("data", ["relu", "normal", "negative"])
def test_activations_lose_at_most_half_a_step_inside_the_range(bits: int, symmetric: bool, data: str) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(bits))
    x = {"relu": x.relu(), "normal": x, "negative": -x.abs()}[data]
    plan = TensorPlan(Grid(bits), symmetric)
    quantizer = ActivationQuantizer("x", plan)
    quantizer.set_range(x.min(), x.max())
    rounded = quantizer(x)
    step = float(quantizer.scale)
    assert len(torch.unique(rounded)) <= 2**bits
    inside = (x >= rounded.min()) & (x <= rounded.max())
    assert inside.float().mean() > 0.35
    assert float((rounded - x).abs()[inside].max()) <= step / 2 * (1 + 1e-2)  # codes up to 2^16 in float32
    if data == "relu":
        assert int(quantizer.zero_point) == 0
        assert step == pytest.approx(float(x.max()) / (2**bits - 1))
    elif symmetric:
        assert int(quantizer.zero_point) == 2 ** (bits - 1)
        assert step == pytest.approx(2 * float(x.abs().max()) / (2**bits - 1))


def test_sixteen_bits_are_nearly_float() -> None:
    recipe = QuantRecipe(
        weights=WeightRecipe(bits=16, observer="minmax"), activations=ActivationRecipe(bits=16, observer="minmax")
    )
    model = model_of(network(), recipe)
    calibrate_weights(model, recipe)
    calibrate_activations(model, recipe.activations, [images(32)])
    x = images(32)
    assert float((model(x) - model.teacher(x)).abs().max()) < 1e-3
    assert not torch.equal(model(x), model.teacher(x))


# --- symmetric activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", ["mse", "mse-batch"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_scores_one_sided_values_on_the_grid_they_get(observer: Observer, bits: int) -> None:
    """Without negative values the whole unsigned grid serves [0, high]; the symmetric formula would halve it."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1)).abs()
    found = make_observer(ActivationRecipe(observer=observer), TensorPlan(Grid(bits), symmetric=True))
    found.update(x)
    low, high = found.range()
    _, best = mse_range_exhaustive(x, Grid(bits), False, PerTensor())
    assert float(low) == 0
    assert float(high) == pytest.approx(float(best), rel=2e-2)  # a histogram of 4096 bins, 100 thresholds

    def error(end: Tensor) -> float:
        scale, zero = activation_affine(torch.zeros(()), end, TensorPlan(Grid(bits), True))
        codes = (x / scale).round().clamp(0, 2**bits - 1)
        assert int(zero) == 0
        return float(((codes * scale - x).abs() ** 2.4).mean())

    ends = x.max() * torch.arange(1, 101) / 100
    assert error(high) <= min(error(end) for end in ends) * 1.01


@pytest.mark.parametrize("observer", ["mse", "mse-batch"])
def test_two_sided_values_stay_symmetric(observer: Observer) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    found = make_observer(ActivationRecipe(observer=observer), TensorPlan(Grid(4), symmetric=True))
    found.update(x)
    low, high = found.range()
    assert float(low) == -float(high) < 0
    scale, zero = activation_affine(low, high, TensorPlan(Grid(4), True))
    assert int(zero) == 8
    assert float(scale) == pytest.approx(float(high) / 7.5)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_no_number_is_named() -> None:
    for bad in (torch.nan, torch.inf):
        model = model_of(network(), QuantRecipe())
        dict(model.teacher.named_buffers())["b.weight"][0, 0, 0, 0] = bad
        with pytest.raises(QuantizationError, match=r"^b\.weight: holds NaN or Inf") as caught:
            calibrate_weights(model, QuantRecipe())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("observer", [*OBSERVERS, "aciq"])
def test_activations_that_are_no_numbers_are_one_line_errors(observer: Observer) -> None:
    recipe = QuantRecipe(activations=ActivationRecipe(observer=observer))
    x = images()
    x[3, 1, 2, 2] = torch.nan
    with pytest.raises(DataError, match=r"^activations of x: hold NaN") as caught:
        calibrate_activations(model_of(network(), recipe), recipe.activations, [x])
    assert "\n" not in str(caught.value)


def test_no_images_is_an_error() -> None:
    recipe = QuantRecipe()
    for batches in ([], [images(0)]):
        with pytest.raises(CalibQuantError, match="no images"):
            calibrate_activations(model_of(network(), recipe), recipe.activations, batches)


def test_weights_by_error_search_are_at_least_as_good_as_min_max() -> None:
    errors = {}
    for observer in ("minmax", "mse"):
        recipe = QuantRecipe(boundary="none", weights=WeightRecipe(bits=3, observer=observer))  # type: ignore[arg-type]
        model = model_of(network(), recipe)
        calibrate_weights(model, recipe)
        weight = dict(model.teacher.named_buffers())["b.weight"]
        quantizer = model.weight_quantizers["b.weight"]
        assert quantizer.plan.granularity == PerChannel(0)
        errors[observer] = (quantizer(weight) - weight).abs().pow(2.4).flatten(1).mean(1)
    assert bool((errors["mse"] <= errors["minmax"] * 1.0001).all())
    assert float(errors["mse"].sum()) < 0.97 * float(errors["minmax"].sum())


def test_negative_zero_and_constant_activations() -> None:
    quantizer = ActivationQuantizer("x", TensorPlan(Grid(4), False))
    quantizer.set_range(torch.tensor(-0.0), torch.tensor(0.0))
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))
    assert F.relu(quantizer(torch.ones(3))).isfinite().all()


@pytest.mark.parametrize("observer", [*OBSERVERS, "aciq"])
def test_activations_too_large_to_be_squared_are_one_line_errors(observer: Observer) -> None:
    recipe = QuantRecipe(activations=ActivationRecipe(observer=observer))
    x = images()
    x[3, 1, 2, 2] = -2e19
    with pytest.raises(DataError, match=r"^activations of x: hold values up to -2e\+19, where 1e\+19") as caught:
        calibrate_activations(model_of(network(), recipe), recipe.activations, [x])
    assert "\n" not in str(caught.value)
