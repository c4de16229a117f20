"""Learning rates as functions of the step."""

from __future__ import annotations

import math

from calibquant.errors import unknown
from calibquant.recipe import TrainRecipe

START, END = 1 / 25, 1 / 250_000  # of the one-cycle schedule, as shares of its peak

WARM_UP = {"cosine": 0.05, "one-cycle": 0.3}  # share of the epochs, where the recipe gives none


def steps_of(settings: TrainRecipe, steps_per_epoch: int) -> int:
    """Steps of a whole training."""
    return settings.epochs * steps_per_epoch if settings.iterations is None else settings.iterations


def learning_rate(settings: TrainRecipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0 over all epochs.

    cosine: a linear rise from lr / w to lr over the w steps of the warm-up (Goyal et al., arXiv:1706.02677), then
    lr (1 + cos(π t)) / 2 for t from 0 to below 1 (Loshchilov and Hutter, ICLR 2017). one-cycle: cosines from lr / 25 to
    lr and down to lr / 250,000 (Smith and Topin, arXiv:1708.07120, with the bounds of torch's OneCycleLR).

    Example:
        >>> settings = TrainRecipe(epochs=10, warm_up=2, lr=0.4)
        >>> [round(learning_rate(settings, step, 1), 3) for step in (0, 1, 2, 6)]
        [0.2, 0.4, 0.4, 0.2]
    """
    if settings.schedule not in WARM_UP:
        raise unknown("train.schedule", settings.schedule, WARM_UP)
    total = steps_of(settings, steps_per_epoch)
    rise = WARM_UP[settings.schedule] * total if settings.warm_up is None else settings.warm_up * steps_per_epoch
    rise = min(rise, total - 1)
    if settings.schedule == "cosine":
        if step + 1 < rise:
            return settings.lr * (step + 1) / rise
        return _cosine(settings.lr, 0.0, (step - rise) / (total - rise))
    if step < rise - 1:
        return _cosine(START * settings.lr, settings.lr, step / (rise - 1))
    last = max(rise - 1, 0.0)
    return _cosine(settings.lr, END * settings.lr, (step - last) / max(total - 1 - last, 1.0))


def _cosine(begin: float, end: float, share: float) -> float:
    """From `begin` at share 0 to `end` at share 1 along half a cosine."""
    return end + (begin - end) * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2
