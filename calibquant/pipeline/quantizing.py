"""From a recipe to a run folder: the order of the stages."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibquant.data import ImageSet, batches, manifest_csv
from calibquant.evaluation import Evaluation
from calibquant.export.artifact import MODEL, save_artifact, size_of
from calibquant.export.record import record, record_text
from calibquant.parallel import resolve_device, set_threads
from calibquant.pipeline.measuring import measure
from calibquant.pipeline.preparing import Prepared, prepare
from calibquant.pipeline.reporting import Reporter, Silent, begin, log_to, note
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.quantization.model import parameter_tensors
from calibquant.recipe import Recipe, make_recipe
from calibquant.runfolder import RunFolder, final_path, new_run, sha256


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: the run folder.
        model: the quantized network, on the recipe's device.
        metrics: the content of metrics.json.
    """

    folder: Path
    model: QuantModel
    metrics: dict[str, Any]


@dataclass
class _Clock:
    """Seconds per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 3)


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
    recipe = recipe if isinstance(recipe, Recipe) else make_recipe(recipe)
    reporter = reporter or Silent()
    threads, device = set_threads(recipe.threads), resolve_device(recipe.device)
    clock = _Clock()
    with new_run(recipe.runs, _stem(recipe, network)) as folder, log_to(folder):
        total = 6
        begin(reporter, 1, total, "Open the network and the images")
        with clock.stage("prepare"):
            prepared = prepare(recipe, network, calibration, evaluation)
            model = QuantModel(
                prepared.teacher.to(device), make_plan(prepared.teacher, recipe.quant), recipe.quant.activations.dynamic
            )
        note(reporter, f"{len(prepared.manifest.rows)} calibration images; {model.summary()}")
        begin(reporter, 2, total, f"Round weights to {recipe.quant.weights.bits} bits")
        with clock.stage("weights"):
            calibrate_weights(model, recipe.quant, reporter.progress)
        begin(reporter, 3, total, f"Observe activations for {recipe.quant.activations.bits} bits")
        with clock.stage("activations"):
            calibrate_activations(
                model,
                recipe.quant.activations,
                _range_batches(recipe, prepared.images, device, reporter),
                lambda part: prepared.mount(part).to(device),
            )
        begin(reporter, 4, total, "Evaluate the float network")
        with clock.stage("evaluate_float"):
            images = prepared.images if prepared.evaluation is None else prepared.evaluation
            float_result = measure(recipe, prepared.mount(model.teacher), images, device, reporter)
        begin(reporter, 5, total, f"Evaluate the {recipe.setting} network")
        with clock.stage("evaluate_quantized"):
            quantized = measure(recipe, prepared.mount(model), images, device, reporter, float_result)
        skipped = prepared.images.skipped | images.skipped
        if skipped:
            note(reporter, f"{len(skipped)} unreadable images were left out; log.txt names them")
        begin(reporter, 6, total, "Write the run folder")
        metrics = _metrics(recipe, prepared, model, float_result, quantized, clock)
        _write(folder, recipe, prepared, model, metrics, {"threads": threads, "device": str(device)})
        final = final_path(folder.path)
    return Run(final, model, metrics)


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


def _metrics(
    recipe: Recipe,
    prepared: Prepared,
    model: QuantModel,
    float_result: Evaluation,
    quantized: Evaluation,
    clock: _Clock,
) -> dict[str, Any]:
    return {
        "setting": recipe.setting,
        "placement": recipe.quant.placement,
        "boundary": recipe.quant.boundary,
        "calibration_images": len(prepared.manifest.rows),
        "evaluated_on": "calibration images" if prepared.evaluation is None else "evaluation images",
        "float": float_result.scores.to_dict(),
        "quantized": quantized.scores.to_dict(),
        "size": asdict(size_of(model)),
        "coverage": [asdict(row) for row in model.coverage()],
        "seconds": clock.seconds,
    }


def _write(
    folder: RunFolder,
    recipe: Recipe,
    prepared: Prepared,
    model: QuantModel,
    metrics: dict[str, Any],
    machine: dict[str, Any],
) -> None:
    manifest = manifest_csv(prepared.manifest)
    folder.write("recipe.yaml", recipe.to_yaml())
    folder.write("manifest.csv", manifest)
    save_artifact(model, folder)
    folder.write_json("record.json", record(model))
    folder.write("record.txt", record_text(model))
    metrics["size"]["file"] = (folder.path / MODEL).stat().st_size
    folder.write_json("metrics.json", metrics)
    weights = recipe.model.weights
    folder.seal({
        "network": _network_hash(model),
        "weights": None if weights is None else {"path": str(weights), "sha256": sha256(weights.read_bytes())},
        "images": {"count": len(prepared.manifest.rows), "sha256": sha256(manifest.encode())},
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in ("calibquant", "torch", "numpy")},
        "machine": platform.machine(),
        "seed": recipe.seed,
        **machine,
    })  # fmt: skip


def _network_hash(model: QuantModel) -> str:
    """SHA-256 over the names and values of the float network's parameters, BatchNorm folded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parameter_tensors(model.teacher).items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
