"""What a run would do, without doing it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from calibquant.data import ImageSet, batches
from calibquant.parallel import resolve_device, set_threads
from calibquant.pipeline.memory import peak_bytes
from calibquant.pipeline.preparing import prepare
from calibquant.pipeline.stages import learns, rounds
from calibquant.quantization import QuantModel, make_plan
from calibquant.quantization.sensitivity import free_tensors
from calibquant.recipe import Recipe
from calibquant.reconstruction.phases import phases


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Args:
        model: the planned, uncalibrated network.
        images: calibration images.
        seconds: estimated time, from one timed batch.
        peak_bytes: estimated peak memory, see `pipeline.memory`.
        mixed: how many tensors will get other bits than planned, by `quant.mixed`.
    """

    model: QuantModel
    images: int
    seconds: float
    peak_bytes: int
    mixed: int = 0


def dry_run(
    recipe: Recipe,
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
    set_threads(recipe.threads)
    device = resolve_device(recipe.device)
    prepared = prepare(recipe, network, calibration, evaluation)
    dynamic = recipe.quant.activations.dynamic
    model = QuantModel(prepared.teacher, make_plan(prepared.teacher, recipe.quant), dynamic)
    timed = min(16, len(prepared.images))
    example = next(batches(prepared.images.subset(range(timed)), timed)).images
    memory = peak_bytes(recipe, model, prepared.mount, example, len(prepared.images), device)
    with torch.inference_mode():
        begin = time.perf_counter()
        prepared.mount(prepared.teacher)(example)
        per_image = (time.perf_counter() - begin) / timed
    evaluation = prepared.evaluation if prepared.evaluation is not None else prepared.images
    evaluated = min(recipe.evaluation.count or len(evaluation), len(evaluation))
    observed = 0 if dynamic else min(recipe.calibration.range_count or len(prepared.images), len(prepared.images))
    # Measured shares: an observer costs about 3 forward passes, a quantized pass about 3 float ones.
    seconds = per_image * (observed * 4 + evaluated * (1 + 3))
    settings = recipe.reconstruct
    if rounds(recipe):
        seconds += 10 * per_image * len(prepared.images)  # measured on ResNet-20: features, moments, solutions
    if learns(recipe):
        # Measured share: a step of every unit costs about 5.5 float passes over its batch, one of the network as many.
        for phase in phases(settings):
            size = settings.network.batch_size if phase.name == "network" else settings.batch_size
            seconds += 5.5 * per_image * size * phase.iterations
    mixed, free = recipe.quant.mixed, 0
    if mixed is not None:
        free = len(free_tensors(model.plan, mixed.tensors == "both"))
        passes = 3 if mixed.sensitivity in ("gradient", "fisher") else free * len(mixed.choices)
        seconds += per_image * mixed.images * passes
    return DryRun(model, len(prepared.images), seconds, memory, free)
