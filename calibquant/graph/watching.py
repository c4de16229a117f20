"""Looking at values inside a network while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, fx, nn

Visit = Callable[[str, Tensor], None]


class Watched(nn.Module):
    """A network that shows the values of some of its nodes; it computes what it does without.

    Args:
        network: a graph.
        names: of the nodes.
        visit: called with a node's name and its value, at each of its calls, in execution order.

    Example:
        >>> import torch
        >>> from calibquant.graph import capture
        >>> net, shapes = capture(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.zeros(1, 1, 4, 4)), {}
        >>> _ = Watched(net, ["_1"], lambda name, value: shapes.update({name: value.shape}))(torch.zeros(3, 1, 4, 4))
        >>> shapes
        {'_1': torch.Size([3, 2, 4, 4])}
    """

    def __init__(self, network: fx.GraphModule, names: Collection[str], visit: Visit) -> None:
        super().__init__()
        self.network, self.interpreter = network, _Interpreter(network, frozenset(names), visit)

    def forward(self, *inputs: Tensor) -> Any:
        return self.interpreter.run(*inputs)


class _Interpreter(fx.Interpreter):
    def __init__(self, network: fx.GraphModule, names: frozenset[str], visit: Visit) -> None:
        super().__init__(network)
        self.names, self.visit = names, visit
        self.extra_traceback = False  # an error stays one line

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.visit(n.name, value)
        return value
