"""Learning a whole network at once, after its units: everything together, so that it decides as the float network."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from calibquant import parallel
from calibquant.features import take
from calibquant.numerics.distance import output_loss
from calibquant.parallel import images_at_once, reduced_precision
from calibquant.quantization import QuantModel
from calibquant.quantization.student import Student, distillation_loss
from calibquant.recipe import ReconstructRecipe
from calibquant.reconstruction.augmenting import augmented
from calibquant.reconstruction.engine import Progress, UnitReport, epochs, is_judged, parted
from calibquant.reconstruction.learnables import restore_state, start_learning, state_of
from calibquant.reconstruction.phases import Phase

LOOKS = 8  # at the judging images on the way; the best state stays
WORSE = 1.5  # times the loss at the start: the rates are too high for this network
BACK = 0.3  # what they are multiplied by then


def learn_network(
    model: QuantModel,
    images: Tensor,
    recipe: ReconstructRecipe,
    phase: Phase,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> UnitReport:
    """Learn roundings, scales and biases of all layers from where the units' learning ended.

    The loss is KL(float || quantized) of the outputs as probabilities (the relative squared error, if the output is no
    vector), plus `network.features` times the mean over the units of the relative squared error of what they give. The
    roundings are decided in every forward pass, so the network that is judged is the one that runs. With `never_worse`
    and at least 64 images, every eighth is held out and looked at LOOKS times; the state with the least output loss on
    these is kept, which may be the first. A look that finds it WORSE than at the start goes back to the best state, and
    on with BACK times the rates: some networks need gentler ones.

    Args:
        model: calibrated, on `device`; its quantizers and biases receive the result.
        images: float32, (N, C, H, W), the calibration images, on the CPU; the same in all processes, each of which
            learns on its share.
        recipe: the schedule, and `network`.
        phase: what is learned.
        seed: of the batches and of how images are changed.
        device: where it is learned.
        progress: called with (steps done, steps in all, the loss in words).

    Sources: network-wise tuning after blocks as in Wang et al., "Leveraging Inter-Layer Dependency for Post-Training
    Quantization" (NWQ, NeurIPS 2022), with straight-through instead of annealed roundings.
    """
    begin = time.perf_counter()
    held_out = is_judged(recipe, len(images))
    judging, learning = parted(recipe, len(images))
    stage = _Stage(model, images, recipe, device, learning)
    saved = best = state_of(model)
    before = after = stage.judge(judging)
    every = max(1, phase.iterations // LOOKS)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            torch.manual_seed(seed)
            steps = _Steps(stage, learning, phase)
            for step in range(1, phase.iterations + 1):
                loss = steps.take()
                if progress:
                    progress(step, phase.iterations, f"loss {float(loss):.3g}")
                if step == phase.iterations or (held_out and step % every == 0):
                    reached = stage.judge(judging)
                    if reached < after if held_out else math.isfinite(reached):
                        best, after = state_of(model), reached
                        steps.keep()
                    elif not reached <= WORSE * before:
                        steps.go_back()
    except BaseException:
        best = saved
        raise
    finally:
        model.stop_learning()
        restore_state(model, best)
    return UnitReport("network", phase.name, before, after, best is not saved, 1.0, time.perf_counter() - begin)


class _Stage:
    """The network beside the float network, and the images."""

    def __init__(
        self, model: QuantModel, images: Tensor, recipe: ReconstructRecipe, device: torch.device | str, some: Tensor
    ) -> None:
        self.model, self.images, self.recipe, self.device = model, images, recipe, device
        self.at_once = images_at_once(images.shape, recipe.network.batch_size, device)
        self.student = Student(model, recipe.network.features > 0)
        self.sizes = self.student.sizes(self.take(some[: self.at_once]))

    def take(self, rows: Tensor) -> Tensor:
        """Some images."""
        return take(self.images, rows, self.device)

    def changed(self, rows: Tensor) -> Tensor:
        """Some images, changed at random if the recipe asks for it."""
        x = self.take(rows)
        return augmented(x) if self.recipe.network.augment and x.dim() == 4 else x

    def loss(self, x: Tensor) -> Tensor:
        """What is minimized, on some images."""
        settings = self.recipe.network
        with reduced_precision(self.device, self.recipe.precision):
            wanted, got = self.student.wanted(x), self.student(x)
        return distillation_loss(got, wanted, self.sizes, settings.features, settings.temperature)

    def judge(self, rows: Tensor) -> float:
        """Loss of the output on some images as they are, per image, without a temperature."""
        total = 0.0
        with torch.no_grad():
            mine = rows[parallel.share(len(rows))]
            for some in mine.split(images_at_once(self.images.shape, 64, self.device)):
                if len(some):
                    x = self.take(some)
                    total += float(output_loss(self.model(x), self.model.teacher(x))) * len(some)
        return parallel.total(total) / len(rows)


class _Steps:
    """The optimization, step by step; what is learned is in place."""

    def __init__(self, stage: _Stage, rows: Tensor, phase: Phase) -> None:
        settings = stage.recipe.network
        self.stage, self.rows = stage, rows
        learned = start_learning(stage.model, phase.rates, stage.take(rows[: stage.at_once]), decided=True)
        self.optimizer = torch.optim.Adam([*learned.rounding_groups, *learned.other_groups])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate_at((step + 1) / phase.iterations, settings.rise)
        )
        self.batches = parallel.drawn(epochs(len(rows), settings.batch_size, phase.iterations))
        self.keep()

    def take(self) -> Tensor:
        """One step; its loss."""
        self.optimizer.zero_grad()
        batch, total = next(self.batches), torch.zeros(())
        for part in self.rows[batch][parallel.share(len(batch))].split(self.stage.at_once):
            if not len(part):
                continue
            loss = self.stage.loss(self.stage.changed(part)) * (len(part) / len(batch))
            loss.backward()
            total += loss.detach().cpu()
        parallel.sum_gradients(self._parameters())
        self.optimizer.step()
        self.schedule.step()
        return total

    def keep(self) -> None:
        """Remember where everything is."""
        self.kept = [p.detach().clone() for p in self._parameters()]

    def go_back(self) -> None:
        """Everything is where it was remembered, and moves more gently from now on."""
        with torch.no_grad():
            for parameter, kept in zip(self._parameters(), self.kept, strict=True):
                parameter.copy_(kept)
        self.schedule.base_lrs = [BACK * rate for rate in self.schedule.base_lrs]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def rate_at(share: float, rise: float) -> float:
    """What the learning rates are multiplied by when a share of the steps is done: a linear rise upon a cosine fall."""
    return 0.5 * (1 + math.cos(math.pi * min(share, 1.0))) * (min(1.0, share / rise) if rise else 1.0)
