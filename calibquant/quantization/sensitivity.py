"""What it costs the network's decisions to give one tensor few bits, on images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calibquant.errors import QuantizationError
from calibquant.numerics.budget import Array
from calibquant.quantization.calibration import calibrate_weights
from calibquant.quantization.model import QuantModel, parameter_tensors
from calibquant.quantization.plan import QuantPlan, make_plan
from calibquant.recipe import QuantRecipe

Mount = Callable[[nn.Module], nn.Module]
Models = Mapping[int, QuantModel]  # bits -> the network in which every tensor in question has so many


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The harm of quantizing one tensor alone, all others float; means over the images.

    Args:
        names: the T tensors.
        choices: the C bit widths.
        logits: float64 (T, C), mean square over the classes of the change of the centered logits.
        loss: float64 (T, C), KL(float network's classes || classes with the tensor quantized), in nats.
        disagreement: float64 (T, C), share of images whose predicted class changes.
        interactions: float64 (T * C, T * C), mean over the classes of d * e, d and e the changes of the centered logits
            by two tensors. Where changes add, x' interactions x is `logits` of several tensors at once, x their 0-1
            choices; its diagonal is `logits`.
        images: how many.
    """

    names: tuple[str, ...]
    choices: tuple[int, ...]
    logits: Array
    loss: Array
    disagreement: Array
    interactions: Array
    images: int


def free_tensors(plan: QuantPlan, activations: bool = False) -> tuple[str, ...]:
    """The weights, and with `activations` also those, whose bits neither the boundary rule nor the recipe fixes."""
    plans = {**plan.weights, **(plan.activations if activations else {})}
    return tuple(name for name, p in plans.items() if p.role == "main")


def choice_models(
    teacher: fx.GraphModule,
    recipe: QuantRecipe,
    names: Sequence[str],
    choices: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, QuantModel]:
    """For each bit width the network in which the named tensors have it; weights are rounded, ranges not yet found."""
    models: dict[int, QuantModel] = {}
    for number, bits in enumerate(choices):
        chosen = recipe.model_copy(update={"bits": {**recipe.bits, **dict.fromkeys(names, bits)}})
        models[bits] = QuantModel(teacher, make_plan(teacher, chosen), recipe.activations.dynamic)
        calibrate_weights(models[bits], chosen)
        if progress:
            progress(number + 1, len(choices))
    return models


def one_at_a_time(
    models: Models,
    names: Sequence[str],
    batches: Iterable[Tensor],
    mount: Mount = lambda network: network,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Measure every tensor at every choice: T * C forward passes over the images.

    Args:
        models: see `choice_models`; for activations their ranges must have been found.
        names: tensors to measure.
        batches: images, (N, C, H, W) float32, on the models' device.
        mount: puts the network where images reach it; a part of a larger network is mounted in that.
        progress: called with the images done.

    Raises:
        QuantizationError: there are no images.
    """
    pairs = [(name, bits) for name in names for bits in models]
    teacher = mount(next(iter(models.values())).teacher)
    networks = {bits: mount(model) for bits, model in models.items()}
    harms, images = torch.zeros(3, len(pairs), dtype=torch.float64), 0
    products = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
    with torch.inference_mode():
        for batch in batches:
            want, shifts = teacher(batch).cpu(), []
            for i, (name, bits) in enumerate(pairs):
                with only(models[bits], name):
                    got = networks[bits](batch).cpu()
                harms[:, i] += torch.stack([harm.sum() for harm in harm_of(want, got)])
                shifts.append(centered(got - want).reshape(-1))
            products += (torch.stack(shifts) @ torch.stack(shifts).T).double() / want.shape[1]
            images += len(batch)
            if progress:
                progress(images)
    _require(images)
    logits, loss, changed = (row.reshape(len(names), len(models)).numpy() for row in harms / images)
    return Sensitivity(tuple(names), tuple(models), logits, loss, changed, (products / images).numpy(), images)


def second_order(
    models: Models,
    names: Sequence[str],
    batches: Iterable[Tensor],
    mount: Mount = lambda network: network,
    seed: int = 0,
    of_loss: bool = False,
) -> Array:
    """What `one_at_a_time` measures, estimated for weights from one backward pass an image; float64 (T, C).

    dw' J' M J dw with the change dw of the weight and the logits' derivative J by it. For `logits` M is the centering
    of K classes, divided by K. For the KL it is half of diag(p) - p p', p the float network's classes: then J' 2M J is
    the Fisher information, the KL's second derivative at the float weights (Martens, "New Insights and Perspectives on
    the Natural Gradient Method", JMLR 2020). Both are sampled: for a random v with E[v v'] = M, (v' J dw)^2 has the
    wanted mean, and v' J is the gradient of v' logits. With z standard normal, v = (z - mean(z)) / sqrt(K), or
    v = (sqrt(p) * z - p (sqrt(p)' z)) / sqrt(2).

    Args:
        models: see `choice_models`.
        names: weights.
        batches: images, (N, C, H, W) float32, on the models' device.
        mount: see `one_at_a_time`.
        seed: of z.
        of_loss: estimate the KL, in nats, and not the change of the logits.

    Raises:
        QuantizationError: there are no images.
    """
    teacher = next(iter(models.values())).teacher
    tensors = parameter_tensors(teacher)
    held = _Held(teacher, {name: tensors[name].detach().requires_grad_() for name in names})
    changes = {
        name: torch.stack([m.weight_quantizers[name].get().dequantize() - tensors[name] for m in models.values()])
        for name in names
    }
    network, stream, images = mount(held), torch.Generator().manual_seed(seed), 0
    costs = torch.zeros(len(names), len(models), dtype=torch.float64)
    for batch in batches:
        for image in batch:
            logits = network(image[None])[0]
            v = _direction(logits.detach(), torch.randn(len(logits), generator=stream).to(logits), of_loss)
            gradients = torch.autograd.grad(v @ logits, list(held.weights.values()))
            for i, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
                costs[i] += (changes[name] * gradient).flatten(1).sum(1).cpu().double().square()
            images += 1
    _require(images)
    return (costs / images).numpy()


def harm_of(want: Tensor, got: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every image, float64 (N,): mean square of the change of the centered logits, KL in nats, 1 for another class.

    Args:
        want: logits of the float network, (N, K).
        got: of the quantized one.
    """
    p, q = want.double().log_softmax(1), got.double().log_softmax(1)
    divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(1)
    return centered(got - want).double().square().mean(1), divergence, (got.argmax(1) != want.argmax(1)).double()


def centered(logits: Tensor) -> Tensor:
    """Logits (N, K) less their mean over the classes, which decides nothing."""
    return logits - logits.mean(1, keepdim=True)


@contextmanager
def only(model: QuantModel, name: str) -> Iterator[None]:
    """Within the context one weight or activation is quantized, and nothing else."""
    with model.float_mode():
        quantizers: Mapping[str, Any] = {**model.weight_quantizers, **model.activation_quantizers}
        quantizers[name].enabled = True
        yield


def _direction(logits: Tensor, noise: Tensor, of_loss: bool) -> Tensor:
    if not of_loss:
        return (noise - noise.mean()) / len(noise) ** 0.5
    root = logits.softmax(0).sqrt()
    return (root * noise - root.square() * (root @ noise)) / 2**0.5


def _require(images: int) -> None:
    if not images:
        raise QuantizationError("sensitivity", "got no images", "give at least one calibration image")


class _Held(nn.Module):
    """The float network with some of its weights as tensors that take gradients."""

    def __init__(self, teacher: fx.GraphModule, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.teacher, self.weights = teacher, weights

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(self.teacher, self.weights, inputs)
        return output
