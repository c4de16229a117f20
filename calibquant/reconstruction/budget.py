"""As many iterations as fit a time."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from torch import Tensor

from calibquant.errors import RecipeError
from calibquant.quantization import QuantModel
from calibquant.recipe import ReconstructRecipe
from calibquant.reconstruction.engine import HELD_OUT
from calibquant.reconstruction.learnables import restore_state, state_of
from calibquant.reconstruction.network import reconstruct

SHORT, LONG = 1, 4  # iterations of the two trials; their difference is free of what does not repeat
LEAST = 1e-6  # seconds of an iteration, where two trials of a tiny network differ by less than the clock tells
SPARE = 0.95  # of the time is planned for, since machines are not always equally fast
WORTH = 1 / 4  # of the network's steps, below which it takes none: a few steps at its rates gain nothing


def within_time(
    model: QuantModel, images: Tensor, recipe: ReconstructRecipe, seed: int, device: torch.device | str = "cpu"
) -> ReconstructRecipe:
    """A recipe whose iterations take `recipe.time` seconds on this machine.

    In the recipe's proportions; where its iterations do not all fit, the units, which the network's stage builds on,
    come first, and have all of the time if less than WORTH of the network's steps would be left: in a large network a
    step of the whole costs as much as many of all units. Two short reconstructions of one batch are timed; the model is
    left as it was.

    Args:
        model: calibrated, on `device`.
        images: float32, (N, C, H, W), the calibration images.
        recipe: with a `time`.
        seed: of the trials.
        device: where units are learned.

    Raises:
        RecipeError: the time does not suffice for one iteration.
    """
    assert recipe.time is not None
    begin = time.perf_counter()
    some = images[: max(recipe.batch_size, recipe.network.batch_size)]
    (short, fixed), (long, _) = (_trial(model, some, recipe, n, seed, device) for n in (SHORT, LONG))
    steps = {phase: max(LEAST, (long[phase] - short[phase]) / (LONG - SHORT)) for phase in short}
    judged = len(images) / (HELD_OUT if recipe.never_worse else 1)  # a trial judges on all of its images
    collecting = fixed * len(images) / len(some)
    collecting += sum(max(0.0, short[phase] - SHORT * steps[phase]) for phase in short) * judged / len(some)
    taken = time.perf_counter() - begin
    asked = sum(seconds * _iterations(recipe, phase) for phase, seconds in steps.items())
    least = asked / max(1, min(_iterations(recipe, phase) for phase in steps))
    left = SPARE * recipe.time - taken - collecting
    if left < least:
        need = (least + taken + collecting) / SPARE
        raise RecipeError(
            "recipe, reconstruct.time", f"{recipe.time:.0f} s are not enough here", f"give at least {need:.0f}s"
        )
    last = steps.get("network", 0.0) * _iterations(recipe, "network")
    first = asked - last
    units = first * left / asked if left >= asked else min(first, left)
    if left - units < WORTH * last:
        units = left
    return _scaled(recipe, units / first, (left - units) / last if last else 0.0)


def _trial(
    model: QuantModel, images: Tensor, recipe: ReconstructRecipe, iterations: int, seed: int, device: torch.device | str
) -> tuple[dict[str, float], float]:
    """Seconds of learning in each phase, and seconds of the rest."""
    network = recipe.network.model_copy(update={"iterations": iterations if recipe.network.iterations else 0})
    few = {"iterations": iterations, "scale_iterations": iterations, "never_worse": False, "network": network}
    saved, spent = state_of(model), defaultdict[str, float](float)
    begin = time.perf_counter()
    try:
        for report in reconstruct(model, images, recipe.model_copy(update=few), seed, device):
            spent[report.phase] += report.seconds
    finally:
        restore_state(model, saved)
    return dict(spent), time.perf_counter() - begin - sum(spent.values())


def _iterations(recipe: ReconstructRecipe, phase: str) -> int:
    if phase == "network":
        return recipe.network.iterations
    return (recipe.scale_iterations or max(1, recipe.iterations // 4)) if phase == "scales" else recipe.iterations


def _scaled(recipe: ReconstructRecipe, units: float, network: float) -> ReconstructRecipe:
    """The recipe with its iterations times two factors: of the units, and of the network."""

    def of(count: int, factor: float) -> int:
        return max(1, int(factor * count)) if count and factor else 0

    whole = recipe.network.model_copy(update={"iterations": of(recipe.network.iterations, network)})
    scales = recipe.scale_iterations and of(recipe.scale_iterations, units)
    return recipe.model_copy(
        update={"iterations": of(recipe.iterations, units), "scale_iterations": scales, "network": whole, "time": None}
    )
