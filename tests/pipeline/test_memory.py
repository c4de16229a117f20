"""The predicted memory of a run, against sums made by hand and what a run really holds."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from networks import NETWORKS, folded, quantized
from torch import Tensor, fx, nn

from calibquant.features import Features, FeatureStore
from calibquant.graph import capture, units
from calibquant.graph.subgraph import subgraph
from calibquant.pipeline.memory import feature_bytes, learning_bytes, live_bytes, value_bytes
from calibquant.quantization import QuantModel
from calibquant.recipe import QuantRecipe
from calibquant.reconstruction.network import quantized_input

NAMES = ["cifar_resnet", "densenet", "unet", "mobilenet_v3"]


def as_is(network: nn.Module) -> nn.Module:
    return network


def sizes_of(graph: fx.GraphModule, images: Tensor) -> dict[str, int]:
    return value_bytes(graph, as_is, images[:1])


def test_live_bytes_of_a_residual_block() -> None:
    """While the addition is computed, the shortcut, the convolution and the sum exist: 3 x 4 x 8 x 8 floats."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return (x + self.conv(x)).mean((2, 3))

    images = torch.zeros(2, 1, 8, 8)
    graph = capture(Block(), images)
    assert live_bytes(graph.graph, sizes_of(graph, images)) == 3 * 4 * 8 * 8 * 4


@pytest.mark.parametrize("name", NAMES)
def test_features_hold_what_is_predicted(name: str) -> None:
    """The largest sum that two networks' features really hold lies at most 1.5 times below the prediction."""
    images = NETWORKS[name].example(6, seed=1)
    graph = folded(name)
    model = quantized(graph, QuantRecipe(), images)
    chain, store = units(graph.graph), _Counted()
    entering = quantized_input(model, images, "cpu")
    sides = [
        Features(graph.graph, partial(subgraph, graph), images, 3, store=store),
        Features(graph.graph, model.part, entering, 3, store=store),
    ]
    for unit in chain:
        for side in sides:
            side.advance(unit.nodes[0])
        (target,) = sides[0].run(unit.nodes, [unit.output])
        del target
    predicted = len(images) * feature_bytes(graph.graph, sizes_of(graph, images), chain)
    assert store.most <= predicted <= 1.5 * store.most


def test_learning_bytes_grow_with_quantizers() -> None:
    """A unit whose activations are quantized keeps more for its gradient than the same unit in float."""
    images = NETWORKS["cifar_resnet"].example(4, seed=1)
    graph = folded("cifar_resnet")
    sizes, unit = sizes_of(graph, images), units(graph.graph)[1]
    both: list[QuantModel] = [quantized(graph, QuantRecipe(placement=p), images) for p in ("integer", "academic")]
    integer, academic = (learning_bytes(model, unit, sizes) for model in both)
    assert integer > academic > sum(sizes[name] for name in unit.nodes)


class _Counted(FeatureStore):
    """Remembers the most bytes that were in use at once."""

    most = 0

    def allocate(self, shape: object, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = super().allocate(shape, dtype)  # type: ignore[arg-type]
        self.most = max(self.most, self.in_memory)
        return tensor
