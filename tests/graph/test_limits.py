"""Limits of functions that only limit, alone and in chains, with and without other readers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibquant.graph import capture
from calibquant.graph.limits import UNLIMITED, before_limits, limits_of

INF = math.inf


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        outputs = [
            F.relu(y), F.relu6(y), F.hardtanh(y), y.clamp(max=3.0), F.relu6(y).clamp(min=0.5, max=2.0),
            F.relu(y.clamp(-5.0, -1.0)), torch.tanh(y), F.max_pool2d(F.relu(y), 2),
        ]  # fmt: skip
        return torch.cat([v.mean((2, 3)) for v in outputs], 1)


def test_limits_and_what_they_limit() -> None:
    graph = capture(Net(), torch.randn(2, 1, 8, 8)).graph
    means = [n.args[0] for n in graph.nodes if n.op == "call_function" and n.target.__name__ == "mean"]
    found = [before_limits(n) for n in means]
    expected = [(0, INF), (0, 6), (-1, 1), (-INF, 3), (0.5, 2), (0, 0)]
    assert [limits for _, limits in found[:6]] == expected
    assert {source.target.__name__ for source, _ in found[:6]} == {"conv2d"}
    assert found[6:] == [(means[6], UNLIMITED), (means[7], UNLIMITED)]
    assert [limits_of(n) for n in means[4:]] == [(0.5, 2), (0, INF), None, None]
    assert limits_of(next(iter(graph.nodes))) is None
