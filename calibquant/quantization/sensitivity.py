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
    """The harm of quantizing one tensor alone, all others float.

    Args:
        names: the T tensors.
        choices: the C bit widths.
        loss: float64 (T, C), KL(float network's classes || classes with the tensor quantized), nats, mean over images.
        disagreement: float64 (T, C), share of images whose predicted class changes.
        products: float64 (T * C, T * C): mean over the images of d' (diag(p) - p p') e, d and e the changes of the
            logits by two tensors and p the float network's classes; see `interactions`.
        images: how many.
    """

    names: tuple[str, ...]
    choices: tuple[int, ...]
    loss: Array
    disagreement: Array
    products: Array
    images: int

    def interactions(self) -> Array:
        """The matrix Q with x' Q x the estimated KL of several tensors at once, x their 0-1 choices (T * C).

        The changes of the logits are taken to add. Then to second order KL = 1/2 (sum d)' (diag(p) - p p') (sum d), so
        that Q = products / 2. Each row and column is scaled so that the diagonal is the KL that was measured: at few
        bits it is smaller than its second order.
        """
        half = self.products / 2
        diagonal = half.diagonal()
        measured = self.loss.ravel().clip(min=0)
        factor = (measured / diagonal.clip(min=1e-300)) ** 0.5 * (diagonal > 0)
        return half * factor[:, None] * factor[None, :]


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
    loss, changed = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(len(pairs), dtype=torch.float64)
    products = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
    images = 0
    with torch.inference_mode():
        for batch in batches:
            want = teacher(batch).cpu()
            shifts = torch.empty(len(pairs), want.numel())
            for i, (name, bits) in enumerate(pairs):
                with only(models[bits], name):
                    got = networks[bits](batch).cpu()
                loss[i] += divergence(want, got).sum()
                changed[i] += (got.argmax(1) != want.argmax(1)).sum()
                shifts[i] = _weighted_shift(want, got).reshape(-1)
            products += (shifts @ shifts.T).double()
            images += len(batch)
            if progress:
                progress(images)
    if not images:
        raise QuantizationError("sensitivity", "got no images", "give at least one calibration image")
    shape = (len(names), len(models))
    harm, share = ((value / images).reshape(shape).numpy() for value in (loss, changed))
    return Sensitivity(tuple(names), tuple(models), harm, share, (products / images).numpy(), images)


def fisher(
    models: Models,
    names: Sequence[str],
    batches: Iterable[Tensor],
    mount: Mount = lambda network: network,
    seed: int = 0,
) -> Array:
    """Second-order estimate of the KL of rounding each weight alone, from one backward pass an image; (T, C), in nats.

    1/2 dw' F dw with the change dw of the weight and the Fisher information F = J' (diag(p) - p p') J, J the logits'
    derivative by the weight and p the network's classes: at the float weights the KL has no gradient, and F is its
    second derivative (Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR 2020). F is
    sampled: for v = sqrt(p) * z - p (sqrt(p)'z), z standard normal, E[v v'] = diag(p) - p p', so that 1/2 (v' J dw)^2 has the
    wanted mean, and v' J is the gradient of v' logits. (Drawing a class y for the gradient of -log p(y) has the same
    mean, but hangs on the few images in which an unlikely class is drawn.)

    Args:
        models: see `choice_models`.
        names: weights.
        batches: images, (N, C, H, W) float32, on the models' device.
        mount: see `one_at_a_time`.
        seed: of z.

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
            root = logits.detach().softmax(0).sqrt()
            noise = torch.randn(len(root), generator=stream).to(root)
            v = root * noise - root.square() * (root @ noise)
            gradients = torch.autograd.grad(v @ logits, list(held.weights.values()))
            for i, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
                costs[i] += (changes[name] * gradient).flatten(1).sum(1).double().square().cpu() / 2
            images += 1
    if not images:
        raise QuantizationError("sensitivity", "got no images", "give at least one calibration image")
    return (costs / images).numpy()


def divergence(want: Tensor, got: Tensor) -> Tensor:
    """KL(classes of `want` || classes of `got`) of every image, float64 (N,), in nats; logits are (N, K)."""
    p, q = want.double().log_softmax(1), got.double().log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


@contextmanager
def only(model: QuantModel, name: str) -> Iterator[None]:
    """Within the context one weight or activation is quantized, and nothing else."""
    with model.float_mode():
        quantizers: Mapping[str, Any] = {**model.weight_quantizers, **model.activation_quantizers}
        quantizers[name].enabled = True
        yield


def _weighted_shift(want: Tensor, got: Tensor) -> Tensor:
    """sqrt(p) * (d - p'd), whose inner products are d' (diag(p) - p p') e; float32 (N, K)."""
    p = want.double().softmax(1)
    shift = got.double() - want.double()
    return (p.sqrt() * (shift - (p * shift).sum(1, keepdim=True))).float()


class _Held(nn.Module):
    """The float network with some of its weights as tensors that take gradients."""

    def __init__(self, teacher: fx.GraphModule, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.teacher, self.weights = teacher, weights

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(self.teacher, self.weights, inputs)
        return output
