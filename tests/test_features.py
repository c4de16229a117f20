"""Features equal what flows through the whole network, cost one pass through it, and are kept where they should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from networks import NETWORKS, folded, quantized, values_of
from torch import Tensor, fx, nn

from calibquant.features import Features, FeatureStore, Piece, take
from calibquant.graph import capture
from calibquant.graph.subgraph import subgraph
from calibquant.quantization import QuantModel
from calibquant.recipe import ActivationRecipe, Placement, QuantRecipe, WeightRecipe

COUNT = 5
NAMES = [
    "cifar_resnet",
    "hrnet",
    "densenet",
    "unet",
    "mobilenet_v3",
    "conv_called_twice",
    "block_called_twice",
    "dead_code",
]


def recipe(placement: Placement, bits: int = 4) -> QuantRecipe:
    return QuantRecipe(
        weights=WeightRecipe(bits=bits, observer="minmax"),
        activations=ActivationRecipe(bits=bits, observer="minmax"),
        placement=placement,
    )


def order(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op != "get_attr"]


def live_at(graph: fx.GraphModule, at: int) -> set[str]:
    """By brute force: what is computed before position `at` and read there or later."""
    nodes = order(graph)
    return {n.name for n in nodes[:at] for later in nodes[at:] if n in later.all_input_nodes}


def quantized_image(model: QuantModel, images: Tensor) -> Tensor:
    name = order(model.teacher)[0].name
    return model.activation_quantizers[name](images) if name in model.activation_quantizers else images


@pytest.mark.parametrize("name", NAMES)
def test_live_values_are_the_teachers(name: str) -> None:
    """At every node: exactly the values still to be read, each as the whole network computes it."""
    graph, images = folded(name), NETWORKS[name].example(COUNT, seed=5)
    seen = values_of(graph, images)
    features = Features(graph.graph, partial(subgraph, graph), images, COUNT)
    for at, node in enumerate(order(graph)[1:], start=1):
        features.advance(node.name)
        assert set(features.live) == live_at(graph, at)
        for value in features.live:
            assert torch.equal(features.live[value], seen[value]), value
    assert torch.equal(features.live[order(graph)[-1].args[0].name], graph(images))  # type: ignore[union-attr]


@pytest.mark.parametrize("placement", ["integer", "academic"])
@pytest.mark.parametrize("name", NAMES)
def test_live_values_are_the_simulations(name: str, placement: Placement) -> None:
    """The same on the quantized side, where values are those after each quantizer."""
    graph, images = folded(name), NETWORKS[name].example(COUNT, seed=5)
    model = quantized(graph, recipe(placement), NETWORKS[name].example(8, seed=6))
    seen = values_of(model.simulation, images)
    features = Features(graph.graph, model.part, quantized_image(model, images), COUNT)
    nodes = order(graph)
    for node in nodes[1 :: max(1, len(nodes) // 12)] + nodes[-1:]:
        features.advance(node.name)
        for value in features.live:
            assert torch.equal(features.live[value], seen[value]), value
    with torch.no_grad():
        assert torch.equal(features.live[nodes[-1].args[0].name], model(images))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["cifar_resnet", "densenet"])
def test_the_image_of_the_integer_placement_is_quantized_once(name: str) -> None:
    graph, images = folded(name), NETWORKS[name].example(COUNT, seed=5)
    model = quantized(graph, recipe("integer"), images)
    first = order(graph)[0].name
    assert first in model.activation_quantizers
    assert not torch.equal(quantized_image(model, images), images)
    part = model.part([n.name for n in order(graph)[1:3]], [order(graph)[2].name])
    assert first in [n.name for n in part.teacher.graph.nodes if n.op == "placeholder"]
    assert first not in part.activation_quantizers


@pytest.mark.parametrize("name", ["cifar_resnet", "hrnet", "shuffles", "flattenings"])
def test_the_batch_size_does_not_matter(name: str) -> None:
    graph, images = folded(name), NETWORKS[name].example(7, seed=8)
    last = order(graph)[-1]
    found = []
    for batch in (1, 3, 7, 64):
        features = Features(graph.graph, partial(subgraph, graph), images, batch)
        features.advance(order(graph)[len(order(graph)) // 2].name)
        features.advance(last.name)
        found.append(features.live[last.args[0].name])  # type: ignore[union-attr]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def counting(piece: Piece, calls: Counter[str]) -> Piece:
    """A source of pieces that notes each run of each op, and on how many images."""

    def make(nodes: Sequence[str], outputs: Sequence[str]) -> nn.Module:
        module = piece(nodes, outputs)

        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            names = [n.name for n in module.graph.nodes if n.op == "call_function"]  # type: ignore[union-attr]
            calls.update({name: len(inputs[0]) for name in names})

        module.register_forward_pre_hook(count)
        return module

    return make


@pytest.mark.parametrize("stops", [1, 4, 1000])
@pytest.mark.parametrize("name", ["cifar_resnet", "hrnet", "densenet", "block_called_twice"])
def test_every_op_runs_once_over_the_images_however_often_it_stops(name: str, stops: int) -> None:
    graph, images = folded(name), NETWORKS[name].example(COUNT)
    calls: Counter[str] = Counter()
    features = Features(graph.graph, counting(partial(subgraph, graph), calls), images, 2)
    nodes = order(graph)
    for node in nodes[1 :: max(1, len(nodes) // stops)] + nodes[-1:]:
        features.advance(node.name)
        features.advance(node.name)  # once more, and nothing happens
    assert calls == dict.fromkeys((n.name for n in nodes if n.op == "call_function"), COUNT)


def test_running_a_unit_leaves_the_live_values_alone() -> None:
    graph, images = folded("cifar_resnet"), NETWORKS["cifar_resnet"].example(COUNT)
    features = Features(graph.graph, partial(subgraph, graph), images, 2)
    nodes = [n.name for n in order(graph)[1:4]]
    several = features.run(nodes, [nodes[2], nodes[0]])
    seen = values_of(graph, images)
    assert list(features.live) == [order(graph)[0].name]
    for value, name in zip(several, (nodes[2], nodes[0]), strict=True):
        torch.testing.assert_close(value, seen[name], rtol=1e-4, atol=1e-5)


class Tokens(nn.Module):
    """Indices are reshaped before they are looked up: a live value that is not float."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(300, 4), nn.Linear(24, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens.flatten(1)).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 0])
def test_integer_values_stay_integer(dtype: torch.dtype, limit: int | None) -> None:
    tokens = torch.randint(300, (COUNT, 2, 3), generator=torch.Generator().manual_seed(0))  # 257 is no bfloat16
    graph = capture(Tokens().eval(), tokens)
    features = Features(graph.graph, partial(subgraph, graph), tokens, 2, store=FeatureStore(dtype, limit))
    nodes = order(graph)
    features.advance(nodes[2].name)
    assert torch.equal(features.live[nodes[1].name], tokens.flatten(1))
    for node in nodes[3:]:
        features.advance(node.name)
    found = take(features.live[nodes[-1].args[0].name], slice(None))  # type: ignore[union-attr]
    error = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, graph(tokens), rtol=error, atol=error)


def test_a_network_with_two_inputs_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    graph = torch.fx.symbolic_trace(Two()).graph
    with pytest.raises(ValueError, match="one input"):
        Features(graph, lambda nodes, outputs: nn.Identity(), torch.zeros(1), 1)


@pytest.mark.parametrize("name", ["cifar_resnet", "hrnet"])
def test_features_do_not_go_back(name: str) -> None:
    graph, images = folded(name), NETWORKS[name].example(COUNT)
    features = Features(graph.graph, partial(subgraph, graph), images, 2)
    nodes = order(graph)
    features.advance(nodes[6].name)
    live = dict(features.live)
    for back in nodes[:6]:
        with pytest.raises(ValueError, match=f"at {nodes[6].name} already and cannot go back to {back.name}$"):
            features.advance(back.name)
    assert features.live == live
    features.advance(nodes[6].name)
    features.advance(nodes[-1].name)
