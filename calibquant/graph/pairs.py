"""Pairs of layers between which a channel's scale may be moved without changing the network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from calibquant.graph.channels import channel_axis, ends_in_channels, splits_channels
from calibquant.graph.limits import limits_of
from calibquant.graph.nodes import activations_of, op_of, weight_of
from calibquant.graph.ops import Kind


@dataclass(frozen=True)
class Pair:
    """Two layers of which the second alone reads the first, through functions that let a channel's scale pass.

    Args:
        producer, consumer: the layers' nodes.
        limit: above which the function between them cuts values (6 for ReLU6); infinite without one.
        rectified: the only function between them cuts values at 0 from below, and the consumer pads nothing.
    """

    producer: fx.Node
    consumer: fx.Node
    limit: float
    rectified: bool


def find_pairs(graph: fx.GraphModule) -> list[Pair]:
    """The pairs of a canonical graph, in execution order.

    Layers are convolutions (not transposed), depthwise ones too, and linears whose weight and bias no other call uses.
    Between them may stand, each read once only: positively homogeneous functions (ReLU, leaky ReLU, PReLU), pools,
    resizing, padding with zeros, and `flatten`; and right behind the producer a limit from above, such as ReLU6's.
    """
    pairs = []
    for node in graph.graph.nodes:
        if _is_layer(node):
            pair = _pair_from(node)
            if pair is not None:
                pairs.append(pair)
    return pairs


def _is_layer(node: fx.Node) -> bool:
    """A product of one activation with a weight, and perhaps a bias, of its own."""
    op, weight = op_of(node), weight_of(node)
    if op is None or weight is None or op.bias is None or op.weight_axis != 0 or len(weight.users) != 1:
        return False
    bias = node.args[op.bias]
    own = bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr" and len(bias.users) == 1)
    return own and len(activations_of(node)) == 1


def _pair_from(producer: fx.Node) -> Pair | None:
    """Follow the only reader of each value to the next layer."""
    node, last, limit = producer, channel_axis(producer) == -1, math.inf
    between: list[fx.Node] = []
    while len(node.users) == 1:
        reader = next(iter(node.users))
        op = op_of(reader)
        if op is None:
            return None
        if _is_layer(reader):
            if last != (op.kind is Kind.MATMUL):
                return None
            return Pair(producer, reader, limit, _rectified(between) and not _pads(reader))
        limits = limits_of(reader)
        if not splits_channels(reader) or (last and op.kind is not Kind.ACTIVATION):
            return None
        if limits is not None and not op.homogeneous:
            if node is not producer or limits[0] not in (0, -math.inf) or limits[1] <= 0:
                return None
            limit = limits[1]
        elif not op.homogeneous:
            return None
        last = last or ends_in_channels(reader)
        between.append(reader)
        node = reader
    return None


def _rectified(between: list[fx.Node]) -> bool:
    limits = [limits_of(node) for node in between]
    return len(limits) == 1 and limits[0] is not None and limits[0][0] == 0


def _pads(node: fx.Node) -> bool:
    padding: Any = node.kwargs.get("padding", 0)
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
