"""Mixed precision: what each bit width takes of a budget, and the choice for every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from calibquant.errors import unknown
from calibquant.graph.nodes import activations_of, weight_of
from calibquant.numerics.budget import Array, Product, Uses, choose, improve
from calibquant.numerics.packing import packed_bytes
from calibquant.quantization.model import QuantModel, parameter_tensors
from calibquant.quantization.sensitivity import Models

FLOAT_BITS = 32  # of an activation that is not quantized, in bit operations


@dataclass(frozen=True, eq=False)
class Budget:
    """A budget and what the choices take of it.

    Args:
        kind: "average_bits", "weight_bytes" or "bops"; see `budget_of`.
        uses: in whole numbers.
        unit: how many of them are one of what the recipe's limit counts.
    """

    kind: str
    uses: Uses
    unit: float

    def of(self, choice: Sequence[int]) -> float:
        """What a choice takes, as the recipe counts it."""
        return self.uses.of(choice) / self.unit


def budget_of(kind: str, models: Models, names: Sequence[str], macs: Mapping[str, int]) -> Budget:
    """What every choice for the named tensors takes.

    average_bits: bits of the named weights, an average over their values. weight_bytes: packed codes of all weights,
    the others' too. bops: for an image, the sum over all products with a weight of MACs * bits of the weight * bits of
    the activation it meets (van Baalen et al., "Bayesian Bits", NeurIPS 2020).

    Args:
        kind: one of the three.
        models: for each bit width the network in which the named tensors have it.
        names: weights; activations too for bops.
        macs: multiply-accumulates by node, see `graph.macs`; for bops only.
    """
    first = next(iter(models.values()))
    if kind == "bops":
        return Budget(kind, _bit_operations(models, list(names), macs), 1.0)
    sizes = {name: tensor.numel() for name, tensor in parameter_tensors(first.teacher).items()}
    if kind == "average_bits":
        own = np.array([[sizes[n] * b for b in _bits_of(models, n)] for n in names], dtype=np.float64)
        return Budget(kind, Uses(own), float(sum(sizes[name] for name in names)))
    if kind != "weight_bytes":
        raise unknown("quant.mixed.budget", kind, ("average_bits", "weight_bytes", "bops"))
    own = np.array([[packed_bytes(sizes[n], b) for b in _bits_of(models, n)] for n in names], dtype=np.float64)
    others = {name: plan.grid.bits for name, plan in first.plan.weights.items() if name not in names}
    return Budget(kind, Uses(own, fixed=float(sum(packed_bytes(sizes[n], b) for n, b in others.items()))), 1.0)


def _bits_of(models: Models, weight: str) -> list[int]:
    """Bits of a weight for each choice; 8 may give it 7, see `numerics.reach`."""
    return [model.plan.weights[weight].grid.bits for model in models.values()]


def _bit_operations(models: Models, names: list[str], macs: Mapping[str, int]) -> Uses:
    number, model = {name: i for i, name in enumerate(names)}, next(iter(models.values()))
    choices = np.array(list(models), dtype=np.float64)
    own, fixed, products = np.zeros((len(names), len(models))), 0.0, []
    for node in model.teacher.graph.nodes:
        if node.name not in macs:
            continue
        weight, source = str(weight_of(node).target), model.quantizer_before(activations_of(node)[0])  # type: ignore[union-attr]
        entering = None if source is None else source.name
        of_weight = model.plan.weights[weight].grid.bits
        of_source = FLOAT_BITS if source is None else source.plan.bits
        count = float(macs[node.name])
        if weight in number and entering in number:  # of 8 bits, if the activation gets fewer
            products.append(Product(number[weight], number[entering], count * np.outer(choices, choices)))
        elif weight in number:
            own[number[weight]] += count * np.array(_bits_of(models, weight)) * of_source
        elif entering in number:
            own[number[entering]] += count * of_weight * choices
        else:
            fixed += count * of_weight * of_source
    return Uses(own, tuple(products), fixed)


def choose_bits(budget: Budget, limit: float, costs: Array, interactions: Array | None = None) -> list[int]:
    """The choice for every tensor, as numbers of the choices.

    Args:
        budget: what each takes.
        limit: of the budget, as the recipe counts it.
        costs: float64 (T, C): of each tensor alone; their least sum is found exactly.
        interactions: float64 (T * C, T * C): then that choice is improved on x' interactions x, see `numerics.budget`.

    Raises:
        QuantizationError: no choice is within the limit.
    """
    inside = limit * budget.unit * (1 + 1e-12)  # an average of exactly 3 bits may come out a hair above
    found = choose(costs, budget.uses, inside)
    return found if interactions is None else improve(interactions, budget.uses, inside, found)


def combined(models: Models, base: QuantModel, chosen: Mapping[str, int]) -> QuantModel:
    """A network with chosen bits, from weights that were rounded and ranges that were found already.

    Args:
        models: for each bit width the network that has it in the tensors to choose for.
        base: gives all else; it is not changed.
        chosen: bits by tensor name.
    """
    donors = {name: models[bits] for name, bits in chosen.items()}
    weights = {name: donors.get(name, base).plan.weights[name] for name in base.plan.weights}
    activations = {name: donors.get(name, base).plan.activations[name] for name in base.plan.activations}
    plan = replace(base.plan, weights=weights, activations=activations)
    model = QuantModel(base.teacher, plan, any(q.dynamic for q in base.activation_quantizers.values()))
    for name, weight in model.weight_quantizers.items():
        weight.set(donors.get(name, base).weight_quantizers[name].get())
    for name, activation in model.activation_quantizers.items():
        donor = donors.get(name, base).activation_quantizers[name]
        activation.scale, activation.zero_point, activation.levels = donor.scale, donor.zero_point, donor.levels
    return model
