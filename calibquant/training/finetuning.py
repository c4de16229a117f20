"""Quantization-aware training: weights, scales and biases of a quantized network, taught by its float network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from calibquant import parallel
from calibquant.quantization import QuantModel
from calibquant.quantization.bias_units import start_learning_biases
from calibquant.quantization.model import parameter_tensors
from calibquant.quantization.student import Student, distillation_loss
from calibquant.recipe import FinetuneRecipe
from calibquant.recipe.section import checked
from calibquant.training.engine import Training, optimizer_of
from calibquant.training.losses import Stream, classification_loss, mixed_batch
from calibquant.training.source import Source


class Distillation:
    """The loss of quantization-aware training: KL from the float network, errors of units, and the labels' loss.

    Args:
        model: whose training has begun.
        settings: the weights of the parts.
        images: some, float32 (N, ...) on the model's device; on them the size of the units' values is measured.
    """

    def __init__(self, model: QuantModel, settings: FinetuneRecipe, images: Tensor) -> None:
        self.settings = settings
        self.student = Student(model, settings.features > 0)
        self.network = parallel.synchronized(self.student)
        self.sizes = parallel.first(self.student.sizes(images)) if settings.features else [1.0]

    def __call__(self, images: Tensor, labels: Tensor, stream: Stream) -> Tensor:
        return self._loss(self.network, images, labels, stream)

    def measured(self, source: Source, count: int) -> float:
        """The mean loss of the first batches, of at least `count` images or all, as the first epoch sees them."""
        losses, seen = list[float](), 0
        for k, (images, labels) in enumerate(source.epoch(0)):
            with torch.no_grad():
                images = images.contiguous(memory_format=torch.channels_last)
                losses.append(float(self._loss(self.student, images, labels, (source.seed, 0, k))))
            seen += source.batch_size
            if seen >= count:
                break
        return parallel.total(sum(losses) / len(losses)) / parallel.world()

    def _loss(self, network: nn.Module, images: Tensor, labels: Tensor, stream: Stream) -> Tensor:
        settings = self.settings
        images, share, partners = mixed_batch(images, settings.mixup, stream)
        with parallel.reduced_precision(images.device, settings.precision):
            got = network(images)
            wanted = self.student.wanted(images) if settings.distill else ()
        parts = []
        if settings.distill:
            loss = distillation_loss(got, wanted, self.sizes, settings.features, settings.temperature)
            parts.append(settings.distill * loss)
        if settings.labels:
            loss = classification_loss(got[-1], labels, settings.label_smoothing, share, partners)
            parts.append(settings.labels * loss)
        return torch.stack(parts).sum()


def begin_finetuning(model: QuantModel, settings: FinetuneRecipe, images: Tensor) -> Training:
    """A quantized network before the first step of its training; what it computes is what it computed before.

    With AdamW all parameters are relative: weights count in steps of their grids, biases in standard deviations of
    what they are added to, scales and ends of ranges in shares of themselves. With SGD they are absolute, and LSQ
    scales their gradients.

    Args:
        model: calibrated, on its device, with a bias at every product.
        settings: what is learned, and how.
        images: some, float32 (N, ...) on the model's device, on which the deviations are measured.

    Raises:
        RecipeError: the settings were copied with a value that is not valid.
        QuantizationError: a weight or an activation cannot be learned in the way the settings name.
    """
    settings = checked(settings)
    relative, tensors = settings.optimizer == "adamw", parameter_tensors(model.teacher)
    kind = settings.activations
    latent = [q.start_training(tensors[n], settings.weights, relative) for n, q in model.weight_quantizers.items()]
    scales = [w.learned_scale for w in latent if w.learned_scale.requires_grad]
    for quantizer in (q for q in model.activation_quantizers.values() if not q.dynamic and kind != "fixed"):
        if kind in ("pact", "ulq"):
            scales += quantizer.start_learning_ends(kind, relative)
            continue
        scales.append(quantizer.start_learning(relative, by_image=True))
        if kind == "lsq+":
            scales.append(quantizer.start_learning_zero_point())
    if relative:
        biases = start_learning_biases(model, images)
    else:
        deltas = model.bias_deltas.items()
        biases = [delta.start_learning(model.bias_of(n).numel(), 1.0, images.device) for n, delta in deltas]
    # PACT holds its ends back as it does weights; in shares of the ends this would pull them to where they began.
    decay = settings.weight_decay if kind == "pact" and not relative else 0.0
    ranges = {"factor": settings.scale_lr / settings.lr, "until": settings.freeze, "weight_decay": decay}
    plain = {"factor": 1.0, "until": 1.0}
    groups: list[dict[str, Any]] = [
        {"params": [w.latent for w in latent], "weight_decay": settings.weight_decay, **plain},
        {"params": biases, "weight_decay": 0.0, **plain},
        {"params": scales, **ranges},
    ]
    optimizer = optimizer_of([group for group in groups if group["params"]], settings)
    return Training(model, copy.deepcopy(model) if settings.ema else None, optimizer)


def finished(training: Training, kept: nn.Module) -> QuantModel:
    """The quantized network that a training ends with: codes, scales and biases have what was learned.

    Args:
        training: from `begin_finetuning`.
        kept: what `fit` gave back: its network, or the average.
    """
    assert isinstance(kept, QuantModel)
    kept.stop_learning()
    if training.network is not kept and isinstance(training.network, QuantModel):
        training.network.stop_learning()
    return kept
