"""What a call does to channels and limits of values, from its row of the table and its attributes."""

from __future__ import annotations

from typing import Any

from torch import fx

from calibquant.graph.nodes import kind_of, op_of
from calibquant.graph.ops import Kind


def channel_axis(product: fx.Node) -> int:
    """Axis of a convolution's or matrix product's output that holds its output channels."""
    return 1 if kind_of(product) is Kind.CONVOLUTION else -1


def splits_channels(node: fx.Node) -> bool:
    """Whether an op of one tensor computes each channel (axis 1) of its output from the same channel of its input.

    `flatten` from axis 1 counts: a channel's values stay together, one channel after the other.
    """
    op = op_of(node)
    if op is None or op.kind not in (Kind.ACTIVATION, Kind.POOL, Kind.MOVE, Kind.RESAMPLE):
        return False
    if op.kind is Kind.ACTIVATION or not op.homogeneous:
        return op.kind is Kind.ACTIVATION
    attributes: dict[str, Any] = dict(node.kwargs)
    if op.kind is Kind.MOVE and "padding" in attributes:
        return len(attributes["padding"]) <= 4  # height and width at most
    return all(dim > 1 for dim in attributes.get("dims", ())) and attributes.get("start", 1) == 1


def ends_in_channels(node: fx.Node) -> bool:
    """Whether an op that `splits_channels` leaves the channels on the last axis: `flatten`, a mean over all others."""
    return "start" in node.kwargs or node.kwargs.get("keepdim") is False
