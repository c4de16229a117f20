"""From a recipe to a run folder: the order of the stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from calibquant.data import ImageSet, manifest_csv
from calibquant.evaluation import Evaluation
from calibquant.parallel import set_threads
from calibquant.pipeline.checkpoint import load_checkpoint
from calibquant.pipeline.correcting import corrects
from calibquant.pipeline.measuring import run_recipe
from calibquant.pipeline.reporting import Reporter, Silent, log_to, note
from calibquant.pipeline.stages import (
    Live,
    Steps,
    calibrate,
    correct_all,
    evaluate_both,
    export,
    learn,
    learns,
    open_job,
    round_again,
    rounds,
    settle,
    step_names,
)  # fmt: skip
from calibquant.pipeline.writing import run_metrics, write_run
from calibquant.quantization import QuantModel
from calibquant.recipe import Recipe, make_recipe
from calibquant.runfolder import RunFolder, final_path, interrupted_run, new_run
from calibquant.zoo import regularizer_of


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: the run folder.
        model: the quantized network, on the recipe's device.
        metrics: the content of metrics.json.
        evaluation: what the quantized network did on the evaluation images.
    """

    folder: Path
    model: QuantModel
    metrics: dict[str, Any]
    evaluation: Evaluation


def quantize(
    recipe: Recipe | dict[str, Any],
    network: nn.Module | None = None,
    calibration: ImageSet | None = None,
    evaluation: ImageSet | None = None,
    reporter: Reporter | None = None,
) -> Run:
    """Quantize a network and leave a run folder.

    Args:
        recipe: a Recipe, or its fields as a nested dictionary.
        network: a live module; otherwise the recipe's `model` is built.
        calibration: images; otherwise the recipe's `data` is opened.
        evaluation: images with or without labels; otherwise the recipe's. With live calibration images and no
            evaluation images the networks are compared on the calibration images.
        reporter: hears of steps and progress.

    Raises:
        CalibQuantError: something about the recipe, network or images; the run leaves nothing behind.

    Example:
        >>> import calibquant, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...                           torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> images = calibquant.TensorImages(torch.rand(32, 3, 16, 16))
        >>> run = calibquant.quantize({"calibration": {"count": 32}}, net, images)
        >>> run.metrics["setting"]
        'W4A4'
    """
    recipe = with_network_defaults(recipe if isinstance(recipe, Recipe) else make_recipe(recipe))
    with new_run(recipe.runs, _stem(recipe, network)) as folder:
        folder.write("recipe.yaml", recipe.to_yaml())
        return _run(folder, recipe, (network, calibration, evaluation), reporter or Silent())


def with_network_defaults(recipe: Recipe) -> Recipe:
    """The recipe with the regularizer's weight that its network is known to need, where it says none."""
    if recipe.reconstruct.regularizer is not None:
        return recipe
    own = recipe.reconstruct.model_copy(update={"regularizer": regularizer_of(recipe.model.name)})
    return recipe.model_copy(update={"reconstruct": own})


def resume(
    run: Path,
    network: nn.Module | None = None,
    calibration: ImageSet | None = None,
    evaluation: ImageSet | None = None,
    reporter: Reporter | None = None,
) -> Run:
    """Go on with a run that was interrupted while it reconstructed; it ends as if it had not been.

    Args:
        run: the folder that the run would have left.
        network, calibration, evaluation, reporter: as `quantize` got them.

    Raises:
        CalibQuantError: there is no such run, its checkpoint is damaged, or network or images have changed.

    Example:
        >>> calibquant.pipeline.resume(Path("runs/cifar_resnet20-w2a2-001"))  # doctest: +SKIP
    """
    with interrupted_run(run) as folder:
        return _run(folder, run_recipe(folder), (network, calibration, evaluation), reporter or Silent())


def _run(folder: RunFolder, recipe: Recipe, live: Live, reporter: Reporter) -> Run:
    threads, steps = set_threads(recipe.threads), Steps(reporter, step_names(recipe))
    with log_to(folder):
        job = open_job(recipe, live, steps, folder)
        progress = load_checkpoint(folder, job.model, manifest_csv(job.prepared.manifest))
        if progress is None:
            progress = calibrate(job)
        else:
            steps.seconds.update(progress.seconds)
            layers = f"{len(progress.layers)} rounded layers and " if rounds(recipe) else ""
            note(reporter, f"going on after {layers}{len(progress.reports)} reconstructed units")
            job.model.to(job.device)
        if rounds(recipe) and not progress.reports:
            progress = round_again(job, folder, progress)
        if learns(recipe):
            progress = learn(job, folder, progress)
        if corrects(recipe):
            correct_all(job, folder)
        after = None
        if rounds(recipe) or learns(recipe) or corrects(recipe):
            with steps.time("accumulation_after"):
                after = settle(job)
        float_result, quantized = evaluate_both(job)
        files = export(job) if recipe.export.onnx else {}
        with steps.begin("write", "Write the run folder"):
            metrics = run_metrics(
                recipe, job.prepared, job.model, float_result, quantized, progress.layers, progress.reports,
                (progress.nearest, after), dict(steps.seconds),
            )  # fmt: skip
            metrics |= job.facts
            machine = {"threads": threads, "device": str(job.device)}
            write_run(folder, recipe, job.prepared, job.model, metrics, files, machine)
            folder.remove("checkpoint*")
    return Run(final_path(folder.path), job.model, metrics, quantized)


def _stem(recipe: Recipe, network: nn.Module | None) -> str:
    name = recipe.model.name if network is None or recipe.model.name else type(network).__name__.lower()
    name = (name or "network").replace("\\", "/").rpartition("/")[2]  # of path/to/file.py:function
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return f"{safe}-{recipe.setting.lower()}"
