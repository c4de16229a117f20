"""How quantization error grows through a network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from calibquant.graph import units
from calibquant.graph.subgraph import subgraph
from calibquant.quantization import QuantModel
from calibquant.reconstruction.network import quantized_input

MOST_SQUARED = 1 << 24  # values whose squares are taken at once


def feature_errors(
    model: QuantModel, batches: Iterable[Tensor], device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Relative error after each block: |quantized - float| / |float|, Euclidean norms over all values of all images.

    Each network runs on its own features, so an error contains what the units before it left.

    Args:
        model: calibrated, on `device`.
        batches: images, (N, C, H, W) float32.

    Returns:
        output node of each unit -> error, in execution order; 0 where the float features are all zero.
    """
    outputs = [unit.output for unit in units(model.teacher.graph)]
    nodes = [n.name for n in model.teacher.graph.nodes if n.op == "call_function"]
    reference, simulated = subgraph(model.teacher, nodes, outputs), model.part(nodes, outputs)
    off, size = torch.zeros(len(outputs), dtype=torch.float64), torch.zeros(len(outputs), dtype=torch.float64)
    with torch.no_grad():
        for images in batches:
            entering = quantized_input(model, images, device).to(device)
            want, got = reference(images.to(device)), simulated(entering)
            pairs = list(zip(_several(want), _several(got), strict=True))
            off += torch.tensor([_squares(q - f) for f, q in pairs])
            size += torch.tensor([_squares(f) for f, _ in pairs])
    errors = torch.where(size > 0, off / size.clamp(min=1e-300), torch.zeros_like(off)).sqrt()
    return dict(zip(outputs, errors.tolist(), strict=True))


def _squares(values: Tensor) -> float:
    """The sum of the squares in float64, of large features image by image: these copies are of twice the size."""
    parts = values.split(1) if values.numel() > MOST_SQUARED else (values,)
    return sum(float(part.double().square().sum()) for part in parts)


def _several(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)
