"""A piece of a canonical graph as a graph of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from calibquant.graph.lowering import build


def subgraph(graph: fx.GraphModule, nodes: Collection[str], outputs: Sequence[str]) -> fx.GraphModule:
    """The named nodes with their parameters; what flows in from outside becomes inputs.

    Args:
        graph: a canonical graph.
        nodes: names of the ops that the piece computes.
        outputs: names, among `nodes`, of what it returns: one tensor, or a tuple of several.

    Returns:
        a GraphModule that shares its parameters with `graph`; node names are kept, and inputs are named after the nodes
        whose values they take, in execution order.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from calibquant.graph import capture
        >>> net = capture(nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.Tanh()), torch.zeros(1, 3))
        >>> [n.name for n in subgraph(net, ["_1", "_2"], ["_2"]).graph.nodes]
        ['_0', '_1', '_2', 'output']
    """
    chosen = [n for n in graph.graph.nodes if n.name in set(nodes) and n.op == "call_function"]
    outside = {source for node in chosen for source in node.all_input_nodes} - set(chosen)
    piece = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node in outside and node.op != "get_attr":
            copies[node] = piece.create_node("placeholder", node.name, (), {}, name=node.name)
    for node in graph.graph.nodes:
        if node in outside and node.op == "get_attr":
            copies[node] = piece.node_copy(node)
    for node in chosen:
        copies[node] = piece.node_copy(node, lambda source: copies[source])
    by_name = {node.name: copy for node, copy in copies.items()}
    returned = tuple(by_name[name] for name in outputs)
    piece.output(returned[0] if len(returned) == 1 else returned)
    tensors = dict(graph.named_buffers())
    return build({str(n.target): tensors[str(n.target)] for n in piece.nodes if n.op == "get_attr"}, piece)
