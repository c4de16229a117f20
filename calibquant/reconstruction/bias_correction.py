"""Empirical bias correction: the mean of every layer's output put back, in the order in which data passes the layers.

It needs the features of all images in the float and in the quantized network, as reconstruction does, and stands here
for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx

from calibquant.features import Features, FeatureStore
from calibquant.graph.channels import channel_axis
from calibquant.graph.subgraph import subgraph
from calibquant.quantization import Correction, QuantModel
from calibquant.reconstruction.network import BATCH, quantized_input


def correct_biases(
    model: QuantModel,
    images: Tensor,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    cache_limit: float = 4.0,
    folder: Path | None = None,
) -> list[Correction]:
    """Correct each product's bias on what the already corrected network feeds it.

    bias_c += mean over images and positions of (float output - quantized output) of channel c, before the activation
    quantizer. Source: Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization
    and Bias Correction", ICCV 2019, appendix D; means of the outputs as they are, before the activation function.

    Args:
        model: calibrated, on `device`; its `bias_deltas` receive the result. Products without a bias are left alone.
        images: float32, (N, C, H, W), what enters the network.
        device: where it is computed; features are kept on the CPU.
        progress: called with (products done, products in all).
        cache_limit: gigabytes of features in memory; beyond it they are mapped from disk.
        folder: where these files lie; none takes the system's temporary folder.

    Returns:
        one entry for each corrected product, in order.
    """
    store = FeatureStore(limit=cache_limit * 1e9, folder=folder)
    graph = model.teacher.graph
    entering = quantized_input(model, images, device)
    float_side = Features(graph, partial(subgraph, model.teacher), images, BATCH, device, store)
    quantized_side = Features(graph, model.part, entering, BATCH, device, store)
    products = [n for n in graph.nodes if n.name in model.bias_deltas]
    found = []
    for done, node in enumerate(products, start=1):
        for side in (float_side, quantized_side):
            side.advance(node.name)
        want = _channel_means(float_side, node)
        with _unrounded(model, node.name):
            got = _channel_means(quantized_side, node)
        change = (want - got).to(device)
        model.bias_deltas[node.name].add(change)
        found.append(Correction(node.name, float(change.abs().max())))
        if progress:
            progress(done, len(products))
    return found


def _channel_means(side: Features, node: fx.Node) -> Tensor:
    """Means over images and positions of each output channel, float64 (C,)."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for (values,) in side.stream([node.name], [node.name]):
        rows = values.movedim(channel_axis(node), 0).flatten(1)
        total, count = total + rows.double().sum(1).cpu(), count + rows.shape[1]
    return total / count


@contextmanager
def _unrounded(model: QuantModel, name: str) -> Iterator[None]:
    """Within the context the output of a node is not quantized."""
    quantizer = model.activation_quantizers.get(name)
    if quantizer is None:
        yield
        return
    before, quantizer.enabled = quantizer.enabled, False
    try:
        yield
    finally:
        quantizer.enabled = before
