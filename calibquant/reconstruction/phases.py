"""Methods as phases: what is learned at once, unit by unit through the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from calibquant.recipe import ReconstructRecipe


@dataclass(frozen=True)
class Phase:
    """One pass through the units of a network.

    Args:
        name: for reports.
        iterations: steps a unit.
        roundings: whether the weights' roundings are learned.
        scales: whether the activations' scales are learned. Without, the activation quantizers of the whole network
            are off in this phase.
        drop: share of the values that pass unquantized while learning.
        power: exponent of the feature loss.
        float_inputs: units are learned on the float network's inputs.
    """

    name: Literal["roundings", "scales", "both"]
    iterations: int
    roundings: bool = True
    scales: bool = False
    drop: float = 0.0
    power: float = 2.0
    float_inputs: bool = False


def phases(recipe: ReconstructRecipe) -> list[Phase]:
    """The phases of a method; none without one.

    `adaround` (Nagel et al., ICML 2020) learns roundings; `brecq` (Li et al., ICLR 2021) does, then scales;
    `qdrop` (Wei et al., ICLR 2022) learns both at once.
    """
    if recipe.method == "none":
        return []
    roundings = Phase("roundings", recipe.iterations)
    if recipe.method == "adaround":
        return [roundings]
    if recipe.method == "qdrop":
        return [Phase("both", recipe.iterations, scales=True, drop=recipe.drop)]
    steps = recipe.scale_iterations or max(1, recipe.iterations // 4)
    scales = Phase(
        "scales", steps, False, True, power=recipe.scale_power, float_inputs=recipe.scale_inputs == "float"
    )  # fmt: skip
    return [roundings, scales]


def granularity(recipe: ReconstructRecipe) -> Literal["layer", "block"]:
    """What a unit of the method is."""
    return "layer" if recipe.method == "adaround" else "block"
