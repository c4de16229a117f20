"""Cut points and units of graphs analysed by hand, and what must hold of any network's units."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, folded
from torch import Tensor, fx, nn

from calibquant.graph import capture, units
from calibquant.graph.nodes import weight_of
from calibquant.graph.units import MAX_WEIGHTS, cut_points

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3), conv(), nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        return self.fc(torch.sigmoid(self.b(x)).flatten(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.block = nn.ModuleDict({"a": conv(), "b": conv()})
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.block["b"](F.relu(self.block["a"](x))) + x)
        return self.fc(x.mean((2, 3)))


class Branches(nn.Module):
    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.left, self.right, self.last = conv(3), nn.Sequential(*[conv(3, 3) for _ in range(layers)]), conv(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([F.relu(self.left(x)), torch.tanh(self.right(x))], 1))


class Scaled(nn.Module):
    """A parameter comes first among the arguments of the first op; the last ops hold no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.a = nn.Parameter(torch.ones(1, 3, 1, 1) * 2), conv(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(F.relu(self.a(self.gain * x)).mean((2, 3)), 1)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3), conv(3), conv()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.c(F.relu(F.relu(self.a(x)) + self.b(y))))


class Recurrent(nn.Module):
    """One convolution called twice in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.loop = conv(3), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x + self.loop(F.relu(self.loop(x)))


HAND: dict[str, tuple[nn.Module, int, list[str], list[tuple[str, str, list[str], list[str]]]]] = {
    # network, inputs, cut points, units as (name, input, nodes, weights)
    "chain": (
        Chain(), 1, ["x", "a", "relu", "max_pool2d", "b", "sigmoid", "flatten", "fc"],
        [("a", "x", ["a", "relu"], ["a.weight"]),
         ("b", "relu", ["max_pool2d", "b", "sigmoid"], ["b.weight"]),
         ("fc", "sigmoid", ["flatten", "fc"], ["fc.weight"])],
    ),
    "residual": (
        Residual(), 1, ["x", "stem", "relu", "add", "relu_2", "mean", "fc"],
        [("stem", "x", ["stem", "relu"], ["stem.weight"]),
         ("block", "relu", ["block_a", "relu_1", "block_b", "add", "relu_2"], ["block.a.weight", "block.b.weight"]),
         ("fc", "relu_2", ["mean", "fc"], ["fc.weight"])],
    ),
    "branches": (
        Branches(), 1, ["x", "cat", "last"],
        [("left…right.0", "x", ["left", "relu", "right_0", "tanh", "cat"], ["left.weight", "right.0.weight"]),
         ("last", "cat", ["last"], ["last.weight"])],
    ),
    "a parameter first, no weight last": (
        Scaled(), 1, ["x", "mul", "a", "relu", "mean", "softmax"],
        [("a", "x", ["mul", "a", "relu", "mean", "softmax"], ["a.weight"])],
    ),
    "two inputs": (
        TwoInputs(), 2, ["add", "relu_1", "c", "relu_2"],
        [("a", "x", ["a", "relu"], ["a.weight"]), ("b", "x_1", ["b"], ["b.weight"]),
         ("c", "relu_1", ["c", "relu_2"], ["c.weight"])],  # layers hold no sum, nor what reads it
    ),
    "a convolution twice": (
        Recurrent(), 1, ["x", "a", "add"],
        [("a", "x", ["a"], ["a.weight"]), ("loop", "a", ["relu", "loop", "loop_1", "add"], ["loop.weight"])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND)
def test_cut_points_and_units_equal_those_found_by_hand(name: str) -> None:
    network, inputs, cuts, expected = HAND[name]
    graph = capture(network.eval(), (IMAGE,) * inputs)
    assert [n.name for n in cut_points(graph.graph)] == cuts
    found = units(graph.graph)
    assert [(u.name, u.input, set(u.nodes), list(u.weights)) for u in found] == [
        (unit, entry, set(nodes), weights) for unit, entry, nodes, weights in expected
    ]
    order = [n.name for n in graph.graph.nodes]
    assert all(list(u.nodes) == sorted(u.nodes, key=order.index) and u.output == u.nodes[-1] for u in found)


@pytest.mark.parametrize("layers", [MAX_WEIGHTS - 1, MAX_WEIGHTS])
def test_a_piece_with_many_weights_falls_back_to_layers(layers: int) -> None:
    found = units(capture(Branches(layers).eval(), IMAGE).graph)
    if layers < MAX_WEIGHTS:
        assert [len(u.weights) for u in found] == [MAX_WEIGHTS, 1]
    else:
        assert [u.name for u in found] == ["left", *[f"right.{i}" for i in range(layers)], "last"]
        assert found[0].nodes == ("left", "relu")
        assert found[-2].nodes[-1] == "tanh"


def test_layer_units() -> None:
    found = units(capture(Residual().eval(), IMAGE).graph, "layer")
    assert [(u.name, u.input, u.nodes) for u in found] == [
        ("stem", "x", ("stem", "relu")),
        ("block.a", "relu", ("block_a", "relu_1")),
        ("block.b", "relu_1", ("block_b",)),
        ("fc", "mean", ("fc",)),
    ]


def test_an_unknown_granularity_is_an_error() -> None:
    with pytest.raises(ValueError, match="'block' or 'layer', not 'stage'"):
        units(capture(Chain().eval(), IMAGE).graph, "stage")


def live_after(graph: fx.Graph, node: fx.Node) -> set[str]:
    """By brute force: the values that exist once `node` has run and that something later still reads."""
    nodes = [n for n in graph.nodes if n.op != "get_attr"]
    later = nodes[nodes.index(node) + 1 :]
    return {n.name for n in nodes if n not in later and any(n in reader.all_input_nodes for reader in later)}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETWORKS)
def test_cut_points_are_where_one_tensor_is_live(name: str) -> None:
    graph = folded(name).graph
    nodes = [n for n in graph.nodes if n.op in ("placeholder", "call_function")]
    assert [n for n in nodes if live_after(graph, n) == {n.name}] == cut_points(graph)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("name", NETWORKS)
def test_units_hold_every_weight_once_and_one_tensor_enters(name: str, granularity: str) -> None:
    graph = folded(name).graph
    by_name = {n.name: n for n in graph.nodes}
    found = units(graph, granularity)
    held = [n for u in found for n in u.nodes]
    assert len(set(held)) == len(held)
    weighted = [n.name for n in graph.nodes if weight_of(n) is not None]
    assert [n for n in held if n in weighted] == weighted
    for unit in found:
        inside = [by_name[n] for n in unit.nodes]
        assert list(unit.weights) == list(dict.fromkeys(str(w.target) for n in inside if (w := weight_of(n))))
        entering = {s.name for n in inside for s in n.all_input_nodes if s.op != "get_attr"} - set(unit.nodes)
        assert entering == {unit.input}
        leaving = {n.name for n in inside if any(user.name not in unit.nodes for user in n.users)}
        assert leaving == {unit.output}
