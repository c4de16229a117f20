"""How quantization error grows through a network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from calibquant.graph import units
from calibquant.graph.subgraph import subgraph
from calibquant.quantization import QuantModel
from calibquant.reconstruction.network import quantized_input


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
            off += torch.tensor([float((q - f).double().square().sum()) for f, q in pairs])
            size += torch.tensor([float(f.double().square().sum()) for f, _ in pairs])
    errors = torch.where(size > 0, off / size.clamp(min=1e-300), torch.zeros_like(off)).sqrt()
    return dict(zip(outputs, errors.tolist(), strict=True))


def _several(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)
