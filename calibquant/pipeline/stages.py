"""The stages of a run as functions of a job; `quantizing` knows their order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calibquant import parallel
from calibquant.data import ImageSet, manifest_csv, read_manifest
from calibquant.errors import RecipeError, RunFolderError
from calibquant.evaluation import Evaluation
from calibquant.export.artifact import artifact_tensors, restore
from calibquant.parallel import resolve_device
from calibquant.pipeline.checkpoint import Progress, save_checkpoint
from calibquant.pipeline.correcting import check_corrections, correct, corrects, equalized, with_room
from calibquant.pipeline.live import Live
from calibquant.pipeline.measuring import measure, warn_of_images
from calibquant.pipeline.mixing import Mixture, mix
from calibquant.pipeline.preparing import Prepared, prepare
from calibquant.pipeline.reporting import Reporter, Silent, begin, enough_memory, log, note
from calibquant.pipeline.resuming import fields_of
from calibquant.quantization import (
    QuantModel,
    QuantPlan,
    calibrate_activations,
    calibrate_weights,
    fit_biases,
    make_plan,
    weight_energies,
)
from calibquant.recipe import Recipe, ReconstructRecipe
from calibquant.reconstruction import (
    LayerReport,
    UnitReport,
    feature_errors,
    gram_layers,
    reconstruct,
    round_weights,
    within_time,
)  # fmt: skip
from calibquant.runfolder import RunFolder

CHOSEN = "checkpoint-manifest.csv"  # calibration images, for a run that goes on
MIXED = "checkpoint-mixed.json"  # chosen bits, for a run that goes on
PLANNED = "checkpoint-planned.json"  # iterations that fit the time, for a run that goes on
STEPS = (
    "prepare", "equalize", "mixed", "weights", "activations", "gram", "reconstruct", "correct", "evaluate_start",
    "finetune", "evaluate_float", "evaluate_quantized", "export", "write",
)  # fmt: skip
BY_BATCH = ("moving-average", "mse-batch", "mse-shrink")  # observers whose ranges depend on the size of the batches
CALIBRATING = ("calibration.batch_size", "calibration.count")
MEMORY = {  # fields that lower the memory a step needs, where they are others than these
    "prepare": ("data.preprocess.resize", "calibration.count"),
    "gram": ("calibration.count",),
    "reconstruct": ("reconstruct.batch_size", "reconstruct.cache_limit"),
    "finetune": ("finetune.batch_size",),
    "evaluate_start": ("evaluation.batch_size",),
    "evaluate_float": ("evaluation.batch_size",),
    "evaluate_quantized": ("evaluation.batch_size",),
    "export": ("export.images",),
}
ERROR_IMAGES = 128  # calibration images on which the growth of the error through the network is measured


@dataclass(frozen=True)
class Steps:
    """Announces the steps of a run and takes their time.

    Args:
        reporter: hears of them.
        names: of the steps that will come, in order.
        seconds: by name; filled as they end.
    """

    reporter: Reporter
    names: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def begin(self, name: str, title: str, before: float = 0.0) -> Iterator[None]:
        """A numbered step; `before` is what an interrupted run spent in it."""
        begin(self.reporter, self.names.index(name) + 1, len(self.names), title)
        with self.time(name, before):
            yield

    @contextmanager
    def time(self, name: str, before: float = 0.0) -> Iterator[None]:
        """Time something within or without a step."""
        start = time.perf_counter()
        with enough_memory(*MEMORY.get(name, CALIBRATING)):
            yield
        self.seconds[name] = round(before + time.perf_counter() - start, 3)


def step_names(recipe: Recipe, adopted: bool = False) -> tuple[str, ...]:
    """The steps of a run; one that goes on from a finished run has `adopted` what that one found."""
    own, trained = not adopted, recipe.finetune is not None
    asked = {
        "equalize": recipe.quant.equalize,
        "mixed": own and recipe.quant.mixed is not None,
        "weights": own,
        "activations": own,
        "gram": own and rounds(recipe),
        "reconstruct": own and learns(recipe),
        "correct": own and corrects(recipe),
        "evaluate_start": trained,
        "finetune": trained,
        "export": recipe.export.onnx,
    }
    return tuple(name for name in STEPS if asked.get(name, True))


def rounds(recipe: Recipe) -> bool:
    """Whether the recipe asks for Gram rounding."""
    return recipe.quant.weights.rounding == "gram"


def learns(recipe: Recipe) -> bool:
    """Whether the recipe asks for a reconstruction."""
    return recipe.reconstruct.method != "none"


@dataclass(frozen=True)
class Job:
    """A recipe with its images and networks.

    Args:
        recipe: what is to be done.
        prepared: the float network and the images.
        model: the network that is quantized, on `device` but while it is exported.
        device: where it runs.
        steps: of the run.
        facts: what stages that not every run has found, for metrics.json.
    """

    recipe: Recipe
    prepared: Prepared
    model: QuantModel
    device: torch.device
    steps: Steps
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def reporter(self) -> Reporter:
        """Who hears of it."""
        return self.steps.reporter

    def mount(self, part: nn.Module) -> nn.Module:
        """`part` where images reach it, on the device."""
        return self.prepared.mount(part).to(self.device)


def open_job(
    recipe: Recipe, live: Live, steps: Steps, folder: RunFolder | None = None, plan: QuantPlan | None = None
) -> Job:
    """Open the network and the images, and plan the quantized network.

    Args:
        recipe: what is to be done.
        live: network and images in place of the recipe's.
        steps: of the run.
        folder: of the run, which keeps what takes long to choose for a run that goes on.
        plan: of a finished run, in place of the recipe's.

    Raises:
        CalibQuantError: something about the recipe, network or images.
    """
    device = resolve_device(recipe.device)
    with steps.begin("prepare", "Open the network and the images"):
        known = read_manifest(folder.path / CHOSEN) if folder and (folder.path / CHOSEN).is_file() else None
        prepared = prepare(recipe, *live, steps.reporter, known)
        evaluated = prepared.images if prepared.evaluation is None else prepared.evaluation
        for remark in dict.fromkeys([*prepared.images.remarks, *evaluated.remarks]):
            steps.reporter.note(f"warning: {remark}")  # log.txt has it since the images were opened
        warn_of_images(recipe, evaluated, steps.reporter)
        if folder and known is None:
            folder.write(CHOSEN, manifest_csv(prepared.manifest))
        _check_entries(recipe, prepared)
        check_corrections(recipe, prepared)
    quant = recipe.quant
    facts: dict[str, Any] = {"equalization": None, "mixed": None, "corrections": {}}
    if quant.equalize:
        with steps.begin("equalize", "Equalize the weight ranges of neighbouring layers"):
            prepared, facts["equalization"] = equalized(recipe, prepared, steps.reporter)
    prepared = with_room(recipe, prepared)
    if quant.mixed is not None and plan is None:
        with steps.begin("mixed", "Choose the bits of single tensors"):
            mixture = _mixture(folder, recipe, prepared, device, steps.reporter)
        quant, facts["mixed"] = quant.model_copy(update={"bits": {**quant.bits, **mixture.bits}}), mixture.report
    plan = make_plan(prepared.teacher, quant) if plan is None else plan
    model = QuantModel(prepared.teacher.to(device), plan, quant.activations.dynamic)
    note(steps.reporter, f"{len(prepared.manifest.rows)} calibration images; {model.summary()}")
    return Job(recipe, prepared, model, device, steps, facts)


def _check_entries(recipe: Recipe, prepared: Prepared) -> None:
    """What goes through the network layer by layer or unit by unit needs one input to begin at."""
    stages = (
        ("quant.weights.rounding", recipe.quant.weights.rounding, "nearest"),
        ("reconstruct.method", recipe.reconstruct.method, "none"),
        ("finetune", "training" if recipe.finetune else "null", "null"),
    )
    for where, chosen, mend in stages:
        if chosen != mend and prepared.entries != 1:
            problem = f"{chosen} needs a network or part with one input"
            raise RecipeError(f"recipe, {where}", problem, f"use {mend}")


def _mixture(
    folder: RunFolder | None, recipe: Recipe, prepared: Prepared, device: torch.device, reporter: Reporter
) -> Mixture:
    """The chosen bits; a run that goes on has them from its folder."""
    if folder is not None and (folder.path / MIXED).is_file():
        try:
            return Mixture(**folder.read_json(MIXED))
        except TypeError:
            raise RunFolderError(folder.path / MIXED, "is damaged", "begin the run again") from None
    mixture = mix(recipe, prepared, device, reporter)
    if folder is not None:
        folder.write_json(MIXED, asdict(mixture))
    return mixture


def calibrate(job: Job) -> Progress:
    """Round weights to nearest, find activation ranges, and measure how the error grows."""
    recipe, model, steps = job.recipe, job.model, job.steps
    width = "their" if recipe.quant.mixed else recipe.quant.weights.code_bits
    with steps.begin("weights", f"Round weights to {width} bits"):
        energies = weight_energies(model, recipe.quant, range_batches(job, Silent()), job.mount)
        calibrate_weights(model, recipe.quant, steps.reporter.progress, energies)
    with steps.begin("activations", f"Observe activations for {recipe.quant.activations.bits} bits"):
        _observe(job, steps.reporter)
    model.to(job.device)  # ranges are found on the CPU
    agree(job)
    with steps.time("accumulation"):
        errors = settle(job)
    return Progress([], errors, dict(steps.seconds))


def round_again(job: Job, folder: RunFolder, before: Progress) -> Progress:
    """Gram-round the layers that have no report yet, with a checkpoint after each."""
    model, found, manifest = job.model, before, manifest_csv(job.prepared.manifest)
    done, layers = len(before.layers), gram_layers(model)
    with job.steps.begin("gram", "Round weights by Gram matrices", sum(report.seconds for report in before.layers)):
        left = [name for name in model.weight_quantizers if name not in layers]
        if left:
            note(
                job.reporter, f"{', '.join(left)}: nearest codes are kept (no product, or too many inputs to an output)"
            )
        if done < len(layers):
            settings = job.recipe.reconstruct
            rounded = round_weights(
                model, _entering(job), settings, job.recipe.seed, job.device, job.reporter.progress, done, folder.path
            )
            for report in rounded:
                found = replace(found, layers=[*found.layers, report])
                save_checkpoint(folder, model, manifest, found, fields_of(job.recipe))
                _log("layer", report.layer, "error", report)
        _fit_biases(job)  # scales may have become smaller
        agree(job)
    rolled = sum(not report.kept for report in found.layers)
    note(job.reporter, f"{len(found.layers)} layers, {rolled} rolled back")
    return replace(found, seconds=dict(job.steps.seconds))


def learn(job: Job, folder: RunFolder, before: Progress) -> Progress:
    """Reconstruct the units that have no report yet, with a checkpoint after each."""
    recipe, model, found, manifest = job.recipe, job.model, before, manifest_csv(job.prepared.manifest)
    spent = sum(report.seconds for report in before.reports)
    with job.steps.begin("reconstruct", f"Reconstruct by {recipe.reconstruct.method}", spent):
        images, settings = _entering(job), recipe.reconstruct
        if settings.time is not None:
            settings = _within_time(job, folder, images)
        learned = reconstruct(
            model,
            images,
            settings,
            recipe.seed,
            job.device,
            job.reporter.progress,
            len(found.reports),
            partial(_observe, job, Silent(), True),
            folder.path,
        )
        for report in learned:
            found = replace(found, reports=[*found.reports, report])
            save_checkpoint(folder, model, manifest, found, fields_of(job.recipe))
            _log("unit", f"{report.unit}, {report.phase}", "loss", report)
        agree(job)
    rolled = sum(not report.kept for report in found.reports)
    note(job.reporter, f"{len(found.reports)} units, {rolled} rolled back")
    return found


def _within_time(job: Job, folder: RunFolder, images: Tensor) -> ReconstructRecipe:
    """The iterations that fit the recipe's time; a run that goes on has them from its folder."""
    if (folder.path / PLANNED).is_file():
        try:
            settings = ReconstructRecipe.model_validate(folder.read_json(PLANNED))
        except ValueError:
            raise RunFolderError(folder.path / PLANNED, "is damaged", "begin the run again") from None
    else:
        settings = within_time(job.model, images, job.recipe.reconstruct, job.recipe.seed, job.device)
        folder.write_json(PLANNED, settings.model_dump(mode="json"))
    whole = f" and {settings.network.iterations} of the network" if settings.network.iterations else ""
    note(job.reporter, f"{job.recipe.reconstruct.time:.0f} s: {settings.iterations} iterations a unit{whole}")
    job.facts["iterations"] = {"unit": settings.iterations, "network": settings.network.iterations}
    return settings


def correct_all(job: Job, folder: RunFolder) -> None:
    """Correct weights and biases; last, so that it sees the final roundings."""
    with job.steps.begin("correct", "Correct weights and biases"):
        job.facts["corrections"] = correct(job.recipe, job.prepared, job.model, job.device, folder.path, job.reporter)
        agree(job)


def agree(job: Job) -> None:
    """Every process takes the first one's codes, scales and biases: arithmetic may differ between machines."""
    if parallel.world() > 1:
        restore(job.model, parallel.first(artifact_tensors(job.model)))
        job.model.to(job.device)


def settle(job: Job) -> dict[str, float]:
    """Make room for biases in int32, which smaller scales may have taken, and measure how the error grows.

    Returns:
        the relative feature error after each block, on the first calibration images; none for a part with several
        inputs.
    """
    _fit_biases(job)
    if job.prepared.entries != 1:
        return {}
    images = job.prepared.inputs(job.recipe.calibration.batch_size, ERROR_IMAGES)
    return feature_errors(job.model, images, job.device)


def evaluate_both(job: Job) -> tuple[Evaluation, Evaluation]:
    """What the float and the quantized network do on the evaluation images, or the calibration images without such."""
    recipe, prepared, device, reporter = job.recipe, job.prepared, job.device, job.reporter
    images = evaluated(job)
    with job.steps.begin("evaluate_float", "Evaluate the float network"):
        float_result = measure(recipe, job.mount(job.model.teacher), images, device, reporter)
    with job.steps.begin("evaluate_quantized", f"Evaluate the {recipe.setting} network"):
        quantized = measure(recipe, job.mount(job.model), images, device, reporter, float_result)
    skipped = prepared.images.skipped | images.skipped
    if skipped:
        note(reporter, f"{len(skipped)} unreadable images were left out; log.txt names them")
    return float_result, quantized


def evaluated(job: Job) -> ImageSet:
    """The evaluation images, or the calibration images without such."""
    return job.prepared.images if job.prepared.evaluation is None else job.prepared.evaluation


def _fit_biases(job: Job) -> None:
    """See `quantization.fit_biases`; what it changed is told."""
    for node, channels in fit_biases(job.model.biases()).items():
        note(job.reporter, f"{node}: the scales of {channels} channels were raised so that the bias fits int32")


def _observe(job: Job, reporter: Reporter, quantized_weights: bool = False) -> None:
    """Find the activation ranges on the images that the recipe gives for it."""
    calibrate_activations(
        job.model, job.recipe.quant.activations, range_batches(job, reporter), job.mount, quantized_weights
    )


def _entering(job: Job) -> Tensor:
    """What enters the network on all calibration images."""
    return torch.cat(list(job.prepared.inputs(job.recipe.calibration.batch_size)))


def _log(what: str, name: str, measure: str, report: LayerReport | UnitReport) -> None:
    result = "kept" if report.kept else "rolled back"
    log.info("%s %s: %s %.5g -> %.5g, %s", what, name, measure, report.loss_before, report.loss_after, result)


def range_batches(job: Job, reporter: Reporter) -> Iterator[Tensor]:
    """The images on which activation ranges are found, on the device, batch by batch."""
    images = job.prepared.images
    count, done = min(job.recipe.calibration.range_count or len(images), len(images)), 0
    exact = job.recipe.quant.activations.observer in BY_BATCH
    for batch in job.prepared.batches(job.recipe.calibration.batch_size, slice(count), job.device, exact):
        yield batch
        done += len(batch)
        reporter.progress(done, count)
