"""A network and images so small that a training takes a fraction of a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from calibquant.data import TensorImages
from calibquant.recipe import AugmentRecipe, Preprocess, TrainRecipe
from calibquant.training import Source, Training, begin_training, open_source

CPU = torch.device("cpu")
CHANGES = AugmentRecipe(pad=1, flip=True, cutout=2)


def network(seed: int = 0) -> nn.Module:
    """Convolution, BatchNorm, dropout and a classifier of 3 classes, for images (3, 8, 8)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3),
        )  # fmt: skip


def images(count: int = 50, seed: int = 1) -> TensorImages:
    """Noise in which one channel is brighter: the label."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=random)
    noise = torch.randn(count, 3, 8, 8, generator=random)
    noise[torch.arange(count), labels] += 1.0
    return TensorImages(noise, labels.tolist())


def settings(**fields: Any) -> TrainRecipe:
    """A training of 5 epochs with batches of 8, and all that has a state or draws numbers."""
    usual = {"epochs": 5, "batch_size": 8, "lr": 0.05, "mixup": 0.2, "ema": 0.9, "label_smoothing": 0.1, "clip": 1.0}
    return TrainRecipe.model_validate(usual | fields)


def begin(train: TrainRecipe, seed: int = 9, augment: AugmentRecipe = CHANGES) -> tuple[Training, Source]:
    """The training before its first step, and its images."""
    source = open_source(images(), augment, Preprocess(), train.batch_size, seed, CPU)
    return begin_training(network(), train, train.epochs * source.steps, CPU), source
