"""How far the outputs of two networks are apart."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def output_loss(output: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """How far the output of a network is from the float network's, mean over images, a scalar.

    For vectors (N, C) T^2 KL(softmax(target / T) || softmax(output / T)), as in Hinton et al., "Distilling the
    Knowledge in a Neural Network", 2015; else the relative squared error.
    """
    if output.dim() == 2:
        a, b = (output / temperature).log_softmax(1), (target / temperature).log_softmax(1)
        return temperature**2 * F.kl_div(a, b, reduction="batchmean", log_target=True)
    return (output - target).square().mean() / target.square().mean().clamp(min=1e-12)
