"""Captured graphs of the test networks, made once in a test session (read them, never change them), and quantized."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx, nn

from calibquant.graph import capture, fold_batch_norm
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import QuantRecipe

from .case import NETWORKS


@cache
def network_of(name: str) -> nn.Module:
    """The network itself, which no test may change."""
    return NETWORKS[name].build()


@cache
def captured(name: str) -> fx.GraphModule:
    """The canonical graph with its BatchNorms."""
    return capture(network_of(name), NETWORKS[name].example())


@cache
def folded(name: str) -> fx.GraphModule:
    """The canonical graph, BatchNorm folded."""
    return fold_batch_norm(captured(name))


def difference(want: Tensor, got: Tensor) -> float:
    """Largest absolute difference relative to max(1, max |want|); the shapes must be equal."""
    assert want.shape == got.shape
    assert bool(torch.isfinite(want).all())
    return float((want.double() - got.double()).abs().max() / want.double().abs().max().clamp(min=1))


def calls(graph: fx.GraphModule) -> list[str]:
    """The names of the canonical ops in execution order."""
    return [n.target.__name__ for n in graph.graph.nodes if n.op == "call_function"]


def quantized(graph: fx.GraphModule, recipe: QuantRecipe, images: Tensor) -> QuantModel:
    """A calibrated QuantModel."""
    model = QuantModel(graph, make_plan(graph, recipe), recipe.activations.dynamic)
    calibrate_weights(model, recipe)
    calibrate_activations(model, recipe.activations, [images])
    return model


class Recorder(fx.Interpreter):
    """Keeps every node's value; a quantizer's output replaces the value of the node that it quantizes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n.args[0].name if n.op == "call_module" else n.name] = value  # type: ignore[union-attr]
        return value


def values_of(module: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Every node's value, without gradients."""
    recorder = Recorder(module)
    with torch.no_grad():
        recorder.run(images)
    return recorder.seen
