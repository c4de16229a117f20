"""Supervised training of a float network on images that fit in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fit(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    seed: int,
    learning_rate: float = 0.1,
    batch_size: int = 64,
    shift: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Train a classifier with SGD, one-cycle learning rate and random shifts; returns it in eval mode.

    Args:
        network: takes (N, C, H, W) float32, returns logits (N, classes).
        images: the training images, preprocessed.
        labels: int64, (N,).
        epochs: passes over the images.
        seed: of the order, the shifts and nothing else; the network comes initialized.
        learning_rate: peak of the one-cycle schedule.
        batch_size: images a step; a last smaller batch is dropped.
        shift: each batch is moved by up to this many pixels in either direction.
        progress: called with (steps done, steps in all).
    """
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    network.train()
    done = 0
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
            dy, dx = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
            logits = network(_shifted(images[batch], dy, dx))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if progress:
                progress(done, steps)
    return network.eval()


def _shifted(images: Tensor, dy: int, dx: int) -> Tensor:
    """Images moved by (dy, dx) pixels, the border repeated."""
    height, width = images.shape[-2:]
    reach = max(abs(dy), abs(dx))
    padded = F.pad(images, (reach,) * 4, mode="replicate") if reach else images
    return padded[..., reach + dy : reach + dy + height, reach + dx : reach + dx + width]
