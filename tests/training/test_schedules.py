"""The learning rates against torch's schedulers and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from calibquant.recipe import TrainRecipe
from calibquant.training import learning_rate


@pytest.mark.parametrize(("epochs", "steps", "share"), [(10, 7, 0.3), (3, 50, 0.5), (40, 4, 0.1)])
def test_one_cycle_is_torchs(epochs: int, steps: int, share: float) -> None:
    settings = TrainRecipe(epochs=epochs, lr=0.3, schedule="one-cycle", warm_up=share * epochs)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.3, total_steps=epochs * steps, pct_start=share, cycle_momentum=False
    )
    for step in range(epochs * steps):
        assert learning_rate(settings, step, steps) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step + 1 < epochs * steps:
            theirs.step()


@pytest.mark.parametrize(("epochs", "steps", "warm"), [(10, 5, 2.0), (4, 9, 0.0), (8, 10, 0.25)])
def test_cosine_rises_linearly_and_falls_by_half_a_cosine(epochs: int, steps: int, warm: float) -> None:
    settings = TrainRecipe(epochs=epochs, lr=0.2, warm_up=warm)
    rise, total = warm * steps, epochs * steps
    for step in range(total):
        if step + 1 < rise:
            want = 0.2 * (step + 1) / rise
        else:
            want = 0.1 * (1 + math.cos(math.pi * max(0.0, step - rise) / (total - rise)))
        assert learning_rate(settings, step, steps) == pytest.approx(want, abs=1e-12)


def test_warm_up_has_a_default_for_each_schedule() -> None:
    for schedule, share in (("cosine", 0.05), ("one-cycle", 0.3)):
        left_out = TrainRecipe(epochs=40, schedule=schedule)  # type: ignore[arg-type]
        given = TrainRecipe(epochs=40, schedule=schedule, warm_up=40 * share)  # type: ignore[arg-type]
        rates = [[learning_rate(s, step, 3) for step in range(120)] for s in (left_out, given)]
        assert rates[0] == rates[1]


def test_a_training_of_one_step_has_a_rate() -> None:
    for schedule in ("cosine", "one-cycle"):
        rate = learning_rate(TrainRecipe(epochs=1, schedule=schedule, warm_up=0), 0, 1)  # type: ignore[arg-type]
        assert 0 < rate <= 0.1
