"""Units: the pieces between cut points, where only one tensor is live; each is reconstructed at once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from calibquant.graph.nodes import kind_of, weight_of
from calibquant.graph.ops import Kind

MAX_WEIGHTS = 12  # an Inception block has 10; more than this would be reconstructed too coarsely and hold too much


@dataclass(frozen=True)
class Unit:
    """A piece of the network with one tensor in and one tensor out.

    Args:
        name: of the unit, the common part of its weights' names.
        input: name of the node whose value enters.
        output: name of the node whose value leaves.
        nodes: names of its nodes in execution order; the last one is `output`.
        weights: names of the parameters quantized in it, in order, each once.
    """

    name: str
    input: str
    output: str
    nodes: tuple[str, ...]
    weights: tuple[str, ...]


def cut_points(graph: fx.Graph) -> list[fx.Node]:
    """The nodes after which exactly one tensor is live: their own output. Inputs count, the output node does not."""
    nodes = [n for n in graph.nodes if n.op in ("placeholder", "call_function")]
    position = {n: i for i, n in enumerate(nodes)}
    end = len(nodes)
    last_use = {n: max((position.get(u, end) for u in n.users), default=position[n]) for n in nodes}
    inputs = [last_use[n] for n in nodes if n.op == "placeholder"]
    cuts, live_until = [], max(inputs) if len(inputs) > 1 else -1
    for node in nodes:
        if live_until <= position[node]:
            cuts.append(node)
        live_until = max(live_until, last_use[node])
    return cuts


def units(graph: fx.Graph, granularity: str = "block") -> list[Unit]:
    """The network as a chain of units.

    Args:
        graph: a canonical graph.
        granularity: "block" for the pieces between cut points, "layer" for one unit per op with a weight.

    An element-wise activation belongs to the unit whose output it takes; pools and reshapes that hold no weight belong
    to the unit that reads them. A layer unit is a weighted op with the activations that alone read it. A piece with
    more than `MAX_WEIGHTS` weights (a whole dense block, say) falls back to layers, and so does one that several inputs
    enter.

    Returns:
        the units in execution order; every weighted op belongs to exactly one.
    """
    if granularity not in ("block", "layer"):
        raise ValueError(f"granularity is 'block' or 'layer', not '{granularity}'")
    if granularity == "layer":
        return [_layer(node) for node in graph.nodes if weight_of(node) is not None]
    found: list[Unit] = []
    for before, nodes in _pieces(graph):
        weighted = [n for n in nodes if weight_of(n) is not None]
        if before is None or len(weighted) > MAX_WEIGHTS:
            found += [_layer(n) for n in weighted]
        else:
            found.append(_unit(before, nodes))
    return found


def _pieces(graph: fx.Graph) -> list[tuple[fx.Node | None, list[fx.Node]]]:
    """(input node, nodes) between cut points, weightless pieces merged into their neighbours.

    The input is None where several enter: before the first cut point of a network with several inputs.
    """
    nodes = [n for n in graph.nodes if n.op in ("placeholder", "call_function")]
    cuts = cut_points(graph)
    pieces: list[tuple[fx.Node | None, list[fx.Node]]] = []
    entry = nodes[: nodes.index(cuts[0]) + 1]
    if any(weight_of(n) is not None for n in entry):
        pieces.append((None, entry))
    pending: list[fx.Node] = []
    before = cuts[0]
    for start, stop in pairwise(cuts):
        inside = nodes[nodes.index(start) + 1 : nodes.index(stop) + 1]
        before = before if pending else start
        if any(weight_of(n) is not None for n in inside):
            pieces.append((before, pending + inside))
            pending = []
        elif pieces and not pending and all(kind_of(n) is Kind.ACTIVATION for n in inside):
            pieces[-1][1].extend(inside)
        else:
            pending += inside
    if pending and pieces:
        pieces[-1][1].extend(pending)
    return pieces


def _unit(before: fx.Node, nodes: list[fx.Node]) -> Unit:
    weights = [str(w.target) for n in nodes if (w := weight_of(n)) is not None]
    return Unit(
        _common_name(weights), before.name, nodes[-1].name, tuple(n.name for n in nodes), tuple(dict.fromkeys(weights))
    )


def _layer(node: fx.Node) -> Unit:
    nodes = [node]
    while len(nodes[-1].users) == 1 and kind_of(reader := next(iter(nodes[-1].users))) is Kind.ACTIVATION:
        nodes.append(reader)
    weight = weight_of(node)
    assert weight is not None
    source = next(n for n in node.all_input_nodes if n is not weight)
    name = str(weight.target)
    return Unit(name.removesuffix(".weight"), source.name, nodes[-1].name, tuple(n.name for n in nodes), (name,))


def _common_name(weights: list[str]) -> str:
    """layer1.0.conv1.weight and layer1.0.conv2.weight give layer1.0."""
    if len(set(weights)) == 1:
        return weights[0].removesuffix(".weight")
    split = [w.split(".") for w in weights]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or f"{weights[0].removesuffix('.weight')}…{weights[-1].removesuffix('.weight')}"


def whole_network(graph: fx.Graph) -> Unit:
    """A network with one input and one output as a unit."""
    inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
    nodes = tuple(n.name for n in graph.nodes if n.op == "call_function")
    (output,) = next(n for n in graph.nodes if n.op == "output").all_input_nodes
    weights = dict.fromkeys(name for unit in units(graph, "layer") for name in unit.weights)
    return Unit("network", inputs[0], output.name, nodes, tuple(weights))
