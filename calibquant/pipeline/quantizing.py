"""From a recipe to a run folder: the order of the stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibquant.data import ImageSet, batches, manifest_csv
from calibquant.errors import CalibQuantError, RecipeError
from calibquant.evaluation import Evaluation
from calibquant.parallel import resolve_device, set_threads
from calibquant.pipeline.checkpoint import Progress, load_checkpoint, save_checkpoint
from calibquant.pipeline.exporting import export_files
from calibquant.pipeline.measuring import measure, run_recipe
from calibquant.pipeline.preparing import Prepared, prepare
from calibquant.pipeline.reporting import Reporter, Silent, begin, log, log_to, note
from calibquant.pipeline.run_inputs import entering
from calibquant.pipeline.writing import run_metrics, write_run
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, fit_biases, make_plan
from calibquant.recipe import Recipe, make_recipe
from calibquant.reconstruction import feature_errors, gram_layers, reconstruct, round_weights
from calibquant.runfolder import RunFolder, final_path, interrupted_run, new_run
from calibquant.zoo import regularizer_of

ERROR_IMAGES = 128  # calibration images on which the growth of the error through the network is measured


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


@dataclass
class _Clock:
    """Seconds per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, before: float = 0.0) -> Iterator[None]:
        """Time a stage; `before` is what an interrupted run spent in it."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(before + time.perf_counter() - begin, 3)


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
    """Go on with a run that was interrupted in Gram rounding or reconstruction; it ends as if it had not been.

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


def _run(
    folder: RunFolder,
    recipe: Recipe,
    live: tuple[nn.Module | None, ImageSet | None, ImageSet | None],
    reporter: Reporter,
) -> Run:
    threads, device = set_threads(recipe.threads), resolve_device(recipe.device)
    clock = _Clock()
    gram, learning = recipe.quant.weights.rounding == "gram", recipe.reconstruct.method != "none"
    total = 6 + gram + learning + recipe.export.onnx
    with log_to(folder):
        begin(reporter, 1, total, "Open the network and the images")
        with clock.stage("prepare"):
            prepared = prepare(recipe, *live)
            _check_entries(recipe, prepared)
            model = QuantModel(
                prepared.teacher.to(device), make_plan(prepared.teacher, recipe.quant), recipe.quant.activations.dynamic
            )
        note(reporter, f"{len(prepared.manifest.rows)} calibration images; {model.summary()}")
        progress = load_checkpoint(folder, model, manifest_csv(prepared.manifest))
        if progress is None:
            begin(reporter, 2, total, f"Round weights to {recipe.quant.weights.bits} bits")
            with clock.stage("weights"):
                calibrate_weights(model, recipe.quant, reporter.progress)
            begin(reporter, 3, total, f"Observe activations for {recipe.quant.activations.bits} bits")
            with clock.stage("activations"):
                _observe(recipe, prepared, model, device, reporter)
            model.to(device)  # ranges are found on the CPU
            _fit_biases(model, reporter)
            with clock.stage("accumulation"):
                nearest = _errors(recipe, prepared, model, device)
            progress = Progress([], nearest, dict(clock.seconds))
        else:
            clock.seconds |= progress.seconds
            layers = f"{len(progress.layers)} rounded layers and " if gram else ""
            note(reporter, f"going on after {layers}{len(progress.reports)} reconstructed units")
            model.to(device)
        after = None
        if gram and not progress.reports:
            begin(reporter, 4, total, "Round weights by Gram matrices")
            with clock.stage("gram", sum(report.seconds for report in progress.layers)):
                progress = _round(folder, recipe, prepared, model, progress, device, reporter)
                after = None if learning else _errors(recipe, prepared, model, device)
            progress = replace(progress, seconds=dict(clock.seconds))
        if learning:
            begin(reporter, 4 + gram, total, f"Reconstruct by {recipe.reconstruct.method}")
            with clock.stage("reconstruct", sum(report.seconds for report in progress.reports)):
                progress = _reconstruct(folder, recipe, prepared, model, progress, device, reporter)
                after = _errors(recipe, prepared, model, device)
        begin(reporter, 4 + gram + learning, total, "Evaluate the float network")
        with clock.stage("evaluate_float"):
            images = prepared.images if prepared.evaluation is None else prepared.evaluation
            float_result = measure(recipe, prepared.mount(model.teacher), images, device, reporter)
        begin(reporter, 5 + gram + learning, total, f"Evaluate the {recipe.setting} network")
        with clock.stage("evaluate_quantized"):
            quantized = measure(recipe, prepared.mount(model), images, device, reporter, float_result)
        skipped = prepared.images.skipped | images.skipped
        if skipped:
            note(reporter, f"{len(skipped)} unreadable images were left out; log.txt names them")
        files: dict[str, bytes] = {}
        if recipe.export.onnx:
            begin(reporter, total - 1, total, "Export to ONNX and compare")
            with clock.stage("export"):
                files = _export(recipe, prepared, model, reporter)
            model.to(device)
        begin(reporter, total, total, "Write the run folder")
        metrics = run_metrics(
            recipe, prepared, model, float_result, quantized, progress.layers, progress.reports,
            (progress.nearest, after), clock.seconds,
        )  # fmt: skip
        write_run(folder, recipe, prepared, model, metrics, files, {"threads": threads, "device": str(device)})
        folder.remove("checkpoint*")
    return Run(final_path(folder.path), model, metrics, quantized)


def _check_entries(recipe: Recipe, prepared: Prepared) -> None:
    """What goes through the network layer by layer or unit by unit needs one input to begin at."""
    stages = (
        ("quant.weights.rounding", recipe.quant.weights.rounding, "nearest"),
        ("reconstruct.method", recipe.reconstruct.method, "none"),
    )
    for field_name, chosen, mend in stages:
        if chosen != mend and prepared.entries != 1:
            problem = f"{chosen} needs a network or part with one input"
            raise RecipeError(f"recipe, {field_name}", problem, f"use {mend}")


def _round(
    folder: RunFolder,
    recipe: Recipe,
    prepared: Prepared,
    model: QuantModel,
    before: Progress,
    device: torch.device,
    reporter: Reporter,
) -> Progress:
    """Gram-round the layers that have no report yet; a checkpoint after each."""
    manifest, found = manifest_csv(prepared.manifest), before
    done, layers = len(before.layers), gram_layers(model)
    left = [name for name in model.weight_quantizers if name not in layers]
    if left:
        note(reporter, f"{', '.join(left)}: keeps its nearest codes (no product, or too many inputs to an output)")
    if done < len(layers):
        images = torch.cat(list(prepared.inputs(recipe.calibration.batch_size)))
        for report in round_weights(
            model, images, recipe.reconstruct, recipe.seed, device, reporter.progress, done, folder.path
        ):
            found = replace(found, layers=[*found.layers, report])
            save_checkpoint(folder, model, manifest, found)
            result = "kept" if report.kept else "rolled back"
            log.info("layer %s: error %.5g -> %.5g, %s", report.layer, report.loss_before, report.loss_after, result)
    _fit_biases(model, reporter)  # scales may have become smaller
    rolled = sum(not report.kept for report in found.layers)
    note(reporter, f"{len(found.layers)} layers, {rolled} rolled back")
    return found


def _reconstruct(
    folder: RunFolder,
    recipe: Recipe,
    prepared: Prepared,
    model: QuantModel,
    before: Progress,
    device: torch.device,
    reporter: Reporter,
) -> Progress:
    """Learn the units that have no report yet; a checkpoint after each."""
    manifest, found = manifest_csv(prepared.manifest), before
    learned = reconstruct(
        model,
        torch.cat(list(prepared.inputs(recipe.calibration.batch_size))),
        recipe.reconstruct,
        recipe.seed,
        device,
        reporter.progress,
        len(found.reports),
        partial(_observe, recipe, prepared, model, device, Silent(), True),
        folder.path,
    )
    for report in learned:
        found = replace(found, reports=[*found.reports, report])
        save_checkpoint(folder, model, manifest, found)
        result = "kept" if report.kept else "rolled back"
        log.info(
            "unit %s, %s: loss %.5g -> %.5g, %s",
            report.unit, report.phase, report.loss_before, report.loss_after, result,
        )  # fmt: skip
    _fit_biases(model, reporter)  # learned scales may have become smaller
    rolled = sum(not report.kept for report in found.reports)
    note(reporter, f"{len(found.reports)} units, {rolled} rolled back")
    return found


def _export(recipe: Recipe, prepared: Prepared, model: QuantModel, reporter: Reporter) -> dict[str, bytes]:
    """The ONNX files by name. What deviates is told and left out: a run is not lost for its export."""
    settings = recipe.export
    try:
        images = entering(prepared, settings.images)
        made = export_files(model.to("cpu"), images, settings.storage, threads=recipe.threads or 1)
    except CalibQuantError as error:
        note(reporter, f"no ONNX files: {error}")
        return {}
    for name, reason in made.left_out.items():
        note(reporter, f"{name} is left out: {reason}")
    return made.files


def _fit_biases(model: QuantModel, reporter: Reporter) -> None:
    """See `quantization.fit_biases`; what it changed is told."""
    for node, channels in fit_biases(model.biases()).items():
        note(reporter, f"{node}: the scales of {channels} channels were raised so that the bias fits int32")


def _observe(
    recipe: Recipe,
    prepared: Prepared,
    model: QuantModel,
    device: torch.device,
    reporter: Reporter,
    quantized_weights: bool = False,
) -> None:
    """Find the activation ranges on the images that the recipe gives for it."""
    calibrate_activations(
        model,
        recipe.quant.activations,
        _range_batches(recipe, prepared.images, device, reporter),
        lambda part: prepared.mount(part).to(device),
        quantized_weights,
    )


def _errors(recipe: Recipe, prepared: Prepared, model: QuantModel, device: torch.device) -> dict[str, float]:
    """Relative feature error after each block, on the first calibration images; none for a part with several inputs."""
    if prepared.entries != 1:
        return {}
    return feature_errors(model, prepared.inputs(recipe.calibration.batch_size, ERROR_IMAGES), device)


def _range_batches(recipe: Recipe, images: ImageSet, device: torch.device, reporter: Reporter) -> Iterator[Tensor]:
    count = min(recipe.calibration.range_count or len(images), len(images))
    done = 0
    for batch in batches(images.subset(range(count)), recipe.calibration.batch_size):
        yield batch.images.to(device)
        done += len(batch.images)
        reporter.progress(done, count)


def _stem(recipe: Recipe, network: nn.Module | None) -> str:
    name = recipe.model.name if network is None or recipe.model.name else type(network).__name__.lower()
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name or "network")
    return f"{safe}-{recipe.setting.lower()}"
