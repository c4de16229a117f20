"""The stage that gives every weight (and activation) bits of its own, under a budget or up to a drop of agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calibquant.errors import QuantizationError, RecipeError
from calibquant.graph.macs import macs
from calibquant.numerics.budget import Array, quadratic_cost
from calibquant.pipeline.preparing import Prepared
from calibquant.pipeline.reporting import Reporter, note
from calibquant.pipeline.run_inputs import entering
from calibquant.quantization import QuantModel, calibrate_activations, make_plan
from calibquant.quantization.mixed import Budget, budget_of, choose_bits, combined
from calibquant.quantization.sensitivity import (
    Models,
    choice_models,
    free_tensors,
    harm_of,
    one_at_a_time,
    second_order,
)
from calibquant.recipe import MixedRecipe, Recipe

HELD_OUT = 512  # images at most on which the drop of agreement is judged
FEWEST_HELD_OUT = 32
STEPS = 64  # budgets between the least and the largest


@dataclass(frozen=True, eq=False)
class Mixture:
    """What was chosen, and by what.

    Args:
        bits: of every tensor that was chosen for, by name.
        report: the content of `mixed` in metrics.json.
    """

    bits: dict[str, int]
    report: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Trade:
    """What is known of the single tensors: enough to choose bits for any limit.

    Args:
        settings: of the recipe.
        models: for each bit width the network that has it in the named tensors.
        names: the tensors.
        budget: what each choice takes.
        costs: float64 (T, C): estimated harm of each tensor alone.
        interactions: float64 (T * C, T * C), or None where the sensitivity has none.
    """

    settings: MixedRecipe
    models: Models
    names: tuple[str, ...]
    budget: Budget
    costs: Array
    interactions: Array | None

    def choose(self, limit: float) -> list[int]:
        """Numbers of the choices for a limit as the recipe counts it."""
        return choose_bits(self.budget, limit, self.costs, self.interactions)

    def bits(self, choice: list[int]) -> dict[str, int]:
        """Bits by name."""
        return {name: self.settings.choices[c] for name, c in zip(self.names, choice, strict=True)}


def mix(recipe: Recipe, prepared: Prepared, device: torch.device, reporter: Reporter) -> Mixture:
    """Choose bits as `quant.mixed` of the recipe says.

    Raises:
        QuantizationError: nothing is free to choose for, or no choice keeps the limit.
        RecipeError: `max_drop` is asked for and too few calibration images are left to judge it.
    """
    settings = recipe.quant.mixed
    assert settings is not None
    trade = measure_trade(recipe, prepared, device, reporter)
    if settings.limit is not None:
        limit, search = settings.limit, None
    else:
        limit, search = _smallest(recipe, prepared, trade, device, reporter)
    choice = trade.choose(limit)
    report = {
        "budget": settings.budget, "limit": limit, "used": trade.budget.of(choice), "sensitivity": settings.sensitivity,
        "images": settings.images, "bits": trade.bits(choice), "harm": _harm(recipe, prepared, trade, choice, device),
        "costs": {
            name: dict(zip(map(str, settings.choices), row, strict=True))
            for name, row in zip(trade.names, trade.costs.tolist(), strict=True)
        },
        "search": search,
    }  # fmt: skip
    note(reporter, f"{settings.budget} {report['used']:.6g} of {limit:.6g}; {_counts(trade.bits(choice))}")
    return Mixture(trade.bits(choice), report)


def measure_trade(recipe: Recipe, prepared: Prepared, device: torch.device, reporter: Reporter) -> Trade:
    """Round every tensor to each of the choices and measure what that does."""
    settings, teacher = recipe.quant.mixed, prepared.teacher.to(device)
    assert settings is not None
    names = free_tensors(make_plan(teacher, recipe.quant), settings.tensors == "both")
    if not names:
        problem = "there is no tensor to choose bits for"
        raise QuantizationError("recipe, quant.mixed", problem, "check quant.boundary and quant.bits")
    models = choice_models(teacher, recipe.quant, names, settings.choices, reporter.progress)
    for number, model in enumerate(models.values()):
        if settings.tensors == "both" or (number == 0 and settings.max_drop is not None):
            _observe(recipe, prepared, model, device)
        model.to(device)
    counts = macs(teacher.to("cpu"), *next(entering(prepared, 1))) if settings.budget == "bops" else {}
    teacher.to(device)
    images = _images(recipe, prepared, slice(0, settings.images), device)
    count = min(settings.images, len(prepared.images))
    interactions, mount = None, _mount(prepared, device)
    if settings.sensitivity in ("gradient", "fisher"):
        costs = second_order(models, names, images, mount, recipe.seed, settings.sensitivity == "fisher")
    else:
        measured = one_at_a_time(models, names, images, mount, partial(_tell, reporter, count))
        harms = {"loss": measured.loss, "agreement": measured.disagreement, "logits": measured.logits}
        costs = {**harms, "interactions": measured.logits}[settings.sensitivity]
        interactions = measured.interactions if settings.sensitivity == "interactions" else None
    return Trade(settings, models, names, budget_of(settings.budget, models, names, counts), costs, interactions)


def _harm(
    recipe: Recipe, prepared: Prepared, trade: Trade, choice: list[int], device: torch.device
) -> dict[str, float | None]:
    """The chosen tensors together, all else float, on the images of the sensitivity: as estimated, and as measured.

    Harms of single tensors do not add exactly: how far `estimated` is from the measured one is told, not hidden.
    """
    model = combined(trade.models, next(iter(trade.models.values())), trade.bits(choice))
    for quantizer in model.quantizers:
        quantizer.enabled = quantizer.name in trade.names
    network, reference = _mount(prepared, device)(model), _mount(prepared, device)(model.teacher)
    sums, images = torch.zeros(3, dtype=torch.float64), 0
    with torch.inference_mode():
        for batch in _images(recipe, prepared, slice(0, trade.settings.images), device):
            harms = harm_of(reference(batch).cpu(), network(batch).cpu())
            sums += torch.stack([harm.sum() for harm in harms])
            images += len(batch)
    joint, (logits, loss, changed) = trade.interactions, (sums / images).tolist()
    return {
        "estimated": float(sum(row[c] for row, c in zip(trade.costs, choice, strict=True))),
        "with_interactions": None if joint is None else quadratic_cost(joint, choice, trade.costs.shape[1]),
        "logits": logits, "loss": loss, "agreement": 1 - changed,
    }  # fmt: skip


def _smallest(
    recipe: Recipe, prepared: Prepared, trade: Trade, device: torch.device, reporter: Reporter
) -> tuple[float, dict[str, Any]]:
    """The least of evenly spaced limits whose network agrees often enough with the float one, by bisection.

    Judged on calibration images that the sensitivity has not seen, each candidate with nearest rounding and all its
    quantizers. Agreement is taken to grow with the budget; where it does not, a smaller network may have been missed.

    Returns:
        the limit, and `search` of the report: every candidate that was tried, and the number of images.
    """
    settings = trade.settings
    assert settings.max_drop is not None
    held = slice(settings.images, settings.images + HELD_OUT)
    count = len(range(len(prepared.images))[held])
    if count < FEWEST_HELD_OUT:
        problem = f"leaves {count} of {len(prepared.images)} calibration images to judge the drop on"
        raise RecipeError("recipe, quant.mixed.images", problem, f"leave {FEWEST_HELD_OUT} or more for max_drop")
    mount = _mount(prepared, device)
    base = next(iter(trade.models.values()))

    def classes(network: nn.Module) -> Tensor:
        mounted = mount(network)
        with torch.inference_mode():
            return torch.cat([mounted(x).argmax(1).cpu() for x in _images(recipe, prepared, held, device)])

    wanted, ends = classes(base.teacher), [trade.budget.of([c] * len(trade.names)) for c in _ends(settings.choices)]
    tried: list[dict[str, float]] = []

    def passes(step: int) -> bool:
        limit = ends[0] + (ends[1] - ends[0]) * step / STEPS
        choice = trade.choose(limit)
        found = classes(combined(trade.models, base, trade.bits(choice)))
        agreement = float((found == wanted).float().mean())
        tried.append({"limit": limit, "used": trade.budget.of(choice), "agreement": agreement})
        reporter.progress(len(tried), STEPS.bit_length() + 1)
        return agreement >= 1 - settings.max_drop  # type: ignore[operator]

    if not passes(STEPS):
        problem = (
            f"even the most bits of quant.mixed.choices agree in {tried[0]['agreement']:.4f} of {count} images only"
        )
        raise QuantizationError("recipe, quant.mixed.max_drop", problem, "allow a larger drop, or more bits elsewhere")
    low, high = -1, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    limit = ends[0] + (ends[1] - ends[0]) * high / STEPS
    return limit, {"max_drop": settings.max_drop, "images": count, "tried": tried}


def _ends(choices: tuple[int, ...]) -> tuple[int, int]:
    """Numbers of the fewest and the most bits."""
    return choices.index(min(choices)), choices.index(max(choices))


def _images(recipe: Recipe, prepared: Prepared, which: slice, device: torch.device) -> Iterator[Tensor]:
    return prepared.batches(recipe.calibration.batch_size, which, device)


def _mount(prepared: Prepared, device: torch.device) -> Callable[[nn.Module], nn.Module]:
    return lambda part: prepared.mount(part).to(device)


def _observe(recipe: Recipe, prepared: Prepared, model: QuantModel, device: torch.device) -> None:
    count = recipe.calibration.range_count or len(prepared.images)
    images = _images(recipe, prepared, slice(0, count), device)
    calibrate_activations(model, recipe.quant.activations, images, _mount(prepared, device))


def _tell(reporter: Reporter, total: int, done: int) -> None:
    reporter.progress(done, total)


def _counts(bits: Mapping[str, int]) -> str:
    return ", ".join(f"{list(bits.values()).count(b)} tensors of {b} bits" for b in sorted(set(bits.values())))
