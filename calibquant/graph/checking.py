"""Checks whether a graph from a file can run: arguments against the signatures of ops, and shapes without values."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from functools import cache
from inspect import Signature, signature
from math import prod
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, fx

from calibquant.graph.nodes import kind_of, op_of
from calibquant.graph.ops import Kind, Op

MOST_VALUES = 1 << 26  # of one node, for a batch of two small images
SPATIAL = ("kernel", "stride", "padding", "dilation", "output_padding")  # one number for each dimension of an image
LEAST = -(2**62)
MOST_GROWTH = 4096  # times the values of the inputs, for large images


def check_arguments(op: Op, args: Sequence[Any], attributes: Mapping[str, Any]) -> None:
    """Check that arguments and attributes are those of an op, each of its type.

    Args:
        op: the op.
        args: nodes, lists of nodes, or None.
        attributes: values from JSON, lists as tuples.

    Raises:
        TypeError: one is missing, unknown or of another type.
    """
    hints, parameters = _signature(op)
    bound = parameters.bind(*args, **attributes)
    for name, value in bound.arguments.items():
        if not _fits(value, hints[name]):
            raise TypeError(f"'{name}' is {str(value)[:40]}")


def check_shapes(graph: fx.GraphModule, shapes: Sequence[Sequence[int]]) -> None:
    """Compute the shape of every node for a batch of two, without values; nodes get it as `meta["shape"]`.

    Args:
        graph: a canonical graph.
        shapes: of one image for each input.

    Raises:
        ValueError: a node cannot be computed for these shapes, or becomes too large.
    """
    entries = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if not _fits(shapes, Sequence[Sequence[int]]) or len(entries) != len(shapes):
        raise ValueError("its shapes of images are not those of its inputs")
    if any(size < 1 for shape in shapes for size in shape):
        raise ValueError("an image has no values")
    tensors, values = dict(graph.named_buffers()), dict[fx.Node, Tensor]()
    given = dict(zip(entries, shapes, strict=True))
    most = max(MOST_VALUES, MOST_GROWTH * sum(2 * prod(shape) for shape in shapes))
    with torch.no_grad():
        for node in graph.graph.nodes:
            if node.op == "output":
                continue
            try:
                value = _value(node, given, tensors, values)
            except Exception as error:  # shape rules of torch raise nearly anything
                reason = " ".join(str(error).split())[:160]
                raise ValueError(f"node '{node.name}' cannot be computed ({reason})") from None
            if value.numel() > most:
                raise ValueError(f"node '{node.name}' has {value.numel():,} values for two images")
            values[node] = value
            if node.op != "get_attr":
                node.meta["shape"] = tuple(value.shape)


def _value(
    node: fx.Node, given: Mapping[fx.Node, Sequence[int]], tensors: Mapping[str, Tensor], values: dict[fx.Node, Tensor]
) -> Tensor:
    """A tensor on the device `meta`, which has a shape and no values."""
    if node.op == "placeholder":
        indices = bool(node.users) and all(kind_of(user) is Kind.LOOKUP for user in node.users)
        return torch.empty((2, *given[node]), dtype=torch.int64 if indices else torch.float32, device="meta")
    if node.op == "get_attr":
        return tensors[str(node.target)].to("meta")
    op = op_of(node)
    assert op is not None
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    if op.kind in (Kind.CONVOLUTION, Kind.POOL):
        _check_lengths(node.kwargs, args[0].dim() - 2)
    return op.run(*args, **node.kwargs)


def _check_lengths(attributes: Mapping[str, Any], dimensions: int) -> None:
    """What torch's rules for shapes do not see: a convolution with a stride of three numbers for two dimensions."""
    for name in SPATIAL:
        numbers = attributes.get(name)
        if isinstance(numbers, tuple) and len(numbers) != dimensions:
            raise ValueError(f"'{name}' has {len(numbers)} numbers for {dimensions} dimensions")


@cache
def _signature(op: Op) -> tuple[dict[str, Any], Signature]:
    return get_type_hints(op.run), signature(op.run)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that an op's signature names."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is Sequence:
        return isinstance(value, tuple | list) and all(_fits(inner, get_args(hint)[0]) for inner in value)
    if hint is Tensor:
        return isinstance(value, fx.Node)
    if hint is float:
        return type(value) in (int, float)
    if hint is int:
        return type(value) is int and value > LEAST  # below, torch takes a number for a symbol
    return type(value) is (type(None) if hint is None else hint)
