"""Pieces of a graph, run one after the other, are the graph."""

from __future__ import annotations

import random
import zlib
from itertools import pairwise

import pytest
import torch
from networks import NETWORKS, folded, network_of
from torch import Tensor, fx, nn

from calibquant.graph import capture, units
from calibquant.graph.subgraph import subgraph

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def ops(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op == "call_function"]


def inputs(graph: fx.GraphModule) -> list[str]:
    return [n.name for n in graph.graph.nodes if n.op == "placeholder"]


def run(piece: fx.GraphModule, values: dict[str, Tensor], outputs: list[str]) -> dict[str, Tensor]:
    """What a piece computes from the values that its inputs are named after."""
    with torch.no_grad():
        found = piece(*(values[name] for name in inputs(piece)))
    return dict(zip(outputs, found if isinstance(found, tuple) else (found,), strict=True))


def result(graph: fx.GraphModule) -> str:
    """The name of the node that the network returns."""
    (node,) = next(n for n in graph.graph.nodes if n.op == "output").args
    assert isinstance(node, fx.Node)
    return node.name


@pytest.mark.parametrize("name", NETWORKS)
def test_consecutive_pieces_equal_the_whole_graph_bit_for_bit(name: str) -> None:
    """The order of the nodes is cut at random; each piece hands on exactly what is read after it."""
    graph, x = folded(name), NETWORKS[name].example(2, seed=3)
    draw = random.Random(zlib.crc32(name.encode()))
    order = ops(graph)
    cuts = sorted({0, len(order), *draw.choices(range(len(order)), k=4)})
    values = {inputs(graph)[0]: x}
    for start, stop in pairwise(cuts):
        inside, after = order[start:stop], set(order[stop:])
        outputs = [n.name for n in inside if n.name == result(graph) or after & set(n.users)]
        piece = subgraph(graph, [n.name for n in inside], outputs)
        assert {n.name for n in ops(piece)} == {n.name for n in inside}
        if outputs:
            values |= run(piece, values, outputs)
    with torch.no_grad():
        assert torch.equal(values[result(graph)], graph(x))


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize(
    "name", ["resnet50", "hrnet", "densenet", "mobilenet_v3", "shufflenet_v2", "block_called_twice"]
)
def test_every_unit_alone_gives_what_it_gives_inside_the_network(name: str, granularity: str) -> None:
    """The whole network's values are taken by an interpreter."""
    graph, seen = folded(name), {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    with torch.no_grad():
        Recorder(graph).run(NETWORKS[name].example(2, seed=4))
    found = units(graph.graph, granularity)
    assert len(found) > 2
    for unit in found:
        piece = subgraph(graph, unit.nodes, [unit.output])
        assert inputs(piece) == [unit.input]
        assert torch.equal(run(piece, seen, [unit.output])[unit.output], seen[unit.output])


@pytest.mark.parametrize("name", ["resnet50", "densenet", "tied_linears", "multiplications", "convnext"])
def test_names_targets_and_storage_are_kept(name: str) -> None:
    graph = folded(name)
    order = ops(graph)
    inside = order[len(order) // 4 : len(order) // 2]
    piece = subgraph(graph, [n.name for n in inside], [inside[-1].name])
    assert [(n.name, n.target, str(n.args)) for n in ops(piece)] == [(n.name, n.target, str(n.args)) for n in inside]
    whole, held = dict(graph.named_buffers()), dict(piece.named_buffers())
    read = {str(s.target) for n in inside for s in n.all_input_nodes if s.op == "get_attr"}
    assert set(held) == read
    assert all(tensor is whole[name] for name, tensor in held.items())
    assert not list(piece.parameters())


class Diamond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        left = torch.relu(self.a(x))
        right = torch.sigmoid(self.b(y))
        return torch.tanh(left - right) + left


def test_inputs_come_in_execution_order_and_outputs_in_the_order_asked_for() -> None:
    graph = capture(Diamond().eval(), (torch.zeros(1, 3), torch.zeros(1, 3)))
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    assert inputs(subgraph(graph, ["sigmoid", "relu", "a", "b"], ["relu"])) == inputs(graph)
    piece = subgraph(graph, ["sub", "tanh"], ["tanh", "sub"])
    assert inputs(piece) == ["relu", "sigmoid"], "in execution order, not in that of the names given"
    tanh, difference = piece(x, y)
    assert torch.equal(difference, x - y)
    assert torch.equal(tanh, torch.tanh(x - y))
    (alone,) = subgraph(graph, ["sub"], ["sub"])(x, y)[None]
    assert torch.equal(alone, x - y), "a single output is a tensor, not a tuple"


def test_the_order_of_the_names_given_does_not_matter_and_the_graph_is_not_changed() -> None:
    graph = folded("resnet50")
    before, weights = graph.code, {n: t.clone() for n, t in graph.named_buffers()}
    unit = units(graph.graph)[1]
    pieces = [subgraph(graph, names, [unit.output]) for names in (unit.nodes, list(reversed(unit.nodes)))]
    assert pieces[0].code == pieces[1].code
    assert graph.code == before
    assert all(torch.equal(t, weights[n]) for n, t in graph.named_buffers())


def test_the_networks_themselves_agree() -> None:
    """The chain of a real network's units, from the image to the logits, against the module that was captured."""
    graph, x = folded("vgg_bn"), NETWORKS["vgg_bn"].example(2)
    value = x
    for unit in units(graph.graph):
        value = subgraph(graph, unit.nodes, [unit.output])(value)
    with torch.no_grad():
        torch.testing.assert_close(value, network_of("vgg_bn")(x), rtol=1e-4, atol=1e-4)
