"""Learning a whole network at once, after its units: everything together, so that it decides as the float network."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calibquant.features import take
from calibquant.graph import Unit, units
from calibquant.graph.subgraph import subgraph
from calibquant.parallel import images_at_once, reduced_precision
from calibquant.quantization import QuantModel
from calibquant.recipe import ReconstructRecipe
from calibquant.reconstruction.augmenting import augmented
from calibquant.reconstruction.engine import HELD_OUT, Progress, UnitReport, epochs, is_judged
from calibquant.reconstruction.learnables import restore_state, start_learning, state_of, stop_learning
from calibquant.reconstruction.phases import Phase

LOOKS = 8  # at the judging images on the way; the best state stays
WORSE = 1.5  # times the loss at the start: the rates are too high for this network
BACK = 0.3  # what they are multiplied by then


def whole_network(graph: fx.Graph) -> Unit:
    """A network with one input and one output as a unit."""
    inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
    nodes = tuple(n.name for n in graph.nodes if n.op == "call_function")
    (output,) = next(n for n in graph.nodes if n.op == "output").all_input_nodes
    weights = dict.fromkeys(name for unit in units(graph, "layer") for name in unit.weights)
    return Unit("network", inputs[0], output.name, nodes, tuple(weights))


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
        images: float32, (N, C, H, W), the calibration images, on the CPU.
        recipe: the schedule, and `network`.
        phase: what is learned.
        seed: of the batches and of how images are changed.
        device: where it is learned.
        progress: called with (steps done, steps in all, the loss in words).

    Sources: network-wise tuning after blocks as in Wang et al., "Leveraging Inter-Layer Dependency for Post-Training
    Quantization" (NWQ, NeurIPS 2022), with straight-through instead of annealed roundings.
    """
    begin = time.perf_counter()
    rows = torch.arange(len(images))
    held_out = is_judged(recipe, len(rows))
    judging, learning = (rows[::HELD_OUT], rows[rows % HELD_OUT != 0]) if held_out else (rows, rows)
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
        stop_learning(model)
        restore_state(model, best)
    return UnitReport("network", phase.name, before, after, best is not saved, 1.0, time.perf_counter() - begin)


class _Stage:
    """The network, seen at the outputs of its units and at its own, beside the float network."""

    def __init__(
        self, model: QuantModel, images: Tensor, recipe: ReconstructRecipe, device: torch.device | str, some: Tensor
    ) -> None:
        self.model, self.images, self.recipe, self.device = model, images, recipe, device
        self.unit = whole_network(model.teacher.graph)
        self.at_once = images_at_once(images.shape, recipe.network.batch_size, device)
        blocks = units(model.teacher.graph, "block") if recipe.network.features else []
        names = [*dict.fromkeys(u.output for u in blocks if u.output != self.unit.output), self.unit.output]
        self.student = model.part(self.unit.nodes, names)
        self.teacher = subgraph(model.teacher, self.unit.nodes, names)
        with torch.no_grad():  # what errors are relative to
            self.sizes = [float(v.square().mean()) for v in _outputs(self.teacher, self.take(some[: self.at_once]))]

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
            with torch.no_grad():
                wanted = _outputs(self.teacher, x)
            got = _outputs(self.student, self._entering(x))
        loss = output_loss(got[-1].float(), wanted[-1].float(), settings.temperature)
        errors = [
            (a.float() - b.float()).square().mean() / max(size, 1e-12)
            for a, b, size in zip(got[:-1], wanted[:-1], self.sizes[:-1], strict=True)
        ]
        return loss + settings.features * torch.stack(errors).mean() if errors else loss

    def judge(self, rows: Tensor) -> float:
        """Loss of the output on some images as they are, per image, without a temperature."""
        total = 0.0
        with torch.no_grad():
            for some in rows.split(images_at_once(self.images.shape, 64, self.device)):
                x = self.take(some)
                total += float(output_loss(self.model(x), self.model.teacher(x))) * len(some)
        return total / len(rows)

    def _entering(self, x: Tensor) -> Tensor:
        """The images as they enter the quantized network."""
        quantizer = self.model.activation_quantizers.get(self.unit.input)
        return x if quantizer is None else quantizer(x)


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
        self.batches = epochs(len(rows), settings.batch_size, phase.iterations)
        self.keep()

    def take(self) -> Tensor:
        """One step; its loss."""
        self.optimizer.zero_grad()
        batch, total = next(self.batches), torch.zeros(())
        for part in self.rows[batch].split(self.stage.at_once):
            loss = self.stage.loss(self.stage.changed(part)) * (len(part) / len(batch))
            loss.backward()
            total += loss.detach().cpu()
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


def output_loss(output: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """How far the output of a network is from the float network's, mean over images, a scalar.

    For vectors (N, C) T^2 KL(softmax(target / T) || softmax(output / T)), as in Hinton et al., "Distilling the
    Knowledge in a Neural Network", 2015; else the relative squared error.
    """
    if output.dim() == 2:
        a, b = (output / temperature).log_softmax(1), (target / temperature).log_softmax(1)
        return temperature**2 * F.kl_div(a, b, reduction="batchmean", log_target=True)
    return (output - target).square().mean() / target.square().mean().clamp(min=1e-12)


def rate_at(share: float, rise: float) -> float:
    """What the learning rates are multiplied by when a share of the steps is done: a linear rise upon a cosine fall."""
    return 0.5 * (1 + math.cos(math.pi * min(share, 1.0))) * (min(1.0, share / rise) if rise else 1.0)


def _outputs(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    values = module(x)
    return values if isinstance(values, tuple) else (values,)
