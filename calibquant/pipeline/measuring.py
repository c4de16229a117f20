"""The same measurement for a float network, a fresh quantized one and a saved one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibquant.data import ImageSet, batches
from calibquant.errors import RecipeError, RunFolderError
from calibquant.evaluation import Evaluation, evaluate
from calibquant.export.artifact import load_artifact
from calibquant.networks import float_copy
from calibquant.parallel import fit_threads, resolve_device, set_threads
from calibquant.pipeline.by_class import NONE, ByClass
from calibquant.pipeline.preparing import build, mounted, open_set
from calibquant.pipeline.reporting import Reporter, Silent, begin
from calibquant.pipeline.selecting import warn_beyond
from calibquant.reading import MOST_RECIPE
from calibquant.recipe import Recipe, make_recipe, parse_tree
from calibquant.runfolder import QUANTIZATION, RECEIPT, TRAINED, TRAINING, RunFolder, kind_of, open_run, sha256

RECIPE = "recipe.yaml"


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


def warn_of_images(recipe: Recipe, images: ImageSet, reporter: Reporter) -> None:
    """Warn if the recipe's `evaluation.count` asks for more images than a set has."""
    if recipe.evaluation.count is not None:
        warn_beyond(reporter, "evaluation.count", recipe.evaluation.count, len(images), "evaluation")


def evaluate_run(
    path: Path,
    overrides: list[str],
    reporter: Reporter | None = None,
    by_class: ByClass = NONE,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Measure a saved run again, from its files, on the images its recipe names.

    Args:
        path: run folder.
        overrides: dotted recipe keys, e.g. another `data.root`.
        reporter: hears of steps and progress.
        by_class: what else is asked for.
        trust_code: whether code that the run's recipe names may be run, where the float network is needed.

    Returns:
        `run`, `setting`, the scores under `quantized`, and under `skipped` the names of unreadable images left out; for
        a training `run`, `model` and the scores under `float`. And what `by_class` adds.

    Raises:
        CalibQuantError: the run or the images cannot be read.
    """
    reporter = reporter or Silent()
    folder = open_run(path, (QUANTIZATION, TRAINING))
    if kind_of(folder) == TRAINING:
        weights = f"model.weights={folder.path_of(TRAINED)}"
        recipe = run_recipe(folder, [weights, *overrides], trust_code)
        return {"run": str(path)} | evaluate_float(recipe, reporter, by_class)
    recipe = run_recipe(folder, overrides, trust_code)
    begin(reporter, 1, 2, f"Load {path}")
    network, images = saved_network(folder, recipe), open_set(recipe, "evaluation")
    warn_of_images(recipe, images, reporter)
    by_class.check(images)
    _fit_threads(recipe, network, images)
    begin(reporter, 2, 2, f"Evaluate the {recipe.setting} network")
    result = measure(recipe, network, images, resolve_device(recipe.device), reporter)
    scores = {"run": str(path), "setting": recipe.setting, "quantized": result.scores.to_dict()}
    return scores | by_class.of(result, images) | {"skipped": sorted(images.skipped)}


def _fit_threads(recipe: Recipe, network: nn.Module, images: ImageSet) -> None:
    """Take as many threads as the run did; a network that fails does so again, and is told, when it is measured."""
    with suppress(RuntimeError):
        fit_threads(recipe.threads, network, next(batches(images, 1)).images)


def saved_network(folder: RunFolder, recipe: Recipe) -> nn.Module:
    """The quantized network of a run; a part is mounted in the recipe's float network.

    Raises:
        CalibQuantError: the run cannot be read, or the network around the part is not the run's.
    """
    set_threads(recipe.threads)
    network = load_artifact(folder)
    if recipe.model.submodule is None:
        return network
    host = float_copy(build(recipe))
    _check_weights(folder, recipe)
    return mounted(host, recipe.model.submodule, network)


def _check_weights(folder: RunFolder, recipe: Recipe) -> None:
    """Check that the network around a quantized part has the weights that the run was made with."""
    made_with, path = folder.read_json(RECEIPT).get("weights"), recipe.model.weights
    found = None if path is None else sha256(path.read_bytes())
    if found != (made_with.get("sha256") if isinstance(made_with, dict) else None):
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
    network, images = float_copy(build(recipe)), open_set(recipe, "evaluation")
    warn_of_images(recipe, images, reporter)
    by_class.check(images)
    _fit_threads(recipe, network, images)
    begin(reporter, 2, 2, "Evaluate the float network")
    result = measure(recipe, network, images, device, reporter)
    scores = {"model": recipe.model.name, "float": result.scores.to_dict()}
    return scores | by_class.of(result, images) | {"skipped": sorted(images.skipped)}


def run_recipe(folder: RunFolder, overrides: list[str] | None = None, trust_code: bool = False) -> Recipe:
    """The recipe of a run folder, with overrides. Its own `runs` does not count: the user says where files go.

    Args:
        folder: the run.
        overrides: dotted recipe keys.
        trust_code: whether code that the run's recipe names may be run; what an override names is the user's own.

    Raises:
        RecipeError: the recipe or an override is not valid, or one names a preset, which would change nothing.
    """
    if any(key.partition("=")[0].strip() == "preset" for key in overrides or []):
        problem = "sets what a recipe leaves open, and a run's recipe has every field written out"
        raise RecipeError("override, preset", problem, "override the fields themselves, e.g. finetune.weights=arq")
    where = folder.path / RECIPE
    return make_recipe(parse_tree(folder.read(RECIPE, MOST_RECIPE), where), overrides, str(where), True, trust_code)
