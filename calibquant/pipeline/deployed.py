"""The accuracy of an exported file itself, beside that of the float network and of the simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibquant.data import ImageSet
from calibquant.errors import CalibQuantError, ModelError, RecipeError
from calibquant.evaluation import Evaluation
from calibquant.evaluation.onnx_network import OnnxNetwork
from calibquant.export.file_names import FLOAT
from calibquant.export.session import open_session
from calibquant.parallel import set_threads
from calibquant.pipeline.by_class import NONE, ByClass
from calibquant.pipeline.measuring import RECIPE, measure, run_recipe, saved_network, warn_of_images
from calibquant.pipeline.preparing import build, mounted, open_set
from calibquant.pipeline.reporting import Reporter, Silent, begin, note
from calibquant.reading import read_file
from calibquant.recipe import Recipe, load_recipe
from calibquant.runfolder import RECEIPT, RunFolder, open_run


def evaluate_onnx(
    path: Path,
    recipe_file: Path | None = None,
    overrides: list[str] | None = None,
    reporter: Reporter | None = None,
    by_class: ByClass = NONE,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Measure an ONNX file through ONNX Runtime; one in a run folder also beside what it was made of.

    Args:
        path: the file.
        recipe_file: names the evaluation images; None takes recipe.yaml beside the file.
        overrides: dotted recipe keys, e.g. another `data.root`.
        reporter: hears of steps and progress.
        by_class: what else is asked for, of the file's own predictions.
        trust_code: whether code that the run's recipe names may be run, where the float network is needed.

    Returns:
        `file`, `recipe`, the scores under `deployed`, and under `skipped` the names of unreadable images that were left
        out; for a file in a run also `run`, `setting`, and the scores
        under `float` and `quantized`. `deployed` and `quantized` have the agreement with the float network, and
        `agreement_with_simulation` is how often the file and the simulation decide alike. And what `by_class` adds.

    Raises:
        CalibQuantError: file, recipe, run or images cannot be read.
    """
    reporter = reporter or Silent()
    beside = path.parent / RECIPE
    folder = open_run(path.parent) if (path.parent / RECEIPT).is_file() else None
    data = read_file(path, ModelError, "give the path of an ONNX file") if folder is None else folder.read(path.name)
    if recipe_file is None and not beside.is_file():
        raise RecipeError(beside, "there is no recipe beside the file", "name one with --recipe FILE")
    if folder is not None and recipe_file is None:
        recipe = run_recipe(folder, overrides, trust_code)
    else:
        recipe = load_recipe(recipe_file or beside, overrides, trust_code, own=recipe_file is not None)
    # Of a run its own recipe names the network, and the one that is given the images.
    own = recipe if folder is None or recipe_file is None else run_recipe(folder, None, trust_code)
    set_threads(recipe.threads)
    images = open_set(recipe, "evaluation")
    warn_of_images(recipe, images, reporter)
    by_class.check(images)
    deployed = _mounted(OnnxNetwork(open_session(str(path), data, recipe.threads)), own)
    result: dict[str, Any] = {"file": str(path), "recipe": str(recipe_file or beside)}
    if folder is None:
        begin(reporter, 1, 1, f"Evaluate {path.name} in ONNX Runtime")
        last = _measure(recipe, deployed, images, reporter)
        result["deployed"] = last.scores.to_dict()
    else:
        scores, last = _side_by_side(folder, path.name, (own, recipe), deployed, images, reporter)
        result |= scores
    return result | by_class.of(last, images) | {"skipped": sorted(images.skipped)}


def _side_by_side(
    folder: RunFolder,
    name: str,
    recipes: tuple[Recipe, Recipe],
    deployed: nn.Module,
    images: ImageSet,
    reporter: Reporter,
) -> tuple[dict[str, Any], Evaluation]:
    """The float network, the simulation and the file, and this last by itself; the first recipe names the network."""
    own, recipe = recipes
    begin(reporter, 1, 3, "Evaluate the float network")
    original = _float_network(folder, own, reporter)
    first = None if original is None else _measure(recipe, original, images, reporter)
    begin(reporter, 2, 3, f"Evaluate the {own.setting} simulation")
    simulated = _measure(recipe, saved_network(folder, own), images, reporter, first)
    begin(reporter, 3, 3, f"Evaluate {name} in ONNX Runtime")
    last = _measure(recipe, deployed, images, reporter, first)
    scores = {
        "run": str(folder.path),
        "setting": own.setting,
        "float": None if first is None else first.scores.to_dict(),
        "quantized": simulated.scores.to_dict(),
        "deployed": last.scores.to_dict(),
        "agreement_with_simulation": float((last.predictions == simulated.predictions).mean()),
    }
    return scores, last


def _float_network(folder: RunFolder, recipe: Recipe, reporter: Reporter) -> nn.Module | None:
    """The float network: float.onnx, which parity has compared, or the recipe's; None where neither is there."""
    try:
        if folder.has(FLOAT):
            return _mounted(
                OnnxNetwork(open_session(str(folder.path / FLOAT), folder.read(FLOAT), recipe.threads)), recipe
            )
        return build(recipe)
    except CalibQuantError as error:
        note(reporter, f"the float network is left out: {error}")
        return None


def _mounted(network: nn.Module, recipe: Recipe) -> nn.Module:
    """A part stands in the recipe's float network."""
    return network if recipe.model.submodule is None else mounted(build(recipe), recipe.model.submodule, network)


def _measure(
    recipe: Recipe, network: nn.Module, images: ImageSet, reporter: Reporter, reference: Evaluation | None = None
) -> Evaluation:
    return measure(recipe, network, images, torch.device("cpu"), reporter, reference)
