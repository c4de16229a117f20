"""Sensitivities against networks with replaced weights, budgets against counts by hand, networks of chosen bits."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from calibquant.errors import QuantizationError
from calibquant.export.artifact import size_of
from calibquant.graph import capture, fold_batch_norm
from calibquant.graph.macs import macs
from calibquant.numerics.packing import packed_bytes
from calibquant.quantization import calibrate_activations, calibrate_weights, make_plan
from calibquant.quantization.mixed import budget_of, choose_bits, combined
from calibquant.quantization.model import QuantModel
from calibquant.quantization.sensitivity import (
    Models,
    choice_models,
    free_tensors,
    one_at_a_time,
    second_order,
)
from calibquant.recipe import QuantRecipe

CHOICES = (2, 4, 8)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=2, stride=2), nn.Conv2d(6, 9, 1)
        self.fc = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(12, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def recipe_of(**fields: Any) -> QuantRecipe:
    return QuantRecipe.model_validate({"activations": {"bits": 8}, "boundary": "none", **fields})


def models_of(network: nn.Module, images: Tensor, recipe: QuantRecipe, activations: bool = False) -> tuple[Models, Any]:
    teacher = fold_batch_norm(capture(network, images))
    names = free_tensors(make_plan(teacher, recipe), activations)
    models = choice_models(teacher, recipe, names, CHOICES)
    for model in models.values():
        calibrate_activations(model, recipe.activations, [images])
    return models, names


def test_free_are_the_tensors_that_no_rule_fixes(network: nn.Module, images: Tensor) -> None:
    teacher = fold_batch_norm(capture(network, images))
    plan = make_plan(teacher, recipe_of(boundary="qdrop", bits={"b.weight": 5}))
    assert free_tensors(plan) == ("c.weight",)
    assert free_tensors(plan, activations=True) == ("c.weight", "relu", "relu_1")
    assert plan.weights["b.weight"].grid.bits == 5


def test_named_bits_are_those_of_a_recipe_of_that_width(network: nn.Module, images: Tensor) -> None:
    """8-bit weights are symmetric under `integer`; other bits named in an 8-bit recipe are not."""
    teacher = fold_batch_norm(capture(network, images))
    narrow = make_plan(teacher, recipe_of(weights={"bits": 3}))
    named = make_plan(teacher, recipe_of(weights={"bits": 8}, bits={"b.weight": 3, "relu": 3}))
    assert named.weights["a.weight"].symmetric
    assert (named.weights["b.weight"].grid, named.weights["b.weight"].symmetric) == (
        narrow.weights["b.weight"].grid,
        False,
    )
    assert named.activations["relu"].grid.bits == 3
    with pytest.raises(QuantizationError, match=r"quant.bits: there is no quantizer named 'b.wieght'; did you mean"):
        make_plan(teacher, recipe_of(bits={"b.wieght": 3}))


def changed(network: nn.Module, models: Models, name: str, bits: int) -> nn.Module:
    other = copy.deepcopy(network)
    other.get_parameter(name).data = models[bits].weight_quantizers[name].get().dequantize()
    return other


def test_one_at_a_time_is_the_network_with_one_weight_replaced(network: nn.Module, images: Tensor) -> None:
    models, names = models_of(network, images, recipe_of())
    found = one_at_a_time(models, names, images.split(5))
    assert (found.names, found.choices, found.images) == (
        ("a.weight", "b.weight", "c.weight", "fc.weight"),
        CHOICES,
        12,
    )
    with torch.no_grad():
        want = network(images).double().numpy()
        shifts = []
        for (t, name), (c, bits) in product(enumerate(names), enumerate(CHOICES)):
            got = changed(network, models, name, bits)(images).double().numpy()
            shift = (got - got.mean(1, keepdims=True)) - (want - want.mean(1, keepdims=True))
            kl = (softmax(want, 1) * (log_softmax(want, 1) - log_softmax(got, 1))).sum(1).mean()
            assert found.loss[t, c] == pytest.approx(kl, rel=1e-4, abs=1e-9)
            assert found.logits[t, c] == pytest.approx((shift**2).mean(), rel=1e-4)
            assert found.disagreement[t, c] == pytest.approx((got.argmax(1) != want.argmax(1)).mean())
            shifts.append(shift.ravel())
    expected = np.array(shifts) @ np.array(shifts).T / shifts[0].size
    np.testing.assert_allclose(found.interactions, expected, rtol=1e-3, atol=1e-6 * expected.max())


def test_one_activation_alone(network: nn.Module, images: Tensor) -> None:
    """`relu_1` at 2 bits: the rest of the network on its values rounded by hand."""
    models, _ = models_of(network, images, recipe_of(), activations=True)
    found = one_at_a_time(models, ["relu_1"], [images])
    scale, zero = (float(v) for v in models[2].activation_quantizers["relu_1"].get())
    with torch.no_grad():
        x = torch.relu(network.b(torch.relu(network.a(images))))  # type: ignore[operator]
        x = (torch.round(x / scale).clamp(0, 3) - zero) * scale
        got = network.fc(torch.relu(network.c(x)).mean((2, 3))) - network(images)  # type: ignore[operator]
    assert found.logits[0, 0] == pytest.approx(float((got - got.mean(1, keepdim=True)).square().mean()), rel=1e-4)


@pytest.mark.parametrize("of_loss", [False, True])
def test_second_order_of_a_linear_network_in_closed_form(of_loss: bool) -> None:
    """logits = W x: the mean over directions is the squared change d of the logits, or d' (diag(p) - p p') d / 2."""
    torch.manual_seed(0)
    network = nn.Linear(6, 4)
    image = torch.randn(1, 6)
    models = choice_models(capture(network, image.expand(2, 6)), recipe_of(), ["weight"], CHOICES)
    costs = second_order(models, ["weight"], [image.expand(4000, 6)], of_loss=of_loss)
    p = softmax(network(image).detach().double().numpy()[0])
    for c, bits in enumerate(CHOICES):
        change = models[bits].weight_quantizers["weight"].get().dequantize() - network.weight.detach()
        d = (change @ image[0]).double().numpy()
        expected = d @ (np.diag(p) - np.outer(p, p)) @ d / 2 if of_loss else ((d - d.mean()) ** 2).mean()
        assert costs[0, c] == pytest.approx(expected, rel=0.12)  # four standard errors of 4,000 chi-squares


def test_no_images_is_an_error(network: nn.Module, images: Tensor) -> None:
    models, names = models_of(network, images, recipe_of())
    for measure in (one_at_a_time, second_order):
        with pytest.raises(QuantizationError, match="sensitivity: got no images"):
            measure(models, names, [])  # type: ignore[operator]


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, (3, 1), stride=2, groups=2), nn.ConvTranspose2d(6, 5, 3, 2)
        self.c = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)).permute(0, 2, 3, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Small, Transposed])
def test_macs_are_half_of_torch_s_flops(make: type[nn.Module]) -> None:
    module = make().eval()
    image = torch.randn(2, 3 if make is Small else 4, 11, 9)
    with FlopCounterMode(display=False) as counter:
        module(image[:1])
    assert sum(macs(capture(module, image), image).values()) == counter.get_total_flops() // 2


def test_bytes_and_average_bits(network: nn.Module, images: Tensor) -> None:
    models, names = models_of(network, images, recipe_of(boundary="qdrop"))
    count = {name: p.numel() for name, p in network.named_parameters()}
    assert names == ("b.weight", "c.weight")
    stored, average = (budget_of(kind, models, names, {}) for kind in ("weight_bytes", "average_bits"))
    for choice in product(range(3), repeat=2):
        bits = {name: CHOICES[c] for name, c in zip(names, choice, strict=True)}
        model = combined(models, models[2], bits)
        assert stored.of(choice) == size_of(model).codes
        every = {"a.weight": 8, "fc.weight": 8, **bits}
        every = {n: model.plan.weights[n].grid.bits for n in every}
        assert {min(b, 7) for b in every.values()} == {min(b, 7) for b in (8, *bits.values())}
        assert stored.of(choice) == sum(packed_bytes(count[n], b) for n, b in every.items())
        assert average.of(choice) == pytest.approx(
            sum(count[n] * every[n] for n in bits) / sum(map(count.get, bits))  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("activations", [False, True])
def test_bit_operations_are_those_of_the_coverage(network: nn.Module, images: Tensor, activations: bool) -> None:
    models, names = models_of(network, images, recipe_of(boundary="qdrop"), activations)
    counts = macs(models[2].teacher, images[:1])
    budget = budget_of("bops", models, names, counts)
    random = np.random.default_rng(0)
    for _ in range(8):
        choice = [int(c) for c in random.integers(0, 3, len(names))]
        model = combined(models, models[2], {n: CHOICES[c] for n, c in zip(names, choice, strict=True)})
        rows = [row for row in model.coverage() if row.node in counts]
        taken = sum(counts[r.node] * r.weight_bits * (r.input_bits[0] or 32) for r in rows)  # type: ignore[operator]
        # 8 bits of a weight count as 8 if its activation is chosen too: they are 7 only where that gets 8
        spared = sum(
            counts[r.node] * (r.input_bits[0] or 32)
            for r in rows
            if activations and r.weight_bits == 7 and r.node in ("b", "c")
        )
        assert budget.of(choice) == taken + spared


def test_a_uniform_width_is_within_its_own_average(network: nn.Module, images: Tensor) -> None:
    models, names = models_of(network, images, recipe_of())
    budget = budget_of("average_bits", models, names, {})
    costs = np.array([[1.0, 0.0, 9.0]] * len(names))
    assert choose_bits(budget, 4.0, costs) == [1] * len(names)


def test_combined_is_the_network_of_a_recipe_that_names_the_bits(network: nn.Module, images: Tensor) -> None:
    recipe = recipe_of(boundary="qdrop")
    models, names = models_of(network, images, recipe, activations=True)
    bits = dict(zip(names, (4, 2, 8, 2), strict=True))
    named = recipe.model_copy(update={"bits": bits})
    model = QuantModel(models[2].teacher, make_plan(models[2].teacher, named))
    calibrate_weights(model, named)
    calibrate_activations(model, named.activations, [images])
    found = combined(models, models[2], bits)
    assert {n: p.grid.bits for n, p in (found.plan.weights | found.plan.activations).items() if n in bits} == bits  # type: ignore[operator]
    with torch.no_grad():
        assert torch.equal(found(images), model(images))
