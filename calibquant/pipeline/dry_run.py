"""What a run would do, without doing it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from calibquant.data import ImageSet, batches
from calibquant.export.artifact import size_of
from calibquant.parallel import resolve_device, set_threads
from calibquant.pipeline.preparing import prepare
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
        peak_bytes: estimated peak memory of parameters and live activations.
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
    resolve_device(recipe.device)
    prepared = prepare(recipe, network, calibration, evaluation)
    dynamic = recipe.quant.activations.dynamic
    model = QuantModel(prepared.teacher, make_plan(prepared.teacher, recipe.quant), dynamic)
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
    observed = 0 if dynamic else min(recipe.calibration.range_count or len(prepared.images), len(prepared.images))
    # Measured shares: an observer costs about 3 forward passes, a quantized pass about 3 float ones.
    seconds = per_image * (observed * 4 + evaluated * (1 + 3))
    batch = max(recipe.calibration.batch_size, recipe.evaluation.batch_size)
    memory = 2 * size_of(model).float32 + batch * peak.bytes
    settings = recipe.reconstruct
    if recipe.quant.weights.rounding == "gram":
        seconds += 10 * per_image * len(prepared.images)  # measured on ResNet-20: features, moments, solutions
        memory += int(min(2 * len(prepared.images) * peak.bytes, settings.cache_limit * 1e9))
    if settings.method != "none":
        # Measured share: a step of every unit costs about 5.5 float passes over its batch. A unit's inputs, its target
        # and the rows it learns on are kept for all images at once, in memory up to the limit.
        steps = sum(phase.iterations for phase in phases(settings))
        seconds += 5.5 * per_image * settings.batch_size * steps
        cached = 3 * len(prepared.images) * peak.bytes / (2 if settings.cache == "bfloat16" else 1)
        memory += int(min(cached, settings.cache_limit * 1e9))
    mixed, free = recipe.quant.mixed, 0
    if mixed is not None:
        free = len(free_tensors(model.plan, mixed.tensors == "both"))
        passes = 3 if mixed.sensitivity in ("gradient", "fisher") else free * len(mixed.choices)
        seconds += per_image * mixed.images * passes
    return DryRun(model, len(prepared.images), seconds, memory, free)


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
