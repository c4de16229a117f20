"""What of a network is learned at once, and at which rates."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from calibquant.numerics.affine import QTensor
from calibquant.quantization.bias_units import start_learning_biases
from calibquant.quantization.learning import SoftRounding
from calibquant.quantization.model import QuantModel, parameter_tensors


@dataclass(frozen=True)
class Rates:
    """Adam's learning rates; what has rate 0 keeps its value.

    Args:
        rounding: of the rounding variables.
        weight_scale: of the weights' scales, each as the logarithm of its change.
        scale: of the activations' scales, as they are or, if `relative`, as the logarithm of their change.
        relative: see `scale`.
        zero_point: of the activations' zero points, in steps of the grid.
        bias: of the biases, in standard deviations of what the product gives in the float network.
    """

    rounding: float = 0.0
    weight_scale: float = 0.0
    scale: float = 0.0
    relative: bool = False
    zero_point: float = 0.0
    bias: float = 0.0


@dataclass(frozen=True)
class Learnables:
    """Parameters that are being learned.

    Args:
        roundings: of the weights.
        rounding_groups, other_groups: for an optimizer, each with its rate.
    """

    roundings: list[SoftRounding]
    rounding_groups: list[dict[str, Any]]
    other_groups: list[dict[str, Any]]


def start_learning(
    part: QuantModel, rates: Rates, inputs: Tensor, fixed: Collection[str] = (), decided: bool = False
) -> Learnables:
    """From now on a network's roundings, scales and biases are learned.

    Args:
        part: calibrated.
        rates: what is learned.
        inputs: of the float network, on its device, (N, ...): on these the unit of each bias is measured.
        fixed: names of weights that keep codes and scale.
        decided: whether roundings are always 0 or 1.
    """
    roundings: list[SoftRounding] = []
    first: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    if rates.rounding:
        weights = parameter_tensors(part.teacher)
        learned = [(n, q) for n, q in part.weight_quantizers.items() if n not in fixed]
        roundings = [quantizer.start_learning(weights[name], decided) for name, quantizer in learned]
        first.append({"params": [r.alpha for r in roundings], "lr": rates.rounding})
        if rates.weight_scale:
            others.append({"params": [r.learn_scale() for r in roundings], "lr": rates.weight_scale})
    stored = [q for q in part.activation_quantizers.values() if not q.dynamic]
    if rates.scale:
        others.append({"params": [q.start_learning(rates.relative) for q in stored], "lr": rates.scale})
    if rates.zero_point:
        others.append({"params": [q.start_learning_zero_point() for q in stored], "lr": rates.zero_point})
    if rates.bias:
        others.append({"params": start_learning_biases(part, inputs), "lr": rates.bias})
    return Learnables(roundings, [g for g in first if g["params"]], [g for g in others if g["params"]])


@dataclass(frozen=True)
class State:
    """What `start_learning` may change: of weights, of activations, of biases."""

    weights: dict[str, QTensor]
    ranges: dict[str, tuple[Tensor, Tensor]]
    biases: dict[str, Tensor | None]


def state_of(part: QuantModel) -> State:
    """As it is now, what is being learned included; to be put back by `restore_state` when nothing is learned."""
    return State(
        {name: q.current() for name, q in part.weight_quantizers.items()},
        {n: q.current() for n, q in part.activation_quantizers.items() if q.scale is not None},
        {name: delta.current() for name, delta in part.bias_deltas.items()},
    )


def restore_state(part: QuantModel, state: State) -> None:
    """Put back what `state_of` found."""
    for name, value in state.weights.items():
        part.weight_quantizers[name].set(value)
    for name, (scale, zero_point) in state.ranges.items():
        part.activation_quantizers[name].scale = scale
        part.activation_quantizers[name].zero_point = zero_point
    for name, delta in state.biases.items():
        part.bias_deltas[name].delta = delta
