"""Empirical bias correction, and what the corrections are for: badly scaled networks at one scale a tensor."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, folded, quantized, values_of
from torch import Tensor, fx, nn

from calibquant.graph import capture, equalize, fold_batch_norm, with_biases
from calibquant.quantization import QuantModel
from calibquant.recipe import QuantRecipe
from calibquant.reconstruction import correct_biases


def recipe(bits: int, granularity: str = "per_channel", placement: str = "academic") -> QuantRecipe:
    return QuantRecipe.model_validate({
        "weights": {"bits": bits, "observer": "minmax", "granularity": granularity, "symmetric": True},
        "activations": {"bits": 8, "observer": "minmax"}, "placement": placement, "boundary": "none",
    })  # fmt: skip


class Products(fx.Interpreter):
    """Runs a simulation and keeps the outputs of its products, before any quantizer."""

    def __init__(self, model: QuantModel) -> None:
        super().__init__(model.simulation)
        self.names, self.seen = set(model.bias_deltas), dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.name in self.names and n.op == "call_function":
            self.seen[n.name] = value  # type: ignore[assignment]
        return value


def channel_errors(model: QuantModel, images: Tensor) -> dict[str, float]:
    """The largest difference of channel means from the float network's, over the largest float output, by product."""
    products = Products(model)
    with torch.no_grad():
        products.run(images)
    want, found = values_of(model.teacher, images), {}
    for node in [n for n in model.teacher.graph.nodes if n.name in model.bias_deltas]:
        axis = -1 if node.target.__name__ == "linear" else 1  # type: ignore[union-attr]
        means = [v.double().movedim(axis, 0).flatten(1).mean(1) for v in (want[node.name], products.seen[node.name])]
        found[node.name] = float((means[0] - means[1]).abs().max() / want[node.name].abs().max())
    return found


@pytest.mark.parametrize("name", ["mobilenet_v2", "cifar_resnet", "unet", "linear_batchnorm"])
def test_every_channel_gets_the_float_networks_mean(name: str) -> None:
    x = NETWORKS[name].example(70, seed=1)  # two batches
    model = quantized(with_biases(folded(name)), recipe(3), x)
    before = channel_errors(model, x)
    seen: list[tuple[int, int]] = []
    found = correct_biases(model, x, progress=lambda done, total: seen.append((done, total)))
    after = channel_errors(model, x)
    assert max(after.values()) < 1e-5, "also behind layers that were corrected before"
    assert max(before.values()) > 1e-2
    assert [row.node for row in found] == list(after)
    assert seen[-1] == (len(found), len(found))
    with torch.no_grad(), model.float_mode():
        assert torch.equal(model(x), folded(name)(x))


def test_with_biases_in_integers_it_is_right_to_their_rounding() -> None:
    x = NETWORKS["mobilenet_v2"].example(16, seed=1)
    model = quantized(with_biases(folded("mobilenet_v2")), recipe(4, placement="integer"), x)
    before = channel_errors(model, x)
    correct_biases(model, x)
    after = channel_errors(model, x)
    assert sum(after.values()) < 0.1 * sum(before.values())
    assert all(q.enabled for q in model.quantizers)


def test_features_may_lie_on_disk_and_the_result_is_the_same(tmp_path: Path) -> None:
    x = NETWORKS["cifar_resnet"].example(12, seed=1)
    deltas = []
    for limit in (4.0, 0.0):
        model = quantized(with_biases(folded("cifar_resnet")), recipe(3), x)
        correct_biases(model, x, cache_limit=limit, folder=tmp_path)
        deltas.append({name: d.delta for name, d in model.bias_deltas.items()})
    assert all(torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])
    assert not list(tmp_path.iterdir())


def badly_scaled(relu6: bool) -> tuple[fx.GraphModule, Tensor]:
    """Depthwise-separable layers whose channels were scaled against each other by up to 1,000, as some nets' are."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 24), (24, 32)):
        layers += [nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.ReLU6() if relu6 else nn.ReLU()]
        layers += [nn.Conv2d(inputs, outputs, 1), nn.ReLU6() if relu6 else nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    convs = [m for m in net if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for first, second in pairwise(convs[1:]):
            factor = torch.logspace(-3, 0, len(first.weight))[torch.randperm(len(first.weight))]
            first.weight.mul_(factor.reshape(-1, 1, 1, 1))
            first.bias.mul_(factor)  # type: ignore[union-attr]
            second.weight.div_(factor.reshape((-1, 1, 1, 1) if second.groups > 1 else (1, -1, 1, 1)))
    x = torch.rand(32, 3, 16, 16)
    return fold_batch_norm(capture(net, x[:2])), x


def sqnr(model: QuantModel, x: Tensor) -> float:
    """Decibels of the float network's logits, without their mean, over the simulation's error."""
    with torch.no_grad():
        want, got = model.teacher(x).double(), model(x).double()
    return 10 * math.log10(float((want - want.mean(0)).square().sum() / (want - got).square().sum()))


@pytest.mark.parametrize("relu6", [False, True])
def test_a_badly_scaled_network_recovers_at_one_scale_a_tensor(relu6: bool) -> None:
    graph, x = badly_scaled(relu6)
    found = equalize(graph, lambda: x.split(16))
    assert not found.undone
    before = sqnr(quantized(graph, recipe(8, "per_tensor"), x), x)
    model = quantized(with_biases(found.graph), recipe(8, "per_tensor"), x)
    after = sqnr(model, x)
    assert after > before + 10
    correct_biases(model, x)
    assert sqnr(model, x) > after - 0.5, "the mean's part of the error is gone"
