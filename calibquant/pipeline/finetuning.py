"""The stage of quantization-aware training: from a calibrated network to a trained one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from calibquant import parallel
from calibquant.data import ImageSet, check_labels
from calibquant.errors import ModelError, RunFolderError
from calibquant.evaluation import Evaluation, evaluate
from calibquant.export.artifact import DAMAGE, GRAPH, MODEL, artifact_tensors, plan_of, restore
from calibquant.metrics import mcnemar
from calibquant.pipeline.live import Live
from calibquant.pipeline.measuring import measure
from calibquant.pipeline.preparing import learned_preprocess, open_set
from calibquant.pipeline.reporting import log, note
from calibquant.pipeline.resuming import again, fields_of
from calibquant.pipeline.stages import Job
from calibquant.pipeline.train_checkpoint import fingerprint, load_training, save_training
from calibquant.pipeline.training import length_of, line_of
from calibquant.pipeline.writing import network_hash
from calibquant.quantization import QuantPlan
from calibquant.recipe import AugmentRecipe, FinetuneRecipe
from calibquant.reconstruction import correct_biases
from calibquant.runfolder import RECEIPT, RunFolder, final_path, open_run
from calibquant.training import (
    Distillation,
    Source,
    Training,
    begin_finetuning,
    check_training_images,
    finished,
    fit,
    hold_out,
    open_source,
)  # fmt: skip

STATE = "checkpoint-finetune.json"  # names the file of the state after the last complete epoch
START = "checkpoint-start.json"  # plan of the run that is trained further, for a run that goes on
CHANCE = 0.05  # McNemar's p-value below which the start is better than what training made of it
SOME = 64  # calibration images on which the size of values is measured, and training images that show divergence
GROWTH, RISE = (
    1.25,
    0.05,
)  # of a diverged training's own loss; at 8 bits a good one may end at 6 times the start's 0.001

Decisions = npt.NDArray[np.bool_]  # of each image whether it is right, (N,)


def adopt_plan(folder: RunFolder, start: Path) -> None:
    """Keep name and plan of a finished run in the folder of the one that goes on from it.

    Raises:
        RunFolderError: it is no complete run.
    """
    folder.write_json(START, {"run": str(start), "graph": open_run(start).read_json(GRAPH)})


def adopted_plan(folder: RunFolder) -> tuple[QuantPlan | None, str | None]:
    """The plan that `adopt_plan` kept, and the run's name; None for both in a run of its own.

    Raises:
        RunFolderError: what was kept is damaged.
    """
    if not (folder.path / START).is_file():
        return None, None
    kept = folder.read_json(START)
    try:
        return plan_of(kept["graph"]), str(kept["run"])
    except DAMAGE as error:
        raise RunFolderError(folder.path / START, f"is damaged ({error})", "begin the run again") from None


def adopt(job: Job, start: Path) -> None:
    """Give the network the codes, scales and biases of a finished run.

    Raises:
        RunFolderError: the run is damaged, or of another network.
    """
    run = open_run(start)
    try:
        own = {row["parameter"] for row in run.read_json(GRAPH)["nodes"] if row["op"] == "get_attr"}
    except DAMAGE as error:
        raise RunFolderError(start / GRAPH, f"is damaged ({error})", "name another run") from None
    if network_hash(job.model, own) != run.read_json(RECEIPT).get("network"):
        mend = "name the network and the weights that it was made of"
        raise RunFolderError(start, "is of another network than the recipe's", mend)
    try:
        restore(job.model, load_safetensors(run.read(MODEL)))
    except DAMAGE as error:
        raise RunFolderError(start / MODEL, f"does not fit {GRAPH} ({error})", "name another run") from None
    job.model.to(job.device)


def finetune_network(job: Job, folder: RunFolder, live: Live) -> None:
    """Train the quantized network as the recipe says, with a checkpoint in the folder after each epoch.

    The last epoch is kept. Where images are held out, the start is kept instead if it is better on them beyond chance,
    or if the training diverged: the loss that it minimizes has grown on images that it learned from.

    Raises:
        CalibQuantError: the images have no labels, or the loss diverges.
    """
    settings = job.recipe.finetune
    assert settings is not None
    source, held = _open(job, settings, live)
    before = artifact_tensors(job.model)
    with job.steps.begin("finetune", _title(settings, source, held)):
        judge = None if held is None else _judge(job, held)
        first = None if judge is None else judge(job.model)
        accuracy = None if judge is None else lambda network: float(judge(network).mean())
        some = next(job.prepared.inputs(SOME, SOME)).to(job.device)
        training = begin_finetuning(job.model, settings, some)
        objective = Distillation(job.model, settings, some)
        loss, parts = None if judge is None else objective.measured(source, SOME), settings.distill + settings.labels
        images = fingerprint(source.images)
        if load_training(folder, training, images, STATE):
            note(job.reporter, f"going on after epoch {len(training.reports)}")
        kept = _fit(job, folder, training, source, objective, accuracy, images)
        restore(job.model, artifact_tensors(finished(training, kept)))
        job.model.to(job.device)
        last = None if judge is None else judge(job.model)
        worse = first is not None and last is not None and harmed(first, last)
        if worse:
            note(job.reporter, "The network before training is better on the images held out. It is kept.")
        elif loss is not None and diverged(loss, end := objective.measured(source, SOME), parts):
            worse = True
            grown = f"from {loss:.3g} to {end:.3g} on images that it learned from"
            note(job.reporter, f"The training diverged: its loss rose {grown}. The network before training is kept. "
                               "Use a lower finetune.lr.")  # fmt: skip
        if worse:
            restore(job.model, before)
            job.model.to(job.device)
        elif settings.batch_norm == "reestimated":
            _reestimate(job, folder)
    job.facts["finetune"] |= {
        "held_out_before": None if first is None else float(first.mean()),
        "held_out_after": None if last is None else float(last.mean()),
        "kept": not worse,
        "training_images": len(source.images),
        "held_out_images": 0 if held is None else len(held),
        "processes": parallel.world(),
        "epochs": [asdict(report) for report in training.reports],
    }


def _fit(
    job: Job,
    folder: RunFolder,
    training: Training,
    source: Source,
    objective: Distillation,
    accuracy: Callable[[nn.Module], float] | None,
    images: str,
) -> nn.Module:
    def save(now: Training) -> None:
        log.info("%s", line_of(now.reports[-1]))
        save_training(folder, now, images, fields_of(job.recipe), STATE)

    try:
        settings, progress = objective.settings, job.reporter.progress
        return fit(training, source, settings, objective, accuracy, save, progress, keep_best=False)
    except ModelError as error:
        command = f"calibquant finetune --resume {final_path(folder.path)}{again(job.recipe)} finetune.lr=…"
        mend = f"use a lower finetune.lr, or go on from the last epoch: {command}"
        raise ModelError(error.where, error.problem, mend) from error


def check_learnable(job: Job, live: Live) -> None:
    """Check before all work that the images can be learned from, where the recipe asks for it.

    Raises:
        DataError: there are too few, or a label that is learned from is missing or no class of the network.
    """
    settings = job.recipe.finetune
    if settings is None:
        return
    learned, _ = _images(job, settings, live)
    check_training_images(learned, settings.labels > 0)
    if settings.labels > 0:
        check_labels(learned, job.prepared.classes)


def _images(job: Job, settings: FinetuneRecipe, live: Live) -> tuple[ImageSet, ImageSet | None]:
    """The images to learn from, and those held out."""
    images = live[1] if live[1] is not None else open_set(job.recipe, "calibration")
    return hold_out(images, settings.holdout, job.recipe.seed)


def _open(job: Job, settings: FinetuneRecipe, live: Live) -> tuple[Source, ImageSet | None]:
    """The source of the images to learn from, and the images held out."""
    recipe = job.recipe
    learned, held = _images(job, settings, live)
    augment = recipe.data.augment or AugmentRecipe()
    labelled = settings.labels > 0
    source = open_source(
        learned, augment, learned_preprocess(recipe), settings.batch_size, recipe.seed, job.device, labelled
    )
    return source, held


def harmed(before: Decisions, after: Decisions) -> bool:
    """Whether fewer decisions are right after training, by more than chance.

    The float network has often learned the images held out by heart; a quantized one begins with what is left of that,
    and may lose an image or two of them while it gets better at others.

    Args:
        before, after: of the same images, (N,).
    """
    return bool(after.mean() < before.mean()) and mcnemar(before, after) < CHANCE


def diverged(before: float, after: float, weight: float = 1.0) -> bool:
    """Whether the loss that a training minimizes has grown by a quarter and by 0.05 nats, or is no finite number.

    Args:
        before, after: on the same images, from those that were trained on.
        weight: of the loss's parts together.
    """
    return not after <= GROWTH * before + RISE * weight


def _judge(job: Job, held: ImageSet) -> Callable[[nn.Module], Decisions]:
    """Which images held out a network decides rightly; without labels, as the float network does."""
    size, device = job.recipe.evaluation.batch_size, job.device
    unknown = bool((held.labels() < 0).any())
    reference = evaluate(job.model.teacher, held, size, device=device).predictions if unknown else None

    def judge(network: nn.Module) -> Decisions:
        found = evaluate(network.eval(), held, size, device=device)
        return found.predictions == (found.labels if reference is None else reference)

    return judge


def _reestimate(job: Job, folder: RunFolder) -> None:
    entering = torch.cat(list(job.prepared.inputs(job.recipe.calibration.batch_size)))
    limit = job.recipe.reconstruct.cache_limit
    correct_biases(job.model, entering, job.device, job.reporter.progress, limit, folder.path)


def measure_before(job: Job) -> Evaluation:
    """What the network does on the evaluation images before it is trained; only told, nothing is chosen by it."""
    images = job.prepared.images if job.prepared.evaluation is None else job.prepared.evaluation
    with job.steps.begin("evaluate_start", f"Evaluate the {job.recipe.setting} network before training"):
        found = measure(job.recipe, job.mount(job.model), images, job.device, job.reporter)
    job.facts["finetune"] = {"before": found.scores.to_dict()}
    return found


def _title(settings: FinetuneRecipe, source: Source, held: ImageSet | None) -> str:
    out = "" if held is None else f", {len(held)} held out"
    many = f" in {parallel.world()} processes" if parallel.world() > 1 else ""
    return f"Train the quantized network for {length_of(settings)} on {len(source.images)} images{out}{many}"
