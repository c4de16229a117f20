"""Methods as phases: what is learned at once, unit by unit through the network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from calibquant.recipe import NetworkRecipe, ReconstructRecipe
from calibquant.recipe.section import checked
from calibquant.reconstruction.learnables import Rates


@dataclass(frozen=True)
class Phase:
    """One pass through the units of a network.

    Args:
        name: for reports.
        iterations: steps a unit.
        rates: what is learned, and how fast. Without a rate of the activations' scales, the activation quantizers of
            the whole network are off in this phase.
        drop: share of the values that pass unquantized while learning.
        power: exponent of the feature loss.
        float_inputs: units are learned on the float network's inputs.
    """

    name: Literal["roundings", "scales", "both", "network"]
    iterations: int
    rates: Rates
    drop: float = 0.0
    power: float = 2.0
    float_inputs: bool = False

    @property
    def roundings(self) -> bool:
        """Whether the weights' roundings are learned."""
        return self.rates.rounding > 0

    @property
    def scales(self) -> bool:
        """Whether the activations' scales are learned."""
        return self.rates.scale > 0


def phases(recipe: ReconstructRecipe) -> list[Phase]:
    """The phases of a method; none without one. The last may be that of the whole network.

    `adaround` (Nagel et al., ICML 2020) learns roundings; `brecq` (Li et al., ICLR 2021) does, then scales;
    `qdrop` (Wei et al., ICLR 2022) learns both at once.

    Raises:
        RecipeError: the recipe was copied with a value that is not valid.
    """
    if checked(recipe).method == "none":
        return []
    return [*_unit_phases(recipe), *([network_phase(recipe.network)] if recipe.network.iterations else [])]


def _unit_phases(recipe: ReconstructRecipe) -> list[Phase]:
    roundings = Rates(recipe.rounding_lr, weight_scale=recipe.weight_scale_lr, bias=recipe.bias_lr)
    scales = Rates(scale=recipe.scale_lr, relative=recipe.relative_scales, zero_point=recipe.zero_point_lr)
    if recipe.method == "qdrop":
        both = replace(roundings, scale=scales.scale, relative=scales.relative, zero_point=scales.zero_point)
        return [Phase("both", recipe.iterations, both, drop=recipe.drop)]
    first = Phase("roundings", recipe.iterations, roundings)
    if recipe.method == "adaround":
        return [first]
    steps = recipe.scale_iterations or max(1, recipe.iterations // 4)
    return [
        first,
        Phase("scales", steps, scales, power=recipe.scale_power, float_inputs=recipe.scale_inputs == "float"),
    ]


def network_phase(recipe: NetworkRecipe) -> Phase:
    """The phase in which everything is learned together."""
    rates = Rates(recipe.rounding_lr, recipe.weight_scale_lr, recipe.scale_lr, relative=True, bias=recipe.bias_lr)
    return Phase("network", recipe.iterations, rates)


def granularity(recipe: ReconstructRecipe) -> Literal["layer", "block"]:
    """What a unit of the method is."""
    return "layer" if recipe.method == "adaround" else "block"
