"""The schedule, the losses and the phases of a method, against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibquant.recipe import ReconstructRecipe
from calibquant.reconstruction.losses import feature_loss, importance_of, regularizer_exponent
from calibquant.reconstruction.phases import phases


@pytest.mark.parametrize(
    ("step", "steps", "warm_up", "beta", "want"),
    [
        (1, 100, 0.2, (20, 2), None), (19, 100, 0.2, (20, 2), None), (20, 100, 0.2, (20, 2), 20.0),
        (21, 100, 0.2, (20, 2), 19.775), (40, 100, 0.2, (20, 2), 15.5), (60, 100, 0.2, (20, 2), 11.0),
        (80, 100, 0.2, (20, 2), 6.5), (100, 100, 0.2, (20, 2), 2.0), (1, 10, 0.0, (20, 2), 18.2),
        (5, 10, 0.0, (20, 2), 11.0), (10, 10, 0.0, (20, 2), 2.0), (4, 10, 0.5, (8, 3), None), (5, 10, 0.5, (8, 3), 8.0),
        (8, 10, 0.5, (8, 3), 5.0), (1, 1, 0.2, (20, 2), 2.0), (3000, 20000, 0.2, (20, 2), None),
        (12000, 20000, 0.2, (20, 2), 11.0),
    ],
)  # fmt: skip
def test_the_exponent_falls_linearly_after_the_warm_up(
    step: int, steps: int, warm_up: float, beta: tuple[float, float], want: float | None
) -> None:
    got = regularizer_exponent(step, steps, warm_up, beta)
    assert got == (None if want is None else pytest.approx(want))


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4, 2), (1, 7), (2, 1, 3, 3)])
def test_the_loss_sums_over_channels_and_averages_the_rest(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    output, target = generator.normal(size=shape), generator.normal(size=shape)
    want = 0.0
    for index in np.ndindex(*shape):
        want += (output[index] - target[index]) ** 2
    want /= np.prod(shape) / shape[1]
    got = feature_loss(torch.from_numpy(output), torch.from_numpy(target))
    assert got.shape == ()
    assert got.item() == pytest.approx(want)


@pytest.mark.parametrize("power", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_powered_and_weighted_loss_is_the_stated_sum(power: float, weighted: bool) -> None:
    """In numpy, float64: sum over channels, mean over images and places."""
    rng = np.random.default_rng(1)
    output, target = rng.normal(size=(3, 4, 2, 5)), rng.normal(size=(3, 4, 2, 5))
    importance = rng.uniform(0, 2, size=target.shape) if weighted else np.ones(target.shape)
    want = (np.abs(output - target) ** power * importance).sum(axis=1).mean()
    given = torch.from_numpy(importance) if weighted else None
    assert float(feature_loss(torch.from_numpy(output), torch.from_numpy(target), power, given)) == pytest.approx(want)


def test_importance_is_half_even_and_half_fisher_whatever_the_gradients_size() -> None:
    gradient = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    gradient[0] *= 30
    mean_square = float(gradient.square().mean())
    weights = importance_of(gradient, mean_square)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-5)
    assert float(weights.min()) >= 0.5
    ratio = (weights[0, 0, 0, 0] - 0.5) / (weights[1, 1, 1, 1] - 0.5)
    assert float(ratio) == pytest.approx(float((gradient[0, 0, 0, 0] / gradient[1, 1, 1, 1]) ** 2), rel=1e-3)
    torch.testing.assert_close(importance_of(gradient * 1e-6, mean_square * 1e-12), weights)
    assert bool((importance_of(torch.zeros(2, 3), 0.0) == 0.5).all())


METHOD_PHASES = {
    "adaround": [("roundings", 100, True, False, 0.0, 2.0)],
    "brecq": [("roundings", 100, True, False, 0.0, 2.0), ("scales", 25, False, True, 0.0, 2.4)],
    "qdrop": [("both", 100, True, True, 0.5, 2.0)],
}


@pytest.mark.parametrize("method", METHOD_PHASES)
def test_methods_are_these_phases(method: str) -> None:
    found = phases(ReconstructRecipe.model_validate({"method": method, "iterations": 100}))
    assert [(p.name, p.iterations, p.roundings, p.scales, p.drop, p.power) for p in found] == METHOD_PHASES[method]
    (*_, last) = phases(ReconstructRecipe(method="brecq", scale_iterations=7, scale_power=2.0, scale_inputs="float"))
    assert (last.iterations, last.power, last.float_inputs) == (7, 2.0, True)
