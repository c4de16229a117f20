"""The loss of float training, with mixup."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibquant.parallel import reduced_precision
from calibquant.recipe import TrainRecipe

_MIXUP, _DROPOUT = 5, 6  # streams of their own; others are in data.augment and training.source

Stream = tuple[int, int, int]  # seed, epoch and step, of which a step's randomness is made
Objective = Callable[[Tensor, Tensor, Stream], Tensor]  # from images (N, ...) and labels (N,) to a scalar


@dataclass(frozen=True, eq=False)
class Classification:
    """The cross-entropy of a network's logits, mixup included.

    Args:
        network: from images to logits.
        settings: mixup, label smoothing and precision.
    """

    network: nn.Module
    settings: TrainRecipe

    def __call__(self, images: Tensor, labels: Tensor, stream: Stream) -> Tensor:
        settings = self.settings
        images, share, partners = mixed_batch(images, settings.mixup, stream)
        with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
            torch.manual_seed(int(np.random.default_rng([_DROPOUT, *stream]).integers(1 << 62)))
            with reduced_precision(images.device, settings.precision):
                logits = self.network(images)
        return classification_loss(logits, labels, settings.label_smoothing, share, partners)


def mixed_batch(images: Tensor, alpha: float, stream: Stream) -> tuple[Tensor, float, Tensor | None]:
    """Images mixed with others of the batch, with share and partners for their labels; as they are for alpha 0."""
    if not alpha:
        return images, 1.0, None
    share, partners = mixing(len(images), alpha, np.random.default_rng([_MIXUP, *stream]))
    partners = partners.to(images.device)
    return mixed(images, share, partners).contiguous(memory_format=torch.channels_last), share, partners


def mixing(count: int, alpha: float, generator: np.random.Generator) -> tuple[float, Tensor]:
    """Mixup's draws for a batch: the share, Beta(alpha, alpha), and the partner of each image, int64 (count,)."""
    share = float(generator.beta(alpha, alpha))
    return share, torch.from_numpy(generator.permutation(count))


def mixed(images: Tensor, share: float, partners: Tensor) -> Tensor:
    """share * images + (1 - share) * their partners (Zhang et al., "mixup", ICLR 2018), the shape of `images`."""
    return torch.lerp(images[partners], images, share)


def classification_loss(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, share: float = 1.0, partners: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in float32; with partners, that of the mixed labels, which is linear in them.

    Args:
        logits: shape (N, classes).
        labels: int64, shape (N,).
        smoothing: share of each label that is spread evenly over all classes (Szegedy et al., CVPR 2016).
        share, partners: from `mixing`.
    """
    logits = logits.float()
    own = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if partners is None:
        return own
    return share * own + (1 - share) * F.cross_entropy(logits, labels[partners], label_smoothing=smoothing)
