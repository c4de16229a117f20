"""How many products a network computes for an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from calibquant.graph.nodes import kind_of, op_of, weight_of
from calibquant.graph.ops import Kind


def macs(graph: fx.GraphModule, *inputs: Tensor) -> dict[str, int]:
    """Multiply-accumulates for one image of every op that has a weight and sums products, by node.

    A convolution or linear takes weight.numel() / outputs of them for each value it gives; a transposed convolution
    weight.numel() / inputs for each value it reads. Zero padding counts.

    Args:
        graph: a canonical graph.
        inputs: one tensor (N, ...) for each of its inputs.

    Example:
        >>> from torch import nn
        >>> from calibquant.graph import capture
        >>> net = capture(nn.Conv2d(3, 8, 3, padding=1, groups=1), torch.zeros(1, 3, 4, 4))
        >>> list(macs(net, torch.zeros(1, 3, 4, 4)).values())
        [3456]
    """
    counter = _Counter(graph)
    with torch.inference_mode():
        counter.run(*inputs)
    return counter.found


class _Counter(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value, op, weight = super().run_node(n), op_of(n), weight_of(n)
        if op is not None and weight is not None and kind_of(n) in (Kind.CONVOLUTION, Kind.MATMUL):
            parameter, source = self.env[weight], self.env[n.all_input_nodes[0]]
            passing = value if op.weight_axis == 0 else source
            self.found[n.name] = passing.numel() // len(value) * parameter[0].numel()
        return value
