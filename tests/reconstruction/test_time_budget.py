"""A time instead of a number of iterations: what is planned, what is refused, and that trials leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibquant.errors import CalibQuantError, RecipeError
from calibquant.graph import capture
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import QuantRecipe, ReconstructRecipe, make_recipe
from calibquant.reconstruction import budget, within_time

STEP, BEFORE, FIXED = {"both": 0.2, "network": 0.5}, {"both": 1.0, "network": 2.0}, 0.25  # seconds


@pytest.fixture
def images() -> Tensor:
    return torch.rand(160, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(images: Tensor) -> QuantModel:
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()).eval(), images[:2])
    recipe = QuantRecipe(placement="academic", boundary="none")
    made = QuantModel(graph, make_plan(graph, recipe))
    calibrate_weights(made, recipe)
    calibrate_activations(made, recipe.activations, [images])
    return made


def recipe(**fields: Any) -> ReconstructRecipe:
    settings = {"method": "qdrop", "iterations": 200, "network": {"iterations": 400, "batch_size": 40}, **fields}
    return ReconstructRecipe.model_validate(settings)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on which everything takes known times."""

    def trial(_model: Any, _images: Tensor, _recipe: Any, iterations: int, *_: Any) -> tuple[dict[str, float], float]:
        return {phase: BEFORE[phase] + STEP[phase] * iterations for phase in STEP}, FIXED

    monkeypatch.setattr(budget, "_trial", trial)


@pytest.mark.parametrize("seconds", [100.0, 1000.0, 36000.0])
def test_the_planned_iterations_take_the_time(seconds: float, machine: None, model: QuantModel, images: Tensor) -> None:
    found = within_time(model, images, recipe(time=seconds), 0)
    judging = sum(BEFORE.values()) * (160 / 8) / 40
    cost = STEP["both"] * found.iterations + STEP["network"] * found.network.iterations + FIXED * 4 + judging
    assert cost <= 0.95 * seconds
    assert cost >= 0.95 * seconds - 0.8  # less than one iteration of each is left over
    assert found.time is None
    if seconds > 300:  # the recipe's 200 and 400 iterations take 240 s
        assert found.network.iterations == pytest.approx(2 * found.iterations, abs=1)


@pytest.mark.parametrize(
    ("seconds", "units", "network"),
    [(40, 177, 0), (60, 272, 0), (90, 414, 0), (110, 200, 124), (150, 200, 199), (240, 200, 371)],
)
def test_units_come_first_and_the_network_gets_what_is_worth_it(
    seconds: float, units: int, network: int, machine: None, model: QuantModel, images: Tensor
) -> None:
    """The units' 200 iterations take 40 s, the network's 400 take 200 s, of which a quarter must be left."""
    found = within_time(model, images, recipe(time=seconds), 0)
    assert found.iterations == pytest.approx(units, abs=1)
    assert found.network.iterations == pytest.approx(network, abs=1)


def test_a_time_that_does_not_suffice_says_how_much_would(machine: None, model: QuantModel, images: Tensor) -> None:
    with pytest.raises(RecipeError, match="3 s are not enough here; give at least 4s"):
        within_time(model, images, recipe(time=3), 0)
    within_time(model, images, recipe(time=4), 0)


def test_trials_that_differ_by_nothing_still_plan_iterations(
    monkeypatch: pytest.MonkeyPatch, model: QuantModel, images: Tensor
) -> None:
    monkeypatch.setattr(budget, "_trial", lambda *_: ({"both": 0.5, "network": 0.5}, 0.1))
    assert within_time(model, images, recipe(time=60), 0).iterations > 200


def test_trials_leave_the_model_as_it_was(model: QuantModel, images: Tensor) -> None:
    before = {name: q.get() for name, q in model.weight_quantizers.items()}
    ranges = {name: q.get() for name, q in model.activation_quantizers.items()}
    found = within_time(model, images, recipe(time=30, iterations=3, network={"iterations": 2, "batch_size": 32}), 0)
    assert found.iterations > 3
    assert all(q.get() is before[n] or torch.equal(q.get().codes, before[n].codes)
               for n, q in model.weight_quantizers.items())  # fmt: skip
    assert all(torch.equal(a, b) for n, q in model.activation_quantizers.items()
               for a, b in zip(q.get(), ranges[n], strict=True))  # fmt: skip
    assert all(d.delta is None for d in model.bias_deltas.values())


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400), (45, 45), ("45", 45), (" 2 m ", 120)]
)
def test_times_are_read(text: Any, seconds: float) -> None:
    assert recipe(time=text).time == seconds


@pytest.mark.parametrize("text", ["", "20 minutes", "-5m", 0, "0s", "m", "1h30m"])
def test_what_is_no_time_is_refused(text: Any) -> None:
    with pytest.raises(CalibQuantError, match=r"reconstruct\.time"):
        make_recipe({"reconstruct": {"time": text}})
