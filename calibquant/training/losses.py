"""The training loss, with mixup."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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
