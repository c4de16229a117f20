"""Where activations are quantized: the nodes whose values get a grid, in either placement."""

from __future__ import annotations

from torch import fx

from calibquant.graph.nodes import activations_of, kind_of, op_of, weight_of
from calibquant.graph.ops import COMPUTE, Kind

_PRODUCERS = {Kind.CONVOLUTION, Kind.MATMUL, Kind.ADD, Kind.MUL, Kind.CONCAT, Kind.NORM, Kind.FLOAT}
_INTEGER_MAKERS = {Kind.CONVOLUTION, Kind.MATMUL, Kind.ADD}  # kernels that round their result to a grid
_FRESH = {Kind.ACTIVATION, Kind.NORM, Kind.FLOAT}  # what they compute is quantized at their own output


def main_sites(graph: fx.Graph) -> list[str]:
    """Names of the nodes quantized in either placement, in execution order."""
    found = []
    absorbed: set[fx.Node] = set()
    image = _image_nodes(graph)
    for node in graph.nodes:
        if node in image:
            continue
        if kind_of(node) in _PRODUCERS or (kind_of(node) is Kind.ACTIVATION and node not in absorbed):
            site = node
            while len(site.users) == 1 and kind_of(reader := next(iter(site.users))) is Kind.ACTIVATION:
                site = reader
                absorbed.add(site)
            if _is_main(node, site):
                found.append(site.name)
    return list(dict.fromkeys(found))


def _image_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The inputs and what is made of them before the first weight: normalization, padding, resizing."""
    image: set[fx.Node] = set()
    for node in graph.nodes:
        sources = activations_of(node)
        if node.op == "placeholder" or (sources and weight_of(node) is None and all(s in image for s in sources)):
            image.add(node)
    return image


def _is_main(producer: fx.Node, site: fx.Node) -> bool:
    readers = {kind_of(r) for r in _readers(site)} - _FRESH - {None}
    if not readers or not _read_by_compute(site):
        return False
    if readers == {Kind.CONCAT}:
        return False
    return not (readers == {Kind.ADD} and site is producer and kind_of(site) is not Kind.CONCAT)


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a node's values, looking through ops that only move them."""
    found = []
    for user in node.users:
        op = op_of(user)
        found += _readers(user) if op and op.kind is Kind.MOVE else [user]
        if op and op.kind is Kind.POOL and op.keeps_grid:
            found += _readers(user)
    return found


def _read_by_compute(node: fx.Node) -> bool:
    """Whether any computing op other than a pool comes after a node."""
    pending, seen = [node], set()
    while pending:
        for user in pending.pop().users:
            kind = kind_of(user)
            if kind in COMPUTE and kind is not Kind.POOL:
                return True
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def integer_sites(graph: fx.Graph, main: set[str]) -> list[str]:
    """Names of the nodes that an integer runtime reads or makes and that are not quantized yet."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        op = op_of(node)
        if op is None or not op.integer:
            continue
        for source in activations_of(node):
            held = origin(source)
            if held.name in main or not _is_float_tensor(held):
                continue
            if op.kind is Kind.CONCAT and node.name in main and _only_concatenated(held, main):
                continue
            found[held.name] = None
    for node in graph.nodes:
        if kind_of(node) in _INTEGER_MAKERS and op_of(node).integer:  # type: ignore[union-attr]
            end = _end_of_result(node, main)
            if end is not None and end.name not in main:
                found[end.name] = None
    return list(found)


def _end_of_result(node: fx.Node, main: set[str]) -> fx.Node | None:
    """Where a kernel's result is to be rounded to a grid: at the node, or behind functions that only limit it.

    None where the network's output or a quantized concatenation takes it: one stays float, the other has its own grid.
    """
    while len(node.users) == 1:
        reader = next(iter(node.users))
        if reader.op == "output" or (kind_of(reader) is Kind.CONCAT and reader.name in main):
            return None
        if not op_of(reader).limits:  # type: ignore[union-attr]
            break
        node = reader
    return node


def origin(node: fx.Node) -> fx.Node:
    """The node whose grid a node's values lie on: itself, or what it moves values from."""
    op = op_of(node)
    while op is not None and op.keeps_grid:
        node = activations_of(node)[0]
        op = op_of(node)
    return node


def _only_concatenated(node: fx.Node, main: set[str]) -> bool:
    """Whether all readers are concatenations that are quantized themselves, so that their grid serves."""
    return all(kind_of(r) is Kind.CONCAT and r.name in main for r in _readers(node))


def _is_float_tensor(node: fx.Node) -> bool:
    """Integer indices of an embedding are no activations."""
    return not (node.op == "placeholder" and all(kind_of(u) is Kind.LOOKUP for u in node.users))
