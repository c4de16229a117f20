"""Biases that are learned in units of what their products vary by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibquant import parallel
from calibquant.graph.watching import Watched
from calibquant.quantization.model import QuantModel

SMALLEST_UNIT = 1e-6  # of a bias, in place of the spread of an output that does not vary


def start_learning_biases(model: QuantModel, inputs: Tensor) -> list[nn.Parameter]:
    """From now on a network's biases are learned, each in standard deviations of its product's output.

    Args:
        model: calibrated.
        inputs: of the float network, on its device, (N, ...): on these the deviations are measured.
    """
    spread: dict[str, tuple[int, float]] = {}

    def note(name: str, value: Tensor) -> None:
        spread[name] = (model.bias_of(name).numel(), max(float(value.std()), SMALLEST_UNIT))

    with torch.no_grad():
        Watched(model.teacher, [*model.bias_deltas], note)(inputs)
    alike = parallel.first(spread)  # each process may measure it on images of its own
    return [model.bias_deltas[name].start_learning(*found, inputs.device) for name, found in alike.items()]
