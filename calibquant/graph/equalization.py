"""Cross-layer equalization: channels' weight ranges moved between two layers, so that one scale fits them all.

Source: Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019, section 4.1. Here the network must stay the same function, which the paper gives up where it
replaces ReLU6 by ReLU and where it absorbs biases: what calibration images show bounds both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from calibquant.graph.capture import TOLERANCE, relative_difference
from calibquant.graph.channels import channel_axis
from calibquant.graph.expectations import Normal, normal_of, set_normal
from calibquant.graph.folding import with_biases
from calibquant.graph.lowering import build
from calibquant.graph.nodes import op_of, weight_of
from calibquant.graph.pairs import Pair, find_pairs
from calibquant.graph.watching import Watched

MARGIN = 1.25  # a limit counts as never reached if the largest value seen, times this, stays below it
DEVIATIONS = 4.0  # and the BatchNorm's mean so many standard deviations up does too
ABSORBED = 3.0  # standard deviations below the mean from where a bias is absorbed, as in the paper
SETTLED, SWEEPS = 1e-4, 200  # the iteration ends when no factor differs from 1 by more, or after so many sweeps


@dataclass(frozen=True)
class ChannelRange:
    """The smallest and the largest value of each channel of a node over the images; float64, (C,)."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class PairReport:
    """What equalization did to a pair.

    Args:
        producer, consumer: the layers' nodes.
        channels: between them.
        scaled: channels whose scale was changed by more than 1 %.
        held: channels that a limit such as ReLU6's keeps as they are.
        absorbed: channels of whose bias a part went into the consumer's.
        producer_spread, consumer_spread: the largest channel's max|w| over the median channel's, before and after: of
            the producer's output channels, and of the consumer's input channels.
    """

    producer: str
    consumer: str
    channels: int
    scaled: int
    held: int
    absorbed: int
    producer_spread: tuple[float, float]
    consumer_spread: tuple[float, float]


@dataclass(frozen=True)
class Equalization:
    """An equalized network.

    Args:
        graph: the network, the same function; the given one where `undone` says so.
        pairs: what was done to each pair.
        difference: of the network's output on the images, relative to the largest.
        undone: the difference was beyond `capture.TOLERANCE`, so nothing was changed.
    """

    graph: fx.GraphModule
    pairs: tuple[PairReport, ...]
    difference: float
    undone: bool


def equalize(
    graph: fx.GraphModule,
    batches: Callable[[], Iterable[Tensor]],
    mount: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> Equalization:
    """Equalize a float network, and check on images that it computes the same.

    Args:
        graph: canonical, BatchNorm folded; it is not changed.
        batches: gives images, (N, C, H, W) float32, each time it is called.
        mount: puts the network where images reach it; a part of a larger network is mounted in that.

    Example:
        >>> from calibquant.graph import capture
        >>> net = capture(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)), torch.zeros(1, 1, 4, 4))
        >>> found = equalize(net, lambda: [torch.rand(8, 1, 4, 4)])
        >>> [(pair.producer, pair.consumer) for pair in found.pairs], found.undone
        ([('_0', '_2')], False)
    """
    pairs = find_pairs(graph)
    ranges = channel_ranges(graph, [pair.producer.name for pair in pairs], batches(), mount)
    edited, reports = rescale(graph, ranges)
    difference = _difference(mount(graph), mount(edited), batches())
    undone = difference > TOLERANCE
    return Equalization(graph if undone else edited, () if undone else reports, difference, undone)


def channel_ranges(
    graph: fx.GraphModule, nodes: Collection[str], batches: Iterable[Tensor], mount: Callable[[nn.Module], nn.Module]
) -> dict[str, ChannelRange]:
    """The range of each channel of some products' outputs over images."""
    found: dict[str, ChannelRange] = {}
    axes = {node.name: channel_axis(node) for node in graph.graph.nodes if node.name in nodes}

    def visit(name: str, value: Tensor) -> None:
        rows = value.movedim(axes[name], 0).flatten(1)
        low, high = (end.double().cpu() for end in torch.aminmax(rows, dim=1))
        old = found.get(name, ChannelRange(low, high))
        found[name] = ChannelRange(low.minimum(old.low), high.maximum(old.high))

    network = mount(Watched(graph, axes.keys(), visit))
    with torch.inference_mode():
        for batch in batches:
            network(batch)
    return found


def rescale(graph: fx.GraphModule, ranges: Mapping[str, ChannelRange]) -> tuple[fx.GraphModule, tuple[PairReport, ...]]:
    """The equalized graph, unchecked.

    For each channel i of a pair, s_i = sqrt(r1_i / r2_i), r1 and r2 being the largest |w| of the producer's output
    channel and the consumer's input channel: the producer's row and bias are divided by s_i, the consumer's column is
    multiplied. Pairs take turns until nothing moves. A channel's factors together stay at or above the largest value
    that it has over that which it may reach: the limit behind it where there is one, the largest value of the whole
    tensor where there is none. A channel that is near its limit keeps its scale.

    Args:
        graph: canonical, BatchNorm folded.
        ranges: of the producers' outputs; without a producer's, its channels are bounded by nothing, and those that a
            limit follows are left alone.
    """
    edited = with_biases(graph)
    tensors = {name: tensor.detach().double().cpu() for name, tensor in edited.named_buffers()}
    links = [_Link(pair, tensors, ranges.get(pair.producer.name)) for pair in find_pairs(edited)]
    for _ in range(SWEEPS):
        if max((link.step() for link in links), default=0.0) <= SETTLED:
            break
    reports = tuple(link.finish() for link in links)
    own = dict(edited.named_buffers())
    changed = {name for link in links for name in link.changed}
    kept = {n: tensors[n].to(own[n].device, own[n].dtype) if n in changed else own[n] for n in own}
    return build(kept, edited.graph), reports


class _Link:
    """A pair while its network is equalized; changes the tensors (float64) that it is given."""

    def __init__(self, pair: Pair, tensors: dict[str, Tensor], seen: ChannelRange | None) -> None:
        self.pair, self.tensors = pair, tensors
        (self.first, self.bias), (self.second, self.second_bias) = (_names(n) for n in (pair.producer, pair.consumer))
        self.changed = (self.first, self.bias, self.second, self.second_bias)
        self.total = torch.ones(len(tensors[self.first]), dtype=torch.float64)
        self.seen, self.absorbed = seen, 0
        self.least, self.free = self._bounds()
        self.before = (_spread(self._rows()), _spread(self._columns()))

    def step(self) -> float:
        """One turn; returns the largest |log s|."""
        rows, columns = self._rows(), self._columns()
        usable = (rows > 0) & (columns > 0) & self.free
        factor = torch.where(usable, (rows / columns.clamp(min=1e-300)).sqrt(), 1.0)
        factor = torch.where(usable, (self.total * factor).maximum(self.least) / self.total, 1.0)
        self.total = self.total * factor
        first, second = self.tensors[self.first], self.tensors[self.second]
        self.tensors[self.first] = first / factor.reshape(-1, *[1] * (first.dim() - 1))
        self.tensors[self.bias] = self.tensors[self.bias] / factor
        view = _by_input(second, self.pair.consumer, len(factor))
        self.tensors[self.second] = (view * factor.reshape(view.shape[0], 1, -1, 1)).reshape(second.shape)
        return float(factor.log().abs().max())

    def finish(self) -> PairReport:
        """Scale the producer's statistics as its output, absorb biases, and tell."""
        normal = normal_of(self.pair.producer)
        if normal is not None:
            mean, std = (value.double().cpu() / self.total for value in (normal.mean, normal.std))
            mean = mean - self._absorb(mean, std)
            set_normal(self.pair.producer, Normal(mean.float(), std.float()))
        after = (_spread(self._rows()), _spread(self._columns()))
        return PairReport(
            self.pair.producer.name, self.pair.consumer.name, len(self.total),
            int(((self.total - 1).abs() > 0.01).sum()), int((~self.free).sum()), self.absorbed,
            (self.before[0], after[0]), (self.before[1], after[1]),
        )  # fmt: skip

    def _absorb(self, mean: Tensor, std: Tensor) -> Tensor:
        """c = max(0, mean - 3 std), at most the smallest value seen: what a rectifier passes as it is (DFQ, 4.1.3)."""
        amount = torch.zeros_like(mean)
        if self.seen is None or not self.pair.rectified:
            return amount
        amount = torch.minimum(mean - ABSORBED * std, self.seen.low / self.total).clamp(min=0)
        amount = torch.where(self.free, amount, 0.0)
        view = _by_input(self.tensors[self.second], self.pair.consumer, len(amount))
        moved = (view.sum(3) * amount.reshape(view.shape[0], 1, -1)).sum(2).flatten()
        self.tensors[self.bias] = self.tensors[self.bias] - amount
        self.tensors[self.second_bias] = self.tensors[self.second_bias] + moved
        self.absorbed = int((amount > 0).sum())
        return amount

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """The least that each channel's factor may be, and whether it may be changed at all."""
        limited = math.isfinite(self.pair.limit)
        if self.seen is None:
            return torch.zeros_like(self.total), torch.full_like(self.total, not limited, dtype=torch.bool)
        if not limited:
            largest = self.seen.high.abs().maximum(self.seen.low.abs())
            return largest / largest.max().clamp(min=1e-300), torch.ones_like(self.total, dtype=torch.bool)
        reach, normal = MARGIN * self.seen.high.clamp(min=0), normal_of(self.pair.producer)
        if normal is not None:
            reach = reach.maximum(normal.mean.double().cpu() + DEVIATIONS * normal.std.double().cpu())
        return reach / self.pair.limit, reach < self.pair.limit

    def _rows(self) -> Tensor:
        return self.tensors[self.first].flatten(1).abs().amax(1)

    def _columns(self) -> Tensor:
        return _by_input(self.tensors[self.second], self.pair.consumer, len(self.total)).abs().amax((1, 3)).flatten()


def _names(node: fx.Node) -> tuple[str, str]:
    weight = weight_of(node)
    assert weight is not None
    bias: Any = node.args[op_of(node).bias]  # type: ignore[union-attr, index]
    return str(weight.target), str(bias.target)


def _by_input(weight: Tensor, node: fx.Node, channels: int) -> Tensor:
    """A weight as (groups, outputs a group, inputs a group, taps), `channels` input channels in all."""
    groups = int(node.kwargs.get("groups", 1))  # type: ignore[arg-type]
    return weight.reshape(groups, len(weight) // groups, channels // groups, -1)


def _spread(ranges: Tensor) -> float:
    used = ranges[ranges > 0]
    return float(used.max() / used.median()) if len(used) else 1.0


def _difference(want: nn.Module, got: nn.Module, batches: Iterable[Tensor]) -> float:
    with torch.inference_mode():
        return max((relative_difference(want(batch), got(batch)) for batch in batches), default=0.0)
