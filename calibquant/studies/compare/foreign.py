"""A cell whose method is another tool's: its run folder holds recipe, manifest, metrics and receipt, but no network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from calibquant.data import manifest_csv
from calibquant.errors import RecipeError
from calibquant.evaluation import Evaluation
from calibquant.parallel import set_threads
from calibquant.pipeline import Prepared, Reporter, prepare
from calibquant.pipeline.measuring import measure
from calibquant.pipeline.writing import made_of
from calibquant.recipe import Recipe
from calibquant.runfolder import new_run
from calibquant.studies.external import METHODS, Converted

CPU = torch.device("cpu")


def run_foreign(recipe: Recipe, method: str, reporter: Reporter) -> Evaluation:
    """Quantize by another tool, on the CPU, and write what a comparison needs into a new run folder.

    Args:
        recipe: names network, images and calibration; nothing else of it counts.
        method: one of `METHODS`.
        reporter: hears of the progress.

    Raises:
        CalibQuantError: network or images cannot be opened, or the tool does not take the network.
    """
    threads, seconds = set_threads(recipe.threads), dict[str, float]()
    with new_run(recipe.runs, f"{recipe.model.name}-{method}") as folder:
        prepared, converted = _convert(recipe, method, seconds)
        begun = time.perf_counter()
        images = prepared.evaluation or prepared.images
        reference = measure(recipe, prepared.network, images, CPU, reporter)
        evaluation = measure(recipe, converted.network, images, CPU, reporter, reference)
        seconds["evaluate"] = round(time.perf_counter() - begun, 3)
        manifest = manifest_csv(prepared.manifest)
        folder.write("recipe.yaml", recipe.to_yaml())
        folder.write("manifest.csv", manifest)
        folder.write_json("metrics.json", _metrics(recipe, method, converted, (reference, evaluation), seconds))
        facts = made_of(recipe, manifest, len(prepared.images), ("torch", METHODS[method].package))
        folder.seal({"method": method} | facts | {"threads": threads, "device": "cpu"})
    return evaluation


def evaluate_foreign(recipe: Recipe, method: str, reporter: Reporter) -> Evaluation:
    """What the network of a foreign run does; it is made again, since the folder does not hold it."""
    set_threads(recipe.threads)
    prepared, converted = _convert(recipe, method, {})
    return measure(recipe, converted.network, prepared.evaluation or prepared.images, CPU, reporter)


def _convert(recipe: Recipe, method: str, seconds: dict[str, float]) -> tuple[Prepared, Converted]:
    """The float network and what the tool makes of it, on the images that set our own activation ranges."""
    if recipe.model.submodule is not None:
        raise RecipeError("model.submodule", f"{method} quantizes whole networks", "leave it out, or the method")
    begun = time.perf_counter()
    prepared = prepare(recipe)
    converted = METHODS[method].convert(prepared, _batches(recipe, prepared))
    seconds["quantize"] = round(time.perf_counter() - begun, 3)
    return prepared, converted


def _batches(recipe: Recipe, prepared: Prepared) -> Iterator[torch.Tensor]:
    settings = recipe.calibration
    return prepared.batches(settings.batch_size, slice(settings.range_count))


def _metrics(
    recipe: Recipe,
    method: str,
    converted: Converted,
    results: tuple[Evaluation, Evaluation],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What `summary` reads, under the names of a run's metrics.json."""
    return {
        "setting": recipe.setting,
        "method": method,
        "calibration_images": recipe.calibration.count,
        "float": results[0].scores.to_dict(),
        "quantized": results[1].scores.to_dict(),
        "size": {"weight_bits": converted.weight_bits, "file": converted.bytes},
        "units": [],
        "seconds": seconds,
    }
