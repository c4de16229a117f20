"""Features: what flows through a network for all calibration images at once, advanced piece by piece.

Each op runs once over the images, so collecting the inputs of all units costs one pass through the network, not one a
unit. Only what later ops still read is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

Piece = Callable[[Sequence[str], Sequence[str]], nn.Module]


class Features:
    """The live values of one network over a set of images.

    Args:
        graph: the canonical graph that says what reads what.
        piece: gives a module that computes some nodes of it, as `graph.subgraph` or `QuantModel.part` do.
        images: float32, (N, C, H, W): the values of the graph's input.
        batch_size: images in one forward pass.
        device: where pieces run; values are kept on the CPU.
    """

    def __init__(
        self, graph: fx.Graph, piece: Piece, images: Tensor, batch_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.graph, self.piece, self.batch_size, self.device = graph, piece, batch_size, device
        self.order = [n for n in graph.nodes if n.op != "get_attr"]
        self.position = {n.name: i for i, n in enumerate(self.order)}
        inputs = [n for n in self.order if n.op == "placeholder"]
        if len(inputs) != 1:
            raise ValueError("features need a network with one input")
        self.live: dict[str, Tensor] = {inputs[0].name: images}
        self.done = self.position[inputs[0].name] + 1

    def advance(self, until: str) -> None:
        """Compute everything that comes before the node `until`, and drop what is not read from there on."""
        stop = self.position[until]
        nodes = [n.name for n in self.order[self.done : stop]]
        later = [n for n in self.order[:stop] if any(self.position[u.name] >= stop for u in n.users)]
        fresh = [n.name for n in later if n.name in nodes]
        if fresh:
            values = self.run(nodes, fresh)
            self.live |= dict(zip(fresh, values, strict=True))
        self.done = max(self.done, stop)
        self.live = {n.name: self.live[n.name] for n in later}

    def run(self, nodes: Sequence[str], outputs: Sequence[str]) -> list[Tensor]:
        """What some nodes compute from the live values, for all images: one tensor (N, ...) for each output."""
        module = self.piece(nodes, outputs)
        entries = [n.name for n in _inputs(module)]
        results: list[Tensor] = []
        count = len(next(iter(self.live.values())))
        with torch.no_grad():
            for start in range(0, count, self.batch_size):
                part = slice(start, start + self.batch_size)
                values = module(*(self.live[name][part].to(self.device) for name in entries))
                values = values if isinstance(values, tuple) else (values,)
                if not results:
                    results = [torch.empty((count, *v.shape[1:]), dtype=v.dtype) for v in values]
                for result, value in zip(results, values, strict=True):
                    result[part] = value.cpu()
        return results


def _inputs(module: nn.Module) -> list[fx.Node]:
    owner: Any = getattr(module, "teacher", module)
    return [n for n in owner.graph.nodes if n.op == "placeholder"]
