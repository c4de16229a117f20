"""From a recipe to a run folder: the order of the stages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibquant import parallel
from calibquant.data import ImageSet, manifest_csv
from calibquant.errors import RecipeError
from calibquant.evaluation import Evaluation
from calibquant.parallel import set_threads
from calibquant.pipeline.checkpoint import Progress, load_checkpoint, save_checkpoint
from calibquant.pipeline.correcting import corrects
from calibquant.pipeline.export_stage import Deployed, export
from calibquant.pipeline.finetuning import (
    adopt,
    adopt_plan,
    adopted_plan,
    check_learnable,
    finetune_network,
    measure_before,
)
from calibquant.pipeline.folders import run_folder
from calibquant.pipeline.live import Live, as_path, checked_live
from calibquant.pipeline.measuring import run_recipe
from calibquant.pipeline.reporting import Reporter, Silent, log_to, note, warn
from calibquant.pipeline.resuming import again, changes_of, continued_recipe, fields_of
from calibquant.pipeline.stages import (
    Steps,
    calibrate,
    correct_all,
    evaluate_both,
    learn,
    learns,
    open_job,
    round_again,
    rounds,
    settle,
    step_names,
)  # fmt: skip
from calibquant.pipeline.training import check_shares
from calibquant.pipeline.writing import run_metrics, run_stem, write_run
from calibquant.quantization import QuantModel
from calibquant.recipe import Recipe, changed, idle_fields, valid
from calibquant.recipe.idle import value_at
from calibquant.recipe.section import leaves
from calibquant.runfolder import CHECKPOINT, RunFolder, final_path, interrupted_run, new_run, open_run
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
    recipe, live = with_network_defaults(valid(recipe)), checked_live(network, calibration, evaluation)
    stem = run_stem(recipe, live[0], recipe.setting.lower())
    with run_folder(lambda: new_run(recipe.runs, stem, flags=again(recipe))) as folder:
        folder.write("recipe.yaml", recipe.to_yaml())
        return _run(folder, recipe, live, reporter or Silent())


def finetune(
    start: Path,
    overrides: list[str] | None = None,
    network: nn.Module | None = None,
    calibration: ImageSet | None = None,
    evaluation: ImageSet | None = None,
    reporter: Reporter | None = None,
    trust_code: bool = False,
) -> Run:
    """Train the quantized network of a finished run further, and leave a run folder beside it.

    A recipe with a section `finetune` does the same at the end of `quantize`.

    Args:
        start: the run; its codes, scales and biases are where training begins.
        overrides: dotted recipe keys, e.g. finetune.epochs=10; without a section `finetune` its defaults hold. `runs`
            names another folder for the new run.
        network, calibration, evaluation, reporter: as `quantize` takes them; all calibration images are trained on.
        trust_code: whether code that the run's recipe names may be run, to make the float network.

    Raises:
        CalibQuantError: something about the run, its network or images, or the loss diverges.

    Example:
        >>> import calibquant, torch
        >>> layers = torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        >>> net = torch.nn.Sequential(*layers)
        >>> images = calibquant.TensorImages(torch.rand(64, 3, 2, 2))
        >>> run = calibquant.quantize({"calibration": {"count": 32}}, net, images)
        >>> trained = calibquant.finetune(run.folder, ["finetune.epochs=1"], net, images)
        >>> len(trained.metrics["finetune"]["epochs"])
        1
    """
    start, live = as_path(start, "start"), checked_live(network, calibration, evaluation)
    done = open_run(start)
    keys = [f"runs={json.dumps(str(beside(start)))}", *(overrides or [])]
    recipe = run_recipe(done, keys, trust_code)
    if recipe.finetune is None:
        recipe = run_recipe(done, ["finetune={}", *keys], trust_code)
    _check_adopted(recipe, run_recipe(done, None, trust_code), start)
    stem = run_stem(recipe, live[0], f"{recipe.setting.lower()}-qat")
    with run_folder(lambda: new_run(recipe.runs, stem, flags=again(recipe))) as folder:
        folder.write("recipe.yaml", recipe.to_yaml())
        adopt_plan(folder, start)
        return _run(folder, recipe, live, reporter or Silent(), start)


def _check_adopted(recipe: Recipe, own: Recipe, start: Path) -> None:
    """Check that a run which is trained further keeps its plan: its codes are stored in these bits and grids."""
    for field in leaves(type(recipe.quant), "quant."):
        if value_at(recipe, field) != value_at(own, field):
            problem = f"is {value_at(own, field)} in {start}, and a run that is trained further keeps it"
            raise RecipeError(f"override, {field}", problem, "leave the override out, or quantize again with it")


def beside(run: Path) -> Path:
    """The folder that a run lies in.

    Example:
        >>> beside(Path("runs/resnet18-w4a4-001")), beside(Path("runs/x/..")) == Path.cwd()
        (PosixPath('runs'), True)
    """
    return run.parent if run.name not in ("", "..") else run.resolve().parent


def with_network_defaults(recipe: Recipe) -> Recipe:
    """The recipe with the regularizer's weight that its network is known to need, where it says none."""
    if recipe.reconstruct.regularizer is not None:
        return recipe
    return changed(recipe, {"reconstruct.regularizer": regularizer_of(recipe.model.name)})


def resume(
    run: Path,
    network: nn.Module | None = None,
    calibration: ImageSet | None = None,
    evaluation: ImageSet | None = None,
    reporter: Reporter | None = None,
    overrides: list[str] | None = None,
    trust_code: bool = False,
) -> Run:
    """Continue a run that was interrupted while it learned; it ends as if it had not been.

    Args:
        run: the folder that the run would have left.
        network, calibration, evaluation, reporter: as `quantize` got them.
        overrides: dotted recipe keys; only those of `resuming.MAY_CHANGE` may have another value than before, e.g.
            threads, or a lower finetune.lr after a loss that diverged.
        trust_code: whether code that the run's recipe names may be run, to make the network.

    Raises:
        CalibQuantError: there is no such run, its checkpoint is damaged, another process works at it, or recipe,
            network or images have changed.

    Example:
        >>> calibquant.pipeline.resume(Path("runs/cifar_resnet20-w2a2-001"))  # doctest: +SKIP
    """
    run, live = as_path(run, "run"), checked_live(network, calibration, evaluation)
    flags = " --trust-code" if trust_code else ""
    with run_folder(lambda: interrupted_run(run, flags=flags)) as folder:
        recipe = continued_recipe(folder, run, overrides, trust_code)
        return _run(folder, recipe, live, reporter or Silent())


@torch.inference_mode(False)
@torch.enable_grad()
def _run(folder: RunFolder, recipe: Recipe, live: Live, reporter: Reporter, start: Path | None = None) -> Run:
    set_threads(recipe.threads)
    plan, started_from = adopted_plan(folder)
    steps, own = Steps(reporter, step_names(recipe, plan is not None)), plan is None
    if recipe.finetune is not None:
        check_shares(recipe.finetune, "finetune")
    idle = [str(field) for field in idle_fields(recipe, "quantize" if own else "finetune")]
    with log_to(folder):
        for text in idle:
            warn(reporter, text)
        job = open_job(recipe, live, steps, folder, plan)
        check_learnable(job, live)
        manifest = manifest_csv(job.prepared.manifest)
        progress = load_checkpoint(folder, job.model, manifest)
        if progress is None:
            if start is None:
                progress = calibrate(job)
            else:
                adopt(job, start)
                progress = Progress([], settle(job), dict(steps.seconds))
                save_checkpoint(folder, job.model, manifest, progress, fields_of(recipe))
        else:
            steps.seconds.update(progress.seconds)
            layers = f"{len(progress.layers)} rounded layers and " if rounds(recipe) else ""
            note(reporter, f"going on after {layers}{len(progress.reports)} reconstructed units")
            job.model.to(job.device)
        if own and rounds(recipe) and not progress.reports:
            progress = round_again(job, folder, progress)
        if own and learns(recipe):
            progress = learn(job, folder, progress)
        if recipe.finetune is not None and not (folder.path / CHECKPOINT).is_file():
            save_checkpoint(
                folder, job.model, manifest, progress, fields_of(recipe)
            )  # what a run goes on from that is stopped later
        if own and corrects(recipe):
            correct_all(job, folder)
        if recipe.finetune is not None:
            measure_before(job)
            finetune_network(job, folder, live)
        after = None
        if rounds(recipe) or learns(recipe) or corrects(recipe) or recipe.finetune is not None:
            with steps.time("accumulation_after"):
                after = settle(job)
        float_result, quantized = evaluate_both(job)
        deployed = export(job, float_result, quantized) if recipe.export.onnx else Deployed()
        with steps.begin("write", "Write the run folder"):
            metrics = run_metrics(
                recipe, job.prepared, job.model, float_result, quantized, progress.layers, progress.reports,
                (progress.nearest, after), dict(steps.seconds),
            )  # fmt: skip
            metrics |= {"deployed": deployed.scores, "parity": deployed.parity}
            metrics |= (
                job.facts
                | ({"warnings": idle} if idle else {})
                | ({} if started_from is None else {"started_from": started_from})
            )
            machine = {"threads": torch.get_num_threads(), "device": str(job.device)} | changes_of(folder)
            write_run(folder, recipe, job.prepared, job.model, metrics, deployed.files, machine)
            folder.remove("checkpoint*")
    return Run(parallel.first(final_path(folder.path)), job.model, metrics, quantized)
