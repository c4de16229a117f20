"""What a node of a canonical graph is: its op, its weight, the values that flow into it."""

from __future__ import annotations

from torch import fx

from calibquant.graph.ops import BY_FUNCTION, Kind, Op


def op_of(node: fx.Node) -> Op | None:
    """The table's row of a canonical node; None for inputs, parameters and the output."""
    return BY_FUNCTION[node.target] if node.op == "call_function" else None


def kind_of(node: fx.Node) -> Kind | None:
    """The kind of a canonical node; None for inputs, parameters and the output."""
    op = op_of(node)
    return op.kind if op else None


def weight_of(node: fx.Node) -> fx.Node | None:
    """The parameter node that a node takes its weight from, if it has one."""
    op = op_of(node)
    if op is None or op.weight is None:
        return None
    weight = node.args[op.weight]
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def activations_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values flow into a node, without its parameters; each once, however often the node reads it."""
    return [source for source in node.all_input_nodes if source.op != "get_attr"]


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The activations among a node's arguments in their order; one that is given twice is there twice."""
    found: list[fx.Node] = []
    fx.node.map_arg(node.args, lambda source: found.append(source))
    return [source for source in found if source.op != "get_attr"]
