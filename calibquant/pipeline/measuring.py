"""The same measurement for a float network, a fresh quantized one and a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibquant.data import ImageSet
from calibquant.errors import RecipeError, RunFolderError
from calibquant.evaluation import Evaluation, evaluate
from calibquant.export.artifact import load_artifact
from calibquant.parallel import resolve_device, set_threads
from calibquant.pipeline.by_class import NONE, ByClass
from calibquant.pipeline.preparing import build, mounted, open_set
from calibquant.pipeline.reporting import Reporter, Silent, begin
from calibquant.recipe import Recipe, make_recipe
from calibquant.recipe.loading import parse_tree
from calibquant.runfolder import QUANTIZATION, RECEIPT, TRAINED, TRAINING, RunFolder, kind_of, open_run, sha256


def measure(
    recipe: Recipe,
    network: nn.Module,
    images: ImageSet,
    device: torch.device,
    reporter: Reporter,
    reference: Evaluation | None = None,
) -> Evaluation:
    """Run a network that takes images over a set as the recipe says; agreement is with `reference`."""
    predictions = None if reference is None else reference.predictions
    settings = recipe.evaluation
    return evaluate(
        network.to(device), images, settings.batch_size, settings.count, predictions, reporter.progress, device
    )


def evaluate_run(
    path: Path, overrides: list[str], reporter: Reporter | None = None, by_class: ByClass = NONE
) -> dict[str, Any]:
    """Measure a saved run again, from its files, on the images its recipe names.

    Args:
        path: run folder.
        overrides: dotted recipe keys, e.g. another `data.root`.
        reporter: hears of steps and progress.
        by_class: what else is asked for.

    Returns:
        `run`, `setting`, the scores under `quantized`, and under `skipped` the names of unreadable images left out; for
        a training `run`, `model` and the scores under `float`. And what `by_class` adds.

    Raises:
        CalibQuantError: the run or the images cannot be read.
    """
    reporter = reporter or Silent()
    folder = open_run(path, (QUANTIZATION, TRAINING))
    if kind_of(folder) == TRAINING:
        weights = f"model.weights={folder.path / TRAINED}"
        return {"run": str(path)} | evaluate_float(run_recipe(folder, [weights, *overrides]), reporter, by_class)
    recipe = run_recipe(folder, overrides)
    begin(reporter, 1, 2, f"Load {path}")
    network, images = saved_network(folder, recipe), open_set(recipe, "evaluation")
    by_class.check(images)
    begin(reporter, 2, 2, f"Evaluate the {recipe.setting} network")
    result = measure(recipe, network, images, resolve_device(recipe.device), reporter)
    scores = {"run": str(path), "setting": recipe.setting, "quantized": result.scores.to_dict()}
    return scores | by_class.of(result, images) | {"skipped": sorted(images.skipped)}


def saved_network(folder: RunFolder, recipe: Recipe) -> nn.Module:
    """The quantized network of a run; a part is mounted in the recipe's float network.

    Raises:
        CalibQuantError: the run cannot be read, or the network around the part is not the run's.
    """
    set_threads(recipe.threads)
    network = load_artifact(folder)
    if recipe.model.submodule is None:
        return network
    host = build(recipe)
    _check_weights(folder, recipe)
    return mounted(host, recipe.model.submodule, network)


def _check_weights(folder: RunFolder, recipe: Recipe) -> None:
    """Check that the network around a quantized part has the weights that the run was made with."""
    made_with, path = folder.read_json(RECEIPT)["weights"], recipe.model.weights
    found = None if path is None else sha256(path.read_bytes())
    if found != (made_with and made_with["sha256"]):
        problem = "is not the file that the run was made with (its hash is not the receipt's)"
        raise RunFolderError(path or "model.weights", problem, "give that file with model.weights=…")


def evaluate_float(recipe: Recipe, reporter: Reporter | None = None, by_class: ByClass = NONE) -> dict[str, Any]:
    """Measure the recipe's float network.

    Returns:
        `model`, the scores under `float`, and under `skipped` the names of unreadable images that were left out; and
        what `by_class` adds.

    Raises:
        CalibQuantError: the network or the images cannot be opened.
    """
    reporter = reporter or Silent()
    set_threads(recipe.threads)
    device = resolve_device(recipe.device)
    begin(reporter, 1, 2, "Open the network and the images")
    network, images = build(recipe), open_set(recipe, "evaluation")
    by_class.check(images)
    begin(reporter, 2, 2, "Evaluate the float network")
    result = measure(recipe, network, images, device, reporter)
    scores = {"model": recipe.model.name, "float": result.scores.to_dict()}
    return scores | by_class.of(result, images) | {"skipped": sorted(images.skipped)}


def run_recipe(folder: RunFolder, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a run folder, with overrides.

    Raises:
        RecipeError: an override is not valid, or names a preset, which would change nothing.
    """
    if any(key.partition("=")[0].strip() == "preset" for key in overrides or []):
        problem = "sets what a recipe leaves open, and a run's recipe has every field written out"
        raise RecipeError("override, preset", problem, "override the fields themselves, e.g. finetune.weights=arq")
    path = folder.path / "recipe.yaml"
    return make_recipe(parse_tree(folder.read("recipe.yaml"), path), overrides, str(path))
