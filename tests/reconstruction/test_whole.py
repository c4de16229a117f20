"""Learning a whole network: its loss, its schedule, never worse, the same again, interruption."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from calibquant.graph import capture, fold_batch_norm, units, whole_network
from calibquant.numerics.distance import output_loss
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import ActivationRecipe, Placement, QuantRecipe, ReconstructRecipe, WeightRecipe
from calibquant.reconstruction import UnitReport, reconstruct, whole
from calibquant.reconstruction.engine import HELD_OUT
from calibquant.reconstruction.phases import phases
from calibquant.reconstruction.whole import learn_network, rate_at

COUNT = 96


class Network(nn.Module):
    """Two blocks on images of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.left(x) + self.right(x))
        return self.head(x.mean((2, 3)))


@cache
def images() -> Tensor:
    return torch.randn(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def model(placement: Placement = "academic", bits: int = 2) -> QuantModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = Network().eval()
        network.head.weight.data *= 8  # logits that differ
    graph = fold_batch_norm(capture(network, images()[:2]))
    recipe = QuantRecipe(
        weights=WeightRecipe(bits=bits), activations=ActivationRecipe(bits=bits), placement=placement, boundary="none"
    )  # type: ignore[arg-type]
    made = QuantModel(graph, make_plan(graph, recipe))
    calibrate_weights(made, recipe)
    calibrate_activations(made, recipe.activations, [images()])
    return made


def schedule(iterations: int = 40, never_worse: bool = True, **fields: object) -> ReconstructRecipe:
    network = {"iterations": iterations, "batch_size": 16, **fields}
    settings = {"method": "qdrop", "iterations": 3, "never_worse": never_worse, "network": network}
    return ReconstructRecipe.model_validate(settings)


def learn(made: QuantModel, recipe: ReconstructRecipe, seed: int = 0, progress: object = None) -> UnitReport:
    return learn_network(made, images(), recipe, phases(recipe)[-1], seed, progress=progress)  # type: ignore[arg-type]


def state(made: QuantModel) -> dict[str, Tensor]:
    found = {f"codes {n}": q.get().codes.clone() for n, q in made.weight_quantizers.items()}
    found |= {f"scale {n}": q.get().scale.clone() for n, q in made.weight_quantizers.items()}
    found |= {f"range {n}": q.get()[0].clone() for n, q in made.activation_quantizers.items()}
    return found | {f"bias {n}": d.delta.clone() for n, d in made.bias_deltas.items() if d.delta is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def divergence(made: QuantModel, rows: slice) -> float:
    """KL of the float network's probabilities to the quantized one's in float64."""
    x = images()[rows]
    a, b = (log_softmax(v.double().numpy(), axis=1) for v in (made.teacher(x), made(x)))
    return float((np.exp(a) * (a - b)).sum(1).mean())


@pytest.mark.parametrize("placement", ["academic", "integer"])
def test_it_brings_the_network_closer_on_images_held_out(placement: Placement) -> None:
    made = model(placement)
    before = divergence(made, slice(None, None, HELD_OUT))
    report = learn(made, schedule())
    after = divergence(made, slice(None, None, HELD_OUT))
    assert report.kept
    assert report.unit == report.phase == "network"
    assert report.settled == 1
    assert report.loss_before == pytest.approx(before, rel=1e-4)
    assert report.loss_after == pytest.approx(after, rel=1e-4)
    assert after < 0.7 * before


def test_what_does_not_help_leaves_everything_as_it_was() -> None:
    made = model()
    before = state(made)
    report = learn(made, schedule(2, rounding_lr=30.0, weight_scale_lr=3.0, scale_lr=3.0, rise=0.0))
    assert not report.kept
    assert report.loss_after == report.loss_before
    assert same(state(made), before)


def test_rates_that_are_too_high_are_lowered_until_they_help(monkeypatch: pytest.MonkeyPatch) -> None:
    made, rates = model(), list[float]()
    back = whole._Steps.go_back

    def noted(steps: whole._Steps) -> None:
        kept = [tensor.clone() for tensor in steps.kept]
        back(steps)
        rates.append(steps.schedule.base_lrs[0])
        assert all(torch.equal(a, b) for a, b in zip(steps._parameters(), kept, strict=True))

    monkeypatch.setattr(whole._Steps, "go_back", noted)
    report = learn(made, schedule(80, rounding_lr=30.0, weight_scale_lr=3.0, scale_lr=3.0, rise=0.0))
    assert report.kept
    assert report.loss_after < report.loss_before
    assert 1 <= len(rates) < whole.LOOKS
    assert rates == pytest.approx([30.0 * whole.BACK**k for k in range(1, len(rates) + 1)])


def test_without_images_held_out_the_last_state_is_kept() -> None:
    made = model()
    report = learn(made, schedule(8, False, rounding_lr=30.0, weight_scale_lr=1.0, rise=0.0))
    assert report.kept
    assert report.loss_after > report.loss_before


def test_the_seed_decides_and_the_callers_random_stream_stays() -> None:
    outside = torch.random.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        made = model()
        learn(made, schedule(10), seed)
        results.append(state(made))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])
    assert torch.equal(torch.random.get_rng_state(), outside)


def test_an_interruption_leaves_the_network_as_it_was() -> None:
    made = model()
    before = state(made)

    def stop(step: int, total: int, words: str) -> None:
        if step > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(made, schedule(), progress=stop)
    assert same(state(made), before)
    assert all(q.rounding is None for q in made.weight_quantizers.values())


def test_a_batch_in_parts_teaches_what_it_teaches_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On large images a batch passes in parts; the sum of their gradients is that of the batch."""
    results = []
    for at_once in (16, 5):
        monkeypatch.setattr(whole, "images_at_once", lambda *_, most=at_once: most)
        made = model()
        learn(made, schedule(1, augment=False, never_worse=False, rise=0.0))
        results.append(state(made))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


def test_the_whole_network_is_a_unit_of_all_nodes_and_weights() -> None:
    graph = model().teacher.graph
    unit = whole_network(graph)
    blocks = units(graph, "block")
    assert set(unit.nodes) >= {name for block in blocks for name in block.nodes}
    assert set(unit.weights) == {name for block in blocks for name in block.weights}
    assert unit.output == unit.nodes[-1]
    assert unit.input == "x"


def test_reconstruct_learns_it_after_the_units_and_can_go_on_there() -> None:
    recipe, made, resumed = schedule(6), model(), model()
    reports = list(reconstruct(made, images(), recipe, 9))
    assert [r.unit for r in reports][-1] == "network"
    assert [r.phase for r in reports][:-1] == ["both"] * 3
    walk = reconstruct(resumed, images(), recipe, 9)
    for _ in reports[:-1]:
        next(walk)
    walk.close()
    (last,) = reconstruct(resumed, images(), recipe, 9, done_units=len(reports) - 1)
    assert last.loss_after == reports[-1].loss_after
    assert same(state(made), state(resumed))
    assert not list(reconstruct(resumed, images(), recipe, 9, done_units=len(reports)))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_loss_of_vectors_is_hintons(temperature: float) -> None:
    a, b = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0)).double() * 3
    p, q = (softmax(v.numpy() / temperature, axis=1) for v in (b, a))
    wanted = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert float(output_loss(a, b, temperature)) == pytest.approx(wanted)


def test_the_loss_of_maps_is_the_relative_squared_error() -> None:
    a, b = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    wanted = ((a - b) ** 2).sum() / (b**2).sum()
    assert float(output_loss(a, b)) == pytest.approx(float(wanted))


@pytest.mark.parametrize(
    ("share", "rise", "wanted"),
    [(0.0, 0.0, 1.0), (0.5, 0.0, 0.5), (1.0, 0.0, 0.0), (0.05, 0.1, 0.5 * 0.5 * (1 + math.cos(0.05 * math.pi))),
     (0.5, 0.1, 0.5), (1.0, 0.1, 0.0)],
)  # fmt: skip
def test_rates_rise_and_then_fall_by_a_cosine(share: float, rise: float, wanted: float) -> None:
    assert rate_at(share, rise) == pytest.approx(wanted, abs=1e-12)
