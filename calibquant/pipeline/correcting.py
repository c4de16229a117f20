"""What changes weights and biases without learning: equalization before quantization, corrections after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibquant.errors import RecipeError
from calibquant.graph import equalize, with_biases
from calibquant.pipeline.preparing import Prepared
from calibquant.pipeline.reporting import Reporter, log, note
from calibquant.quantization import Correction, QuantModel, correct_biases_analytically, correct_weights
from calibquant.recipe import Recipe
from calibquant.reconstruction import correct_biases
from calibquant.reconstruction.phases import phases


def corrects(recipe: Recipe) -> bool:
    """Whether the recipe asks for a correction of weights or biases."""
    return recipe.quant.weights.correction != "none" or recipe.quant.bias_correction != "none"


def check_corrections(recipe: Recipe, prepared: Prepared) -> None:
    """Check that the recipe's corrections can be made.

    Raises:
        RecipeError: learned roundings would undo a correction of weights, or the network has several inputs.
    """
    if recipe.quant.weights.correction != "none":
        others = (("reconstruction", recipe.reconstruct.method, "reconstruct.method=none"),
                  ("gram", recipe.quant.weights.rounding, "quant.weights.rounding=nearest"))  # fmt: skip
        for name, chosen, mend in others:
            if chosen not in ("none", "nearest"):
                problem = f"corrects rounding to nearest, which {name} replaces"
                raise RecipeError("recipe, quant.weights.correction", problem, f"use none there, or {mend}")
    if recipe.quant.bias_correction == "empirical" and prepared.entries != 1:
        problem = "empirical needs a network or part with one input"
        raise RecipeError("recipe, quant.bias_correction", problem, "use analytic or none")


def equalized(recipe: Recipe, prepared: Prepared, reporter: Reporter) -> tuple[Prepared, dict[str, Any]]:
    """The network with its layers equalized, and what that did, for metrics.json."""
    found = equalize(prepared.teacher, lambda: _images(recipe, prepared), prepared.mount)
    for pair in found.pairs:
        log.info(
            "%s -> %s: %d of %d channels scaled, %d held by a limit, %d biases absorbed; largest range over the median "
            "%.3g -> %.3g and %.3g -> %.3g",
            pair.producer, pair.consumer, pair.scaled, pair.channels, pair.held, pair.absorbed,
            *pair.producer_spread, *pair.consumer_spread,
        )  # fmt: skip
    if found.undone:
        note(reporter, f"equalization was undone: it changes the network by {found.difference:.1e}")
    else:
        scaled, channels = (sum(getattr(p, f) for p in found.pairs) for f in ("scaled", "channels"))
        note(reporter, f"{len(found.pairs)} pairs of layers equalized: {scaled} of {channels} channels scaled")
    told = {"undone": found.undone, "difference": found.difference, "pairs": [asdict(pair) for pair in found.pairs]}
    return replace(prepared, teacher=found.graph), told


def with_room(recipe: Recipe, prepared: Prepared) -> Prepared:
    """The network with a bias at every product, where the recipe corrects or learns biases."""
    learned = recipe.finetune is not None or any(phase.rates.bias for phase in phases(recipe.reconstruct))
    return replace(prepared, teacher=with_biases(prepared.teacher)) if learned or corrects(recipe) else prepared


def correct(
    recipe: Recipe, prepared: Prepared, model: QuantModel, device: torch.device, folder: Path, reporter: Reporter
) -> dict[str, list[dict[str, Any]]]:
    """Correct weights, then biases, as the recipe says.

    Returns:
        the entries of each correction by its field, for metrics.json.
    """
    quant, found = recipe.quant, dict[str, list[Correction]]()
    if quant.weights.correction != "none":
        images = (batch.to(device) for batch in _images(recipe, prepared))
        found["weights"] = correct_weights(
            model, quant.weights.correction, images, lambda part: prepared.mount(part).to(device)
        )
    if quant.bias_correction == "analytic":
        found["biases"] = correct_biases_analytically(model)
    elif quant.bias_correction == "empirical":
        entering = torch.cat(list(prepared.inputs(recipe.calibration.batch_size)))
        limit = recipe.reconstruct.cache_limit
        found["biases"] = correct_biases(model, entering, device, reporter.progress, limit, folder)
    for what, rows in found.items():
        _tell(what, rows, reporter)
    return {what: [asdict(row) for row in rows] for what, rows in found.items()}


def _tell(what: str, rows: list[Correction], reporter: Reporter) -> None:
    for row in rows:
        log.info("correction of %s, %s: %s", what, row.node, row.reason or f"bias changed by up to {row.largest:.3g}")
    left = sum(bool(row.reason) for row in rows)
    tail = f"; {left} left as they are, log.txt says why" if left else ""
    note(reporter, f"corrections of {what} at {len(rows) - left} layers{tail}")


def _images(recipe: Recipe, prepared: Prepared) -> Iterator[Tensor]:
    return prepared.batches(recipe.calibration.batch_size)
