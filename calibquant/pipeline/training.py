"""From a recipe to a trained float network in a run folder."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibquant import parallel
from calibquant.data import ImageSet, batches, check_labels
from calibquant.errors import ModelError, RecipeError
from calibquant.evaluation import Evaluation, evaluate
from calibquant.networks import check_values, output_words, owned_copy, short
from calibquant.parallel import fit_threads, resolve_device, set_threads, synchronized
from calibquant.pipeline.curves import curves_png
from calibquant.pipeline.folders import run_folder
from calibquant.pipeline.live import Live, as_path, check_weights_file, checked_live
from calibquant.pipeline.measuring import measure
from calibquant.pipeline.preparing import build, learned_preprocess, measured, open_set
from calibquant.pipeline.reporting import Reporter, Silent, begin, enough_memory, log, log_to, note, warn
from calibquant.pipeline.resuming import again, changes_of, continued_recipe, fields_of
from calibquant.pipeline.train_checkpoint import fingerprint, load_training, save_training
from calibquant.pipeline.writing import run_stem, versions
from calibquant.recipe import AugmentRecipe, Recipe, TrainRecipe, idle_fields, valid
from calibquant.runfolder import CHECKPOINT, TRAINED, TRAINING, RunFolder, final_path, interrupted_run, new_run, sha256
from calibquant.training import (
    Classification,
    EpochReport,
    Source,
    Training,
    begin_training,
    fit,
    hold_out,
    open_source,
    steps_of,
)  # fmt: skip
from calibquant.zoo import save_weights

STEPS = 4


@dataclass(frozen=True)
class TrainedRun:
    """A finished training.

    Args:
        folder: the run folder.
        network: the trained network, in eval mode on the recipe's device.
        metrics: the content of metrics.json.
        evaluation: what the network did on the evaluation images.
    """

    folder: Path
    network: nn.Module
    metrics: dict[str, Any]
    evaluation: Evaluation


@dataclass(frozen=True, eq=False)
class Job:
    """What a training works on: the start, images to learn from, images held out, images of the last measurement."""

    training: Training
    source: Source
    held: ImageSet | None
    evaluation: ImageSet
    images: str  # fingerprint


def train(
    recipe: Recipe | dict[str, Any],
    network: nn.Module | None = None,
    images: ImageSet | None = None,
    evaluation: ImageSet | None = None,
    reporter: Reporter | None = None,
) -> TrainedRun:
    """Train a float network and leave a run folder with its weights.

    Args:
        recipe: a Recipe, or its fields as a nested dictionary; the section `train` is required.
        network: a live module to begin with, which is not changed; otherwise the recipe's `model` is built.
        images: labelled, preprocessed; otherwise the recipe's `data.calibration` is opened.
        evaluation: images that the end is measured on; otherwise the recipe's. With live images and no evaluation
            images it is measured on the images that it learned from, and metrics.json says so.
        reporter: hears of steps and progress.

    Raises:
        CalibQuantError: something about the recipe, network or images, or the loss diverges.

    Example:
        >>> import calibquant, torch
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> bright = calibquant.TensorImages(torch.arange(16.0).view(16, 1, 1, 1).expand(-1, 3, 2, 2) / 8 - 1,
        ...                                  [0] * 8 + [1] * 8)
        >>> run = calibquant.train({"train": {"epochs": 30, "batch_size": 8}}, net, bright)
        >>> run.metrics["float"]["top1"]
        1.0
    """
    recipe, live = valid(recipe), checked_live(network, images, evaluation)
    settings(recipe)
    stem = run_stem(recipe, live[0], "train")
    with run_folder(lambda: new_run(recipe.runs, stem, TRAINING, again(recipe))) as folder:
        return _run(folder, recipe, live, reporter or Silent())


def resume_training(
    run: Path,
    network: nn.Module | None = None,
    images: ImageSet | None = None,
    evaluation: ImageSet | None = None,
    reporter: Reporter | None = None,
    overrides: list[str] | None = None,
    trust_code: bool = False,
) -> TrainedRun:
    """Continue a training that was interrupted; it ends with the same bytes of weights as if it had not been.

    Args:
        run: the folder that the run would have left.
        overrides: dotted recipe keys; only those of `resuming.MAY_CHANGE` may have another value than before, e.g. a
            lower train.lr after a loss that diverged.
        network, images, evaluation, reporter: as `train` got them.
        trust_code: whether code that the run's recipe names may be run, to make the network.

    Raises:
        CalibQuantError: there is no such run, its checkpoint is damaged, another process works at it, or recipe,
            network or images have changed.
    """
    run, live = as_path(run, "run"), checked_live(network, images, evaluation)
    flags = " --trust-code" if trust_code else ""
    with run_folder(lambda: interrupted_run(run, TRAINING, flags)) as folder:
        recipe = continued_recipe(folder, run, overrides, trust_code)
        return _run(folder, recipe, live, reporter or Silent())


def line_of(report: EpochReport) -> str:
    """An epoch in words."""
    held = "" if report.accuracy is None else f", held out {100 * report.accuracy:.2f}"
    return f"epoch {report.epoch}: loss {report.loss:.4f}, lr {report.lr:.2e}{held}, {report.seconds:.1f} s"


def length_of(settings: TrainRecipe) -> str:
    """How long a training is, in words."""
    return f"{settings.epochs} epochs" if settings.iterations is None else f"{settings.iterations} steps"


def check_shares(settings: TrainRecipe, section: str) -> None:
    """Check that each process gets as many images of a step as the others.

    Raises:
        RecipeError: it does not.
    """
    if settings.batch_size % (parallel.world() * settings.accumulate):
        problem = f"{settings.batch_size} images make no equal shares for {parallel.world()} processes"
        raise RecipeError(f"recipe, {section}.batch_size", problem, "use a multiple of processes * accumulate")


def settings(recipe: Recipe) -> TrainRecipe:
    """The recipe's section `train`.

    Raises:
        RecipeError: there is none.
    """
    if recipe.train is None:
        raise RecipeError(
            "recipe, train", "this section is required", "add train: {epochs: …, lr: …}, or train.epochs=…"
        )
    return recipe.train


def train_network(job: Job, recipe: Recipe, reporter: Reporter, folder: RunFolder | None = None) -> nn.Module:
    """The training itself, with a checkpoint in the folder after each epoch, and a line in the log."""

    def validate(network: nn.Module) -> float:
        assert job.held is not None
        result = evaluate(network, job.held, recipe.evaluation.batch_size, device=job.source.device)
        return result.scores.top1 or 0.0

    def save(training: Training) -> None:
        log.info("%s", line_of(training.reports[-1]))
        if folder is not None:
            save_training(folder, training, job.images, fields_of(recipe))

    try:
        return fit(
            job.training,
            job.source,
            settings(recipe),
            Classification(synchronized(job.training.network), settings(recipe)),
            None if job.held is None else validate,
            save,
            reporter.progress,
        )
    except ModelError as error:
        if folder is None or not (folder.path / CHECKPOINT).is_file():
            raise
        command = f"calibquant train --resume {final_path(folder.path)}{again(recipe)} train.lr=…"
        mend = f"{error.mend}, or go on from the last checkpoint: {command}"
        raise ModelError(error.where, error.problem, mend) from error


def open_training(recipe: Recipe, live: Live = (None, None, None)) -> Job:
    """The network before its first step, and all images.

    Raises:
        CalibQuantError: something about the recipe, network or images.
    """
    network, images, evaluation = live
    device = resolve_device(recipe.device)
    if network is None:
        network = build(recipe)
    else:
        check_weights_file(recipe)
    network = owned_copy(network)
    check_values(network)
    if images is None:
        images = open_set(recipe, "calibration")
        evaluation = evaluation if evaluation is not None else open_set(recipe, "evaluation")
    learned, held = hold_out(images, settings(recipe).holdout, recipe.seed)
    augment = recipe.data.augment or AugmentRecipe()
    source = open_source(learned, augment, learned_preprocess(recipe), settings(recipe).batch_size, recipe.seed, device)
    check_shares(settings(recipe), "train")
    training = begin_training(network, settings(recipe), steps_of(settings(recipe), source.steps), device)
    evaluation = images if evaluation is None else evaluation
    sample = next(source.epoch(0))[0][:2]
    check_labels(images, _classes(training.network, sample))
    at_the_end = measured(evaluation, recipe.evaluation.count)
    size = next(batches(at_the_end, 1)).images.shape  # all that is known of these images before the end
    check_labels(at_the_end, _classes(training.network, torch.zeros(size, device=device)))
    log.info("threads: %d", fit_threads(recipe.threads, training.network, sample))
    return Job(training, source, held, evaluation, fingerprint(learned))


def _classes(network: nn.Module, images: Tensor) -> int:
    """How many classes the network tells apart, by what it returns for two images.

    Raises:
        ModelError: it does not take these images, or returns no logits.
    """
    try:
        with torch.no_grad():
            logits = network.eval()(images)
    except (RuntimeError, ValueError) as error:
        shape = tuple(images.shape[1:])
        raise ModelError(
            "network", f"does not take images of shape {shape} ({short(error)})", "check data.preprocess"
        ) from None
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else output_words(logits)[0]
        raise ModelError("network output", f"is {found}, not (N, classes)", "give a network that returns class logits")
    return logits.shape[1]


@torch.inference_mode(False)
@torch.enable_grad()
def _run(folder: RunFolder, recipe: Recipe, live: Live, reporter: Reporter) -> TrainedRun:
    seconds, started = dict[str, float](), time.perf_counter()
    set_threads(recipe.threads)

    def lap(name: str) -> None:
        nonlocal started
        seconds[name], started = time.perf_counter() - started, time.perf_counter()

    with log_to(folder):
        for field in idle_fields(recipe, "train"):
            warn(reporter, field)
        begin(reporter, 1, STEPS, "Open the network and the images")
        with enough_memory("train.batch_size"):
            job = open_training(recipe, live)
        if load_training(folder, job.training, job.images):
            note(reporter, f"going on after epoch {len(job.training.reports)}")
        folder.write("recipe.yaml", recipe.to_yaml())
        lap("open")
        held = "" if job.held is None else f", {len(job.held)} held out"
        begin(reporter, 2, STEPS, f"Train for {length_of(settings(recipe))} on {len(job.source.images)} images{held}")
        with enough_memory("train.batch_size"):
            network = train_network(job, recipe, reporter, folder)
        lap("train")
        begin(reporter, 3, STEPS, "Evaluate the trained network")
        with enough_memory("evaluation.batch_size"):
            result = measure(recipe, network, job.evaluation, job.source.device, reporter)
        lap("evaluate")
        begin(reporter, 4, STEPS, "Write the run folder")
        on = "training images" if live[1] is not None and live[2] is None else "evaluation images"
        metrics = run_metrics(recipe, job, result, on, seconds)
        machine = {"threads": torch.get_num_threads(), "device": str(job.source.device)}
        _write(folder, recipe, job, network, metrics, machine)
        folder.remove("checkpoint*")
    return TrainedRun(parallel.first(final_path(folder.path)), network, metrics, result)


def run_metrics(recipe: Recipe, job: Job, result: Evaluation, on: str, seconds: dict[str, float]) -> dict[str, Any]:
    """The content of metrics.json."""
    return {
        "model": recipe.model.name,
        "evaluated_on": on,
        "float": result.scores.to_dict(),
        "training_images": len(job.source.images),
        "held_out_images": 0 if job.held is None else len(job.held),
        "best_epoch": job.training.best_epoch,
        "epochs": [asdict(report) for report in job.training.reports],
        "seconds": seconds | {"train": sum(report.seconds for report in job.training.reports)},
    }


def _write(
    folder: RunFolder, recipe: Recipe, job: Job, network: nn.Module, metrics: dict[str, Any], machine: dict[str, Any]
) -> None:
    save_weights(network, folder.path / TRAINED)
    folder.write_json("metrics.json", metrics)
    folder.write("curves.png", curves_png(job.training.reports))
    weights = recipe.model.weights
    folder.seal({
        "kind": TRAINING,
        "weights": None if weights is None else {"path": str(weights), "sha256": sha256(weights.read_bytes())},
        "images": {"count": len(job.source.images), "sha256": job.images},
        **versions(),
        "seed": recipe.seed,
        **machine,
        **changes_of(folder),
    })  # fmt: skip
