"""The canonical graph as JSON and back, from an allow-list of ops: rebuilding a network runs no user code."""

from __future__ import annotations

from collections.abc import Sequence
from keyword import iskeyword
from typing import Any

from torch import Tensor, fx

from calibquant.errors import RunFolderError
from calibquant.graph.checking import check_arguments, check_shapes
from calibquant.graph.lowering import build
from calibquant.graph.nodes import op_of
from calibquant.graph.ops import OPS


def to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes in execution order: name, op, inputs and attributes.

    An input is a node's name, a list of names (for cat), or None for an absent bias.

    Example:
        >>> from torch import nn
        >>> import torch
        >>> from calibquant.graph.capture import capture
        >>> to_json(capture(nn.ReLU(), torch.zeros(1, 3)).graph)[1]
        {'name': 'relu', 'op': 'relu', 'inputs': ['x'], 'attributes': {}}
    """
    rows: list[dict[str, Any]] = []
    for node in graph.nodes:
        op = op_of(node)
        row = {"name": node.name, "op": op.name if op else node.op}
        if node.op == "get_attr":
            row["parameter"] = str(node.target)
        elif node.op == "output":
            row["inputs"] = [_names(node.args[0])]
        elif op:
            row |= {"inputs": [_names(a) for a in node.args], "attributes": dict(node.kwargs)}
        rows.append(row)
    return rows


def from_json(
    rows: list[dict[str, Any]], tensors: dict[str, Tensor], shapes: Sequence[Sequence[int]] | None = None
) -> fx.GraphModule:
    """Rebuild a GraphModule; node names are kept.

    Args:
        rows: what `to_json` gave (after a trip through JSON).
        tensors: the parameters by name.
        shapes: of one image for each input, for which every node is checked; None where they are not known.

    Raises:
        RunFolderError: an op is not on the allow-list, a node or parameter it names is missing, a row is malformed, or
            a node cannot be computed for images of these shapes.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def inputs(value: Any) -> Any:
        return [inputs(v) for v in value] if isinstance(value, list) else None if value is None else nodes[value]

    for number, row in enumerate(rows):
        where = f"graph.json, node {number}"
        try:
            name, op = row["name"], row["op"]
            where = f"graph.json, node '{name}'"
            if not name.isidentifier() or name in nodes or iskeyword(name):
                raise ValueError("the name is not a new identifier")
            if op == "placeholder":
                nodes[name] = graph.create_node("placeholder", name, (), {}, name=name)
            elif op == "get_attr":
                parameter = row["parameter"]
                tensors[parameter]
                _check_parameter(parameter)
                nodes[name] = graph.create_node("get_attr", parameter, (), {}, name=name)
            elif op == "output":
                nodes[name] = graph.output(inputs(row["inputs"][0]))
            elif op in OPS:
                attributes = {k: tuple(v) if isinstance(v, list) else v for k, v in row["attributes"].items()}
                args = tuple(inputs(i) for i in row["inputs"])
                check_arguments(OPS[op], args, attributes)
                nodes[name] = graph.create_node("call_function", OPS[op].run, args, attributes, name=name)
            else:
                raise RunFolderError(where, f"the op '{op}' is not on the allow-list", "update calibquant")
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise RunFolderError(where, f"is damaged ({type(error).__name__}: {error})", "quantize again") from None
    if not any(n.op == "output" for n in graph.nodes):
        raise RunFolderError("graph.json", "has no output", "quantize again")
    rebuilt = build({str(n.target): tensors[str(n.target)] for n in graph.nodes if n.op == "get_attr"}, graph)
    if shapes is not None:
        try:
            check_shapes(rebuilt, shapes)
        except ValueError as error:
            raise RunFolderError("graph.json", str(error), "quantize again") from None
    return rebuilt


def input_shapes(graph: fx.Graph) -> list[list[int]] | None:
    """The shape of one image for each input of a graph that was captured or checked; None for other graphs."""
    shapes = [node.meta.get("shape") for node in graph.nodes if node.op == "placeholder"]
    return None if None in shapes else [list(shape[1:]) for shape in shapes]


def _check_parameter(name: str) -> None:
    """torch.fx writes names of nodes and parameters into the Python code that it runs: nothing may leave its string."""
    if not name.isprintable() or set(name) & set("\"'\\"):
        raise ValueError("the parameter's name is no name")


def _names(value: Any) -> Any:
    return [_names(v) for v in value] if isinstance(value, (list, tuple)) else value.name if value is not None else None
