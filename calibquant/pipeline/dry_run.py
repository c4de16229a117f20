"""What a run would do, without doing it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibquant.data import ImageSet, batches
from calibquant.parallel import resolve_device, set_threads
from calibquant.pipeline.memory import peak_bytes
from calibquant.pipeline.preparing import open_set, prepare
from calibquant.pipeline.stages import learns, rounds
from calibquant.quantization import QuantModel, make_plan
from calibquant.quantization.sensitivity import free_tensors
from calibquant.recipe import Idle, Recipe, idle_fields, valid
from calibquant.reconstruction.phases import phases
from calibquant.training import hold_out, steps_of
from calibquant.training.source import steps_per_epoch

# Measured shares: one image through an observer, a quantized network, a training step; in passes of the float network.
OBSERVED, QUANTIZED, LEARNED, TRAINED = 3, 3, 5.5, 2.5


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Args:
        model: the planned, uncalibrated network.
        images: calibration images.
        seconds: estimated time, from one timed batch.
        peak_bytes: estimated peak memory, see `pipeline.memory`.
        mixed: how many tensors will get other bits than planned, by `quant.mixed`.
        idle: fields that the recipe sets without effect.
    """

    model: QuantModel
    images: int
    seconds: float
    peak_bytes: int
    mixed: int = 0
    idle: tuple[Idle, ...] = ()


def dry_run(
    recipe: Recipe | dict[str, Any],
    network: nn.Module | None = None,
    calibration: ImageSet | None = None,
    evaluation: ImageSet | None = None,
) -> DryRun:
    """Plan a run without calibrating or writing anything.

    The time estimate measures one float forward pass and adds the observers', searches' and quantizers' share as a
    multiple of it; expect it within a factor of two.

    Raises:
        CalibQuantError: as `quantize`.
    """
    recipe = valid(recipe)
    set_threads(recipe.threads)
    device = resolve_device(recipe.device)
    prepared = prepare(recipe, network, calibration, evaluation)
    dynamic = recipe.quant.activations.dynamic
    model = QuantModel(prepared.teacher, make_plan(prepared.teacher, recipe.quant), dynamic)
    timed = min(16, len(prepared.images))
    example = next(batches(prepared.images.subset(range(timed)), timed)).images
    training = planned_training(recipe, calibration)
    memory = peak_bytes(recipe, model, prepared.mount, example, len(prepared.images), training.images, device)
    with torch.inference_mode():
        begin = time.perf_counter()
        prepared.mount(prepared.teacher)(example)
        per_image = (time.perf_counter() - begin) / timed
    evaluation = prepared.evaluation if prepared.evaluation is not None else prepared.images
    evaluated = min(recipe.evaluation.count or len(evaluation), len(evaluation))
    observed = 0 if dynamic else min(recipe.calibration.range_count or len(prepared.images), len(prepared.images))
    seconds = per_image * (observed * (1 + OBSERVED) + evaluated * (1 + QUANTIZED))
    settings = recipe.reconstruct
    if rounds(recipe):
        seconds += 10 * per_image * len(prepared.images)  # measured on ResNet-20: features, moments, solutions
    if learns(recipe):
        for phase in phases(settings):
            size = settings.network.batch_size if phase.name == "network" else settings.batch_size
            seconds += LEARNED * per_image * size * phase.iterations
    if recipe.finetune is not None:
        seconds += per_image * (TRAINED * training.passed + QUANTIZED * (training.looked_at + evaluated))
    mixed, free = recipe.quant.mixed, 0
    if mixed is not None:
        free = len(free_tensors(model.plan, mixed.tensors == "both"))
        passes = 3 if mixed.sensitivity in ("gradient", "fisher") else free * len(mixed.choices)
        seconds += per_image * mixed.images * passes
    return DryRun(model, len(prepared.images), seconds, memory, free, tuple(idle_fields(recipe)))


@dataclass(frozen=True)
class PlannedTraining:
    """How much `finetune` does.

    Args:
        images: it learns from so many.
        passed: images of all steps together.
        looked_at: images held out, of all looks at them together.
    """

    images: int = 0
    passed: int = 0
    looked_at: int = 0


def planned_training(recipe: Recipe, calibration: ImageSet | None = None) -> PlannedTraining:
    """What the recipe's `finetune` asks for, of its images or of those given; nothing without that section.

    Raises:
        CalibQuantError: as `open_set`.
    """
    settings = recipe.finetune
    if settings is None:
        return PlannedTraining()
    images = open_set(recipe, "calibration") if calibration is None else calibration
    learned, held = hold_out(images, settings.holdout, recipe.seed)
    batch = min(settings.batch_size, len(learned))
    per_epoch = steps_per_epoch(len(learned), batch)
    steps = steps_of(settings, per_epoch)
    looks = 1 + math.ceil(steps / per_epoch / settings.evaluate_every)
    return PlannedTraining(len(learned), steps * batch, 0 if held is None else looks * len(held))
