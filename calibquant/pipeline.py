"""The pipeline: the order of the stages, from a recipe to a run folder."""

from __future__ import annotations

import copy
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from calibquant.data import (
    ImageSet,
    Manifest,
    batches,
    check_calibration_set,
    draw,
    make_manifest,
    manifest_csv,
    open_images,
)
from calibquant.errors import DataError, ModelError, RecipeError, RunFolderError
from calibquant.evaluation import Evaluation, evaluate
from calibquant.export.artifact import MODEL, load_artifact, save_artifact, size_of
from calibquant.export.record import record, record_text
from calibquant.graph import capture, fold_batch_norm
from calibquant.parallel import resolve_device, set_threads
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import Recipe, make_recipe
from calibquant.runfolder import RECEIPT, RunFolder, final_path, new_run, open_run, sha256
from calibquant.zoo import build_model

log = logging.getLogger("calibquant")


class Reporter(Protocol):
    """Hears how a run goes on; the command line draws it."""

    def step(self, number: int, total: int, title: str) -> None:
        """A step begins."""

    def progress(self, done: int, total: int) -> None:
        """Work done within the step."""

    def note(self, text: str) -> None:
        """A fact worth showing."""


class _Silent:
    def step(self, number: int, total: int, title: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


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


@dataclass(frozen=True)
class Prepared:
    """What stands before quantization: the captured network and the images.

    Args:
        network: the user's network.
        teacher: its canonical graph (or that of the named part), BatchNorm folded.
        submodule: name of the part, or None.
        images: the calibration images.
        manifest: which they are.
        evaluation: the evaluation images; None to measure on the calibration images.
    """

    network: nn.Module
    teacher: fx.GraphModule
    submodule: str | None
    images: ImageSet
    manifest: Manifest
    evaluation: ImageSet | None

    def mount(self, part: nn.Module) -> nn.Module:
        """A network that takes images: `part` itself, or the user's network with `part` in the named place."""
        if self.submodule is None:
            return part
        host = copy.deepcopy(self.network)
        host.set_submodule(self.submodule, part)
        return host.eval()


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
    reporter = reporter or _Silent()
    threads, device = set_threads(recipe.threads), resolve_device(recipe.device)
    clock = _Clock()
    with new_run(recipe.runs, _stem(recipe, network)) as folder, _log_to(folder):
        total = 6
        _begin(reporter, 1, total, "Open the network and the images")
        with clock.stage("prepare"):
            prepared = prepare(recipe, network, calibration, evaluation)
            model = QuantModel(
                prepared.teacher.to(device), make_plan(prepared.teacher, recipe.quant), recipe.quant.activations.dynamic
            )
        _note(reporter, f"{len(prepared.manifest.rows)} calibration images; {coverage_summary(model)}")
        _begin(reporter, 2, total, f"Round weights to {recipe.quant.weights.bits} bits")
        with clock.stage("weights"):
            calibrate_weights(model, recipe.quant, reporter.progress)
        _begin(reporter, 3, total, f"Observe activations for {recipe.quant.activations.bits} bits")
        with clock.stage("activations"):
            calibrate_activations(
                model,
                recipe.quant.activations,
                _range_batches(recipe, prepared.images, device, reporter),
                lambda part: prepared.mount(part).to(device),
            )
        _begin(reporter, 4, total, "Evaluate the float network")
        with clock.stage("evaluate_float"):
            float_result = measure(recipe, prepared, model.teacher, device, reporter)
        _begin(reporter, 5, total, f"Evaluate the {recipe.setting} network")
        with clock.stage("evaluate_quantized"):
            quantized = measure(recipe, prepared, model, device, reporter, float_result)
        skipped = prepared.images.skipped | (prepared.evaluation.skipped if prepared.evaluation else set())
        if skipped:
            _note(reporter, f"{len(skipped)} unreadable images were left out; log.txt names them")
        _begin(reporter, 6, total, "Write the run folder")
        metrics = _metrics(recipe, prepared, model, float_result, quantized, clock)
        _write(folder, recipe, prepared, model, metrics, {"threads": threads, "device": str(device)})
        final = final_path(folder.path)
    return Run(final, model, metrics)


def prepare(
    recipe: Recipe,
    network: nn.Module | None = None,
    calibration: ImageSet | None = None,
    evaluation: ImageSet | None = None,
) -> Prepared:
    """Open images and network, capture it and fold BatchNorm; see `quantize` for arguments and errors."""
    if network is None:
        network = build(recipe)
    else:
        _check_finite(network)
    if calibration is None:
        calibration = _open(recipe, "calibration")
        evaluation = evaluation if evaluation is not None else _open(recipe, "evaluation")
    check_calibration_set(min(recipe.calibration.count, len(calibration)))
    indices = draw(len(calibration), recipe.calibration.count, recipe.calibration.order, recipe.seed)
    if calibration.on_error == "skip":  # the manifest lists what calibrates, so unreadable images are found now
        readable = batches(calibration, recipe.calibration.batch_size, indices)
        indices = [i for batch in readable for i in batch.indices]
        check_calibration_set(len(indices))
    manifest = make_manifest(calibration, indices, recipe.calibration.order, recipe.seed)
    chosen = calibration.subset(indices)
    example = next(batches(chosen, 3, range(min(3, len(chosen))))).images
    submodule = recipe.model.submodule
    teacher = fold_batch_norm(capture(network, example, submodule))
    return Prepared(network, teacher, submodule, chosen, manifest, evaluation)


def _check_finite(network: nn.Module) -> None:
    """Check a live network's parameters, as those of a file are when they are loaded; a buffer may hold infinity."""
    for name, value in network.named_parameters():
        if not torch.isfinite(value).all():
            problem = "holds NaN or infinite values"
            raise ModelError(f"network, parameter '{name}'", problem, "give a network whose training did not diverge")


def build(recipe: Recipe) -> nn.Module:
    """The recipe's network with its weights, in eval mode.

    Raises:
        RecipeError: the recipe names no network.
        ModelError: it cannot be built or its weights do not fit.
    """
    if recipe.model.name is None:
        raise RecipeError("recipe, model.name", "this field is required", "name a network of the zoo")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # what the weights file does not give is drawn the same way each time
        return build_model(recipe.model)


def measure(
    recipe: Recipe,
    prepared: Prepared,
    part: nn.Module,
    device: torch.device,
    reporter: Reporter,
    reference: Evaluation | None = None,
) -> Evaluation:
    """Run a network (or part) over the evaluation images."""
    images = prepared.images if prepared.evaluation is None else prepared.evaluation
    return evaluate(
        prepared.mount(part).to(device), images, recipe.evaluation.batch_size, recipe.evaluation.count,
        None if reference is None else reference.predictions, reporter.progress, device,
    )  # fmt: skip


def evaluate_run(path: Path, overrides: list[str], reporter: Reporter | None = None) -> dict[str, Any]:
    """Measure a saved run again, from its files, on the images its recipe names.

    Args:
        path: run folder.
        overrides: dotted recipe keys, e.g. another `data.root`.

    Raises:
        CalibQuantError: the run or the images cannot be read.
    """
    reporter = reporter or _Silent()
    folder = open_run(path)
    recipe = run_recipe(folder, overrides)
    set_threads(recipe.threads)
    device = resolve_device(recipe.device)
    _begin(reporter, 1, 2, f"Load {path}")
    model = load_artifact(folder).to(device)
    images = _open(recipe, "evaluation")
    part: nn.Module = model
    if recipe.model.submodule is not None:
        part = build(recipe)
        _check_weights(folder, recipe)
        part.set_submodule(recipe.model.submodule, model)
    _begin(reporter, 2, 2, f"Evaluate the {recipe.setting} network")
    result = evaluate(
        part.eval().to(device), images, recipe.evaluation.batch_size, recipe.evaluation.count,
        progress=reporter.progress, device=device,
    )  # fmt: skip
    return {"run": str(path), "setting": recipe.setting, "quantized": result.scores.to_dict()}


def _check_weights(folder: RunFolder, recipe: Recipe) -> None:
    """Check that the network around a quantized part has the weights that the run was made with."""
    made_with, path = folder.read_json(RECEIPT)["weights"], recipe.model.weights
    found = None if path is None else sha256(path.read_bytes())
    if found != (made_with and made_with["sha256"]):
        problem = "is not the file that the run was made with (its hash is not the receipt's)"
        raise RunFolderError(path or "model.weights", problem, "give that file with model.weights=…")


def evaluate_float(recipe: Recipe, reporter: Reporter | None = None) -> dict[str, Any]:
    """Measure the recipe's float network; the same code measures the quantized one."""
    reporter = reporter or _Silent()
    set_threads(recipe.threads)
    device = resolve_device(recipe.device)
    _begin(reporter, 1, 2, "Open the network and the images")
    network, images = build(recipe).to(device), _open(recipe, "evaluation")
    _begin(reporter, 2, 2, "Evaluate the float network")
    result = evaluate(
        network,
        images,
        recipe.evaluation.batch_size,
        recipe.evaluation.count,
        progress=reporter.progress,
        device=device,
    )
    return {"model": recipe.model.name, "float": result.scores.to_dict()}


def run_recipe(folder: RunFolder, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a run folder, with overrides."""
    import yaml

    return make_recipe(yaml.safe_load(folder.read("recipe.yaml")), overrides, str(folder.path / "recipe.yaml"))


# --- dry run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Args:
        model: the planned, uncalibrated network.
        images: calibration images.
        seconds: estimated time, from one timed batch.
        peak_bytes: estimated peak memory of parameters and live activations.
    """

    model: QuantModel
    images: int
    seconds: float
    peak_bytes: int


def dry_run(recipe: Recipe, network: nn.Module | None = None) -> DryRun:
    """Plan a run without calibrating or writing anything.

    The time estimate measures one float forward pass and adds the observers', searches' and quantizers' share as a
    multiple of it; expect it within a factor of two.

    Raises:
        CalibQuantError: as `quantize`.
    """
    set_threads(recipe.threads)
    resolve_device(recipe.device)
    prepared = prepare(recipe, network)
    model = QuantModel(prepared.teacher, make_plan(prepared.teacher, recipe.quant))
    timed = min(16, len(prepared.images))
    example = next(batches(prepared.images.subset(range(timed)), timed)).images
    peak = _LiveBytes(prepared.mount(prepared.teacher), prepared.teacher)
    with torch.inference_mode():
        peak.measure(example[:1])
        begin = time.perf_counter()
        prepared.mount(prepared.teacher)(example)
        per_image = (time.perf_counter() - begin) / timed
    evaluation = prepared.evaluation if prepared.evaluation is not None else prepared.images
    evaluated = min(recipe.evaluation.count or len(evaluation), len(evaluation))
    observed = min(recipe.calibration.range_count or len(prepared.images), len(prepared.images))
    # Measured shares: an observer costs about 3 forward passes, a quantized pass about 3 float ones.
    seconds = per_image * (observed * 4 + evaluated * (1 + 3))
    batch = max(recipe.calibration.batch_size, recipe.evaluation.batch_size)
    parameters = 2 * size_of(model).float32
    return DryRun(model, len(prepared.images), seconds, parameters + batch * peak.bytes)


class _LiveBytes(fx.Interpreter):
    """Largest number of bytes of live activations while a graph runs."""

    def __init__(self, host: nn.Module, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.host, self.bytes = host, 0

    def measure(self, images: Tensor) -> None:
        """Run on images; a part is reached through its host."""
        part = next(m for m in self.host.modules() if m is self.module)

        def watch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.run(*args)

        handle = part.register_forward_pre_hook(watch)
        self.host(images)
        handle.remove()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        live = [v for k, v in self.env.items() if isinstance(v, Tensor) and k.op != "get_attr"]
        self.bytes = max(self.bytes, sum(v.numel() * v.element_size() for v in [*live, value] if isinstance(v, Tensor)))
        return value


# --- inside -----------------------------------------------------------------------------------------------------------


def coverage_summary(model: QuantModel) -> str:
    """One line: how many compute nodes run on quantized inputs and weights."""
    rows = model.coverage()
    whole = sum(1 for row in rows if not row.reason)
    return f"{whole} of {len(rows)} compute nodes quantized throughout, {len(model.weight_quantizers)} weights"


def _open(recipe: Recipe, split: Any) -> ImageSet:
    if recipe.data.kind is None:
        raise RecipeError("recipe, data.kind", "this field is required", "use cifar10, digits, folder or csv")
    images = open_images(recipe.data, split)
    if split == "evaluation" and len(images) == 0:
        raise DataError("recipe, data.evaluation", "there are no images", "name a set that holds images")
    return images


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
        "weights": None if weights is None else {"path": str(weights), "sha256": sha256(weights.read_bytes())},
        "images": {"count": len(prepared.manifest.rows), "sha256": sha256(manifest.encode())},
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in ("calibquant", "torch", "numpy")},
        "machine": platform.machine(),
        "seed": recipe.seed,
        **machine,
    })  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _begin(reporter: Reporter, number: int, total: int, title: str) -> None:
    log.info("[%d/%d] %s", number, total, title)
    reporter.step(number, total, title)


def _note(reporter: Reporter, text: str) -> None:
    log.info("%s", text)
    reporter.note(text)


@contextmanager
def _log_to(folder: RunFolder) -> Iterator[None]:
    handler = _LogFile(folder.path / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with suppress(OSError):  # each line was flushed already
            handler.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A full disk stops the run here as at every other file; logging would print a stack trace and go on."""
        raise
