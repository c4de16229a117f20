"""A quantized network that learns from its float network, seen at the outputs of its units as well as at its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calibquant.graph import units, whole_network
from calibquant.graph.subgraph import subgraph
from calibquant.numerics.distance import output_loss
from calibquant.quantization.model import QuantModel


class Student(nn.Module):
    """What a network with one input and one output gives at the ends of its units, last its output.

    Args:
        model: calibrated; its quantizers are shared.
        features: whether the units' outputs are of interest; else the network's alone.
    """

    def __init__(self, model: QuantModel, features: bool) -> None:
        super().__init__()
        whole = whole_network(model.teacher.graph)
        blocks = units(model.teacher.graph, "block") if features else []
        names = [*dict.fromkeys(u.output for u in blocks if u.output != whole.output), whole.output]
        self.body = model.part(whole.nodes, names)
        self.entry = model.activation_quantizers.get(whole.input)
        self._teacher = (subgraph(model.teacher, whole.nodes, names),)  # in a tuple: it is no part of the student

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The quantized network's values for images (N, ...)."""
        return _outputs(self.body, x if self.entry is None else self.entry(x))

    def wanted(self, x: Tensor) -> tuple[Tensor, ...]:
        """The float network's, without gradients."""
        with torch.no_grad():
            return _outputs(self._teacher[0], x)

    def sizes(self, x: Tensor) -> list[float]:
        """Mean squares of the float network's values, which errors are relative to."""
        return [float(value.float().square().mean()) for value in self.wanted(x)]


def distillation_loss(
    got: Sequence[Tensor], wanted: Sequence[Tensor], sizes: Sequence[float], features: float, temperature: float
) -> Tensor:
    """How far a student is from its float network: `output_loss`, and the mean relative squared error of its units.

    Args:
        got, wanted: values of both at the ends of the units, last their outputs.
        sizes: what the units' errors are divided by.
        features: weight of these errors.
        temperature: of the outputs' distance.
    """
    loss = output_loss(got[-1].float(), wanted[-1].float(), temperature)
    errors = [
        (a.float() - b.float()).square().mean() / max(size, 1e-12)
        for a, b, size in zip(got[:-1], wanted[:-1], sizes[:-1], strict=True)
    ]
    return loss + features * torch.stack(errors).mean() if errors else loss


def _outputs(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    values = module(x)
    return values if isinstance(values, tuple) else (values,)
