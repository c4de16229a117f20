"""Which images of the calibration set calibrate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx, nn

from calibquant.data import (
    ImageSet,
    Manifest,
    batches,
    check_calibration_set,
    find_images,
    make_manifest,
    read_manifest,
)  # fmt: skip
from calibquant.data.lists import repeated
from calibquant.errors import DataError
from calibquant.numerics.distance import output_loss
from calibquant.parallel import resolve_device
from calibquant.pipeline.reporting import Reporter, note, warn
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan, weight_energies
from calibquant.recipe import Recipe
from calibquant.recipe.section import given
from calibquant.reconstruction import round_weights
from calibquant.selection import Needs, Pool, labelled_pool, needs_of, parse_strategy, score_pool, select

WEIGHTED = "moments-weighted"  # repeats images on purpose
SKETCH_SEED = 0  # of the random filters: the same for all, so that pools can be compared


@dataclass(frozen=True, eq=False)
class Chosen:
    """Calibration images.

    Args:
        indices: where they stand in their set, in the order in which they were chosen.
        manifest: which they are.
    """

    indices: list[int]
    manifest: Manifest


@dataclass(frozen=True, eq=False)
class Candidates:
    """Images to choose from, and the float network that looks at them.

    Args:
        recipe: says how to choose.
        images: the calibration set.
        indices: the candidates in it.
        teacher: the float network's canonical graph.
        mount: puts it where images reach it.
        reporter: hears of progress.
    """

    recipe: Recipe
    images: ImageSet
    indices: Sequence[int]
    teacher: fx.GraphModule
    mount: Callable[[nn.Module], nn.Module]
    reporter: Reporter

    def choose(self, known: Manifest | None = None) -> Chosen:
        """The calibration images, each read and hashed; unreadable ones are left out if the recipe skips them.

        Args:
            known: what was chosen before, for a run that goes on.

        Raises:
            DataError: there are too few images, one cannot be read, or a manifest's image is missing or has changed.
        """
        settings = self.recipe.calibration
        if known is None and settings.manifest is not None:
            known = read_manifest(settings.manifest)
            rows = [row for row in known.rows if row.strategy != WEIGHTED]
            for remark in repeated([row.sha256 for row in rows], [row.path for row in rows]):
                warn(self.reporter, f"{settings.manifest}: {remark}")
        if known is not None:
            chosen = Chosen(find_images(self.images, known.rows), known)
            self._warn_of_range_count(len(known.rows))
            return chosen
        if settings.pool is not None:
            warn_beyond(self.reporter, "calibration.pool", settings.pool, len(self.images), "calibration set")
        pool, seed = self.pool(needs_of(settings.strategy)), self.recipe.seed
        choice = select(pool, settings.count, settings.strategy, seed, partial(self.trial, pool))
        indices, names, scores = [int(pool.indices[row]) for row in choice.rows], choice.strategies, choice.scores
        if self.images.on_error == "skip":  # the manifest lists what calibrates, so unreadable images are found now
            readable = {i for batch in batches(self.images, settings.batch_size, indices) for i in batch.indices}
            kept = [k for k, i in enumerate(indices) if i in readable]
            indices, names = [indices[k] for k in kept], [names[k] for k in kept]
            scores = None if scores is None else [scores[k] for k in kept]
        check_calibration_set(len(indices))
        self._warn_of_range_count(len(indices))
        return Chosen(indices, make_manifest(self.images, indices, names, seed, scores))

    def _warn_of_range_count(self, chosen: int) -> None:
        count = self.recipe.calibration.range_count
        if count is not None and "calibration.range_count" in given(self.recipe):  # a preset's may well be larger
            warn_beyond(self.reporter, "calibration.range_count", count, chosen, "calibration")

    def pool(self, needs: Needs = "network") -> Pool:
        """What is known of the candidates; the float network looks at them only if it must."""
        labelled = labelled_pool(self.images, self.indices)
        if needs == "nothing" or (needs in ("classes", "trial") and (labelled.classes >= 0).all()):
            return labelled
        return self.score(self.images, self.indices)

    def score(self, images: ImageSet, indices: Sequence[int]) -> Pool:
        """What the float network shows of images."""
        note(self.reporter, f"the float network looks at {len(indices)} images")
        device = resolve_device(self.recipe.device)
        return score_pool(
            images, indices, self.teacher.to(device), lambda part: self.mount(part).to(device), SKETCH_SEED,
            self.recipe.calibration.batch_size, device, self.reporter.progress,
        )  # fmt: skip

    def trial(self, pool: Pool, rows: Sequence[int], judging: Sequence[int]) -> float:
        """The KL that the quantized network has on some candidates when others calibrate it.

        Roundings are those of Gram matrices, which follow the images as reconstruction does and take seconds.
        """
        recipe, device = self.recipe, resolve_device(self.recipe.device)
        model = QuantModel(self.teacher.to(device), make_plan(self.teacher, recipe.quant))

        def mount(part: nn.Module) -> nn.Module:
            return self.mount(part).to(device)

        energies = weight_energies(model, recipe.quant, self._batches(pool, rows), mount)
        calibrate_weights(model, recipe.quant, energies=energies)
        calibrate_activations(model, recipe.quant.activations, self._batches(pool, rows), mount)
        model.to(device)
        if sum(node.op == "placeholder" for node in self.teacher.graph.nodes) == 1:
            entering = torch.cat(list(self._batches(pool, rows)))
            for _ in round_weights(model, entering, recipe.reconstruct, recipe.seed, device):
                pass
        quantized, single = self.mount(model).to(device), self.mount(self.teacher).to(device)
        with torch.no_grad():
            losses = [float(output_loss(quantized(x), single(x))) * len(x) for x in self._batches(pool, judging)]
        loss = sum(losses) / len(judging)
        note(self.reporter, f"best-of-random: a draw gives a KL of {loss:.4g} on {len(judging)} other images")
        return loss

    def _batches(self, pool: Pool, rows: Sequence[int]) -> list[Tensor]:
        device = resolve_device(self.recipe.device)
        found = batches(self.images, self.recipe.calibration.batch_size, [int(i) for i in pool.indices[list(rows)]])
        return [batch.images.to(device) for batch in found]


def warn_beyond(reporter: Reporter, field: str, asked: int, there: int, what: str) -> None:
    """Warn of a field of the recipe that asks for more images than there are, where all of them are taken instead."""
    if asked > there:
        warn(reporter, f"{field}={asked} is more than there are; all {there:,} images of the {what} are used")


def candidates_of(recipe: Recipe, images: ImageSet) -> list[int]:
    """The images of a set that may be chosen: all, or a draw of `calibration.pool`.

    Raises:
        DataError: there are fewer than are asked for, or no such strategy.
    """
    settings = recipe.calibration
    parse_strategy(settings.strategy)
    if settings.manifest is not None:
        return list(range(len(images)))
    check_calibration_set(min(settings.count, len(images)))
    if settings.count > len(images):
        problem = f"{settings.count} images are asked for but the set has {len(images)}"
        raise DataError("calibration.count", problem, f"use a count of at most {len(images)}, or more images")
    if settings.pool is None or settings.pool >= len(images):
        return list(range(len(images)))
    drawn = np.random.default_rng([recipe.seed, len(images)]).permutation(len(images))[: settings.pool]
    return sorted(int(i) for i in drawn)
