"""Whole networks: errors fall, units are fed by the reconstructed network, codes stay on their grids."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from networks import NETWORKS, folded, quantized, values_of
from torch import Tensor, fx, nn

from calibquant.export.artifact import artifact_tensors, restore
from calibquant.features import Features
from calibquant.graph import Unit, capture, fold_batch_norm
from calibquant.quantization import QuantModel, calibrate_activations
from calibquant.recipe import ActivationRecipe, Placement, QuantRecipe, ReconstructRecipe, WeightRecipe
from calibquant.reconstruction import UnitReport, planned_units, reconstruct
from calibquant.reconstruction.engine import parted
from calibquant.reconstruction.losses import feature_loss
from calibquant.reconstruction.phases import Phase, phases

COUNT = 96
METHODS = ["adaround", "brecq", "qdrop"]


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block1, self.block2 = Residual(6, 6), Residual(6, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(torch.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


@cache
def teacher(seed: int) -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        return fold_batch_norm(capture(network.eval(), torch.zeros(1, 3, 10, 10)))


def images(seed: int) -> Tensor:
    """Smooth random images: neighbouring pixels are correlated, as in photographs."""
    draw = torch.randn(COUNT, 3, 5, 5, generator=torch.Generator().manual_seed(100 + seed))
    return nn.functional.interpolate(draw, size=(10, 10), mode="bilinear")


def w2a2(seed: int, placement: Placement) -> QuantModel:
    recipe = QuantRecipe(
        weights=WeightRecipe(bits=2), activations=ActivationRecipe(bits=2), placement=placement, boundary="qdrop"
    )
    return quantized(teacher(seed), recipe, images(seed))


def schedule(method: str, **fields: object) -> ReconstructRecipe:
    settings = {"method": method, "iterations": 120, "rounding_lr": 2e-2, "scale_lr": 1e-3, "regularizer": 1e-3}
    return ReconstructRecipe.model_validate(settings | fields)


def chain_of(model: QuantModel, recipe: ReconstructRecipe) -> list[Unit]:
    """The units of the first phase, in which every weight is learned."""
    return planned_units(model, recipe, phases(recipe)[0])


def codes(model: QuantModel) -> dict[str, Tensor]:
    return {name: q.get().codes.clone() for name, q in model.weight_quantizers.items()}


def errors(model: QuantModel, chain: list[Unit], x: Tensor, phase: Phase | None = None) -> dict[str, float]:
    """Feature error of each unit's output inside the whole quantized network; as a phase measures it, if given."""
    model.enable(activations=phase is None or phase.scales)
    want, got = values_of(model.teacher, x), values_of(model.simulation, x)
    model.enable()
    power = 2.0 if phase is None else phase.power
    return {unit.output: feature_loss(got[unit.output], want[unit.output], power).item() for unit in chain}


Outcome = tuple[QuantModel, list[Unit], list[UnitReport], dict[str, float], dict[str, float], dict[str, Tensor]]


@cache
def outcome(seed: int, method: str, placement: Placement) -> Outcome:
    """Model, units, reports, errors before and after, codes before: made once, never changed."""
    model, x = w2a2(seed, placement), images(seed)
    chain = chain_of(model, schedule(method))
    before, start = errors(model, chain, x), codes(model)
    reports = list(reconstruct(model, x, schedule(method), seed))
    return model, chain, reports, before, errors(model, chain, x), start


CASES = [(method, placement) for method in METHODS for placement in ("integer", "academic")]


@pytest.mark.parametrize(("method", "placement"), CASES)
def test_every_units_error_falls_below_nearest_roundings(method: str, placement: Placement) -> None:
    """Mean over three seeds, inside the whole network; the logits are the last unit's output.

    BRECQ learns its roundings without quantized activations, so that with them an early unit may gain nothing.
    """
    runs = [outcome(seed, method, placement) for seed in range(3)]
    chain = runs[0][1]
    assert chain[-1].name == "head"
    for name in (unit.output for unit in chain):
        before, after = (sum(run[index][name] for run in runs) / 3 for index in (3, 4))
        assert after < before * (1.02 if method == "brecq" else 1), name
    head = chain[-1].output
    assert sum(run[4][head] for run in runs) < 0.8 * sum(run[3][head] for run in runs)


@pytest.mark.parametrize(("method", "placement"), CASES)
def test_the_reports_name_the_units_in_order_and_agree_with_the_codes(method: str, placement: Placement) -> None:
    model, chain, reports, _, _, start = outcome(0, method, placement)
    assert [(r.phase, r.unit) for r in reports] == [
        (p.name, u.name) for p in phases(schedule(method)) for u in planned_units(model, schedule(method), p)
    ]
    assert len(chain) == {"adaround": 7, "brecq": 4, "qdrop": 4}[method]
    changed = {name for name, now in codes(model).items() if not torch.equal(now, start[name])}
    assert changed, "some codes did move"
    assert {r.settled for r in reports if r.phase == "scales"} <= {1.0}
    for unit, report in zip(chain, reports, strict=False):  # those of the first phase
        assert 0 <= report.settled <= 1
        assert report.kept == (report.loss_after < report.loss_before)
        assert report.kept or not changed & set(unit.weights)


@pytest.mark.parametrize(("method", "placement"), CASES)
def test_units_are_fed_with_what_the_reconstructed_network_produces(method: str, placement: Placement) -> None:
    """Each recorded loss is found again in the finished network, on the images held out."""
    model, chain, reports, _, _, _ = outcome(1, method, placement)
    last = phases(schedule(method))[-1]
    chain = planned_units(model, schedule(method), last)
    again = errors(model, chain, images(1)[::8], last)
    for unit, report in zip(chain, reports[-len(chain) :], strict=True):
        recorded = report.loss_after if report.kept else report.loss_before
        assert recorded == pytest.approx(again[unit.output], rel=1e-4, abs=1e-7), unit.name


@pytest.mark.parametrize(("method", "placement"), CASES)
def test_codes_stay_on_their_grids_one_step_from_nearest_at_most(method: str, placement: Placement) -> None:
    model, _, _, _, _, start = outcome(2, method, placement)
    for name, quantizer in model.weight_quantizers.items():
        value, grid = quantizer.get(), quantizer.plan.grid
        assert value.codes.dtype == grid.dtype
        assert grid.qmin <= int(value.codes.min())
        assert int(value.codes.max()) <= grid.qmax
        assert int((value.codes.int() - start[name].int()).abs().max()) <= 1
    for quantizer in model.quantizers:
        assert quantizer.enabled
        assert not list(quantizer.parameters())
    wide = 8 if model.plan.placement == "academic" else 7  # what meets 8 bits reaches to 64 on integer kernels
    assert sorted({q.plan.grid.bits for q in model.weight_quantizers.values()}) == [2, wide]


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_is_not_changed(method: str) -> None:
    model = outcome(0, method, "integer")[0]
    fresh = teacher.__wrapped__(0)
    with torch.no_grad(), model.float_mode():
        assert torch.equal(model(images(0)), fresh(images(0)))


def test_the_seed_decides_every_unit_and_progress_counts_all_of_them() -> None:
    steps: list[tuple[int, int]] = []
    settings = schedule("qdrop", iterations=10, never_worse=False)
    found = []
    for seed in (3, 3, 4):
        model = w2a2(0, "academic")
        reports = list(reconstruct(model, images(0), settings, seed, progress=lambda *at: steps.append(at[:2])))
        found.append((codes(model), [r.loss_after for r in reports]))
        torch.rand(5)  # the global stream has no say
    assert steps == [(i, 40) for i in range(1, 41)] * 3
    assert found[0][1] == found[1][1] != found[2][1]
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])


def test_an_interrupted_run_keeps_finished_units_and_leaves_the_others_as_they_were() -> None:
    model = w2a2(0, "academic")
    start, settings = codes(model), schedule("adaround", iterations=30, never_worse=False)
    chain = chain_of(model, settings)

    def stop(done: int, *_: object) -> None:
        if done == 3 * 30 + 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(reconstruct(model, images(0), settings, 0, progress=stop))
    changed = {name for name, now in codes(model).items() if not torch.equal(now, start[name])}
    assert changed <= {w for unit in chain[:3] for w in unit.weights}
    assert len(changed) >= 2


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["densenet", "mobilenet_v3", "unet", "block_called_twice", "tied_linears", "pools"])
def test_hard_networks_are_reconstructed_in_either_granularity(name: str, method: str) -> None:
    """Branches, gates, transposed convolutions and shared weights: every unit reports and the output stays finite."""

    x = NETWORKS[name].example(6, seed=1)
    model = quantized(folded(name), QuantRecipe(weights=WeightRecipe(observer="minmax")), x)
    settings = schedule(method, iterations=2, batch_size=4)
    reports = list(reconstruct(model, x, settings, 0))
    assert [r.unit for r in reports] == [u.name for p in phases(settings) for u in planned_units(model, settings, p)]
    assert {w for u in chain_of(model, settings) for w in u.weights} == set(model.weight_quantizers)
    assert all(r.loss_after >= 0 for r in reports)
    with torch.no_grad():
        assert bool(torch.isfinite(model(x)).all())


def test_the_simulation_advances_with_new_codes() -> None:
    """A unit learned between two advances is seen by the second: features come from the reconstructed network."""
    model, x = w2a2(0, "academic"), images(0)[:8]
    settings = schedule("qdrop")
    chain = chain_of(model, settings)
    side = Features(model.teacher.graph, model.part, x, 8)
    side.advance(chain[1].nodes[0])
    quantizer = model.weight_quantizers[chain[1].weights[0]]
    before = values_of(model.simulation, x)[chain[1].output]
    quantizer.codes = quantizer.plan.grid.qmax - quantizer.get().codes
    side.advance(chain[2].nodes[0])
    now = values_of(model.simulation, x)[chain[1].output]
    assert not torch.equal(now, before)
    assert torch.equal(side.live[chain[1].output], now)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["conv_called_twice", "block_called_twice", "tied_linears"])
def test_a_shared_weight_is_learned_once_and_the_recorded_losses_stay_true(name: str, method: str) -> None:
    """To learn it again in its second unit would change what the units in between were fed with."""
    x = NETWORKS[name].example(COUNT, seed=1)
    model = quantized(folded(name), QuantRecipe(weights=WeightRecipe(bits=2)), x)
    settings = schedule(method, iterations=12)
    chain = chain_of(model, settings)
    assert len({unit.weights for unit in chain}) == len(chain)
    assert {w for unit in chain for w in unit.weights} == set(model.weight_quantizers)
    reports = list(reconstruct(model, x, settings, 0))
    last = phases(settings)[-1]
    chain = planned_units(model, settings, last)
    again = errors(model, chain, x[::8], last)
    for unit, report in zip(chain, reports[-len(chain) :], strict=True):
        recorded = report.loss_after if report.kept else report.loss_before
        assert recorded == pytest.approx(again[unit.output], rel=1e-4, abs=1e-7), unit.name


@pytest.mark.parametrize("views", [1, 3])
def test_images_judge_as_they_are_and_in_no_version_teach(views: int) -> None:
    """The recorded losses are those of every eighth image; the images in between alone decide what is learned."""
    settings = schedule("qdrop", iterations=12, views=views)
    model = w2a2(0, "academic")
    chain = chain_of(model, settings)
    reports = list(reconstruct(model, images(0), settings, 0))
    again = errors(model, chain, images(0)[::8])
    for unit, report in zip(chain, reports, strict=True):
        recorded = report.loss_after if report.kept else report.loss_before
        assert recorded == pytest.approx(again[unit.output], rel=1e-4, abs=1e-7)
    judging, learning = parted(settings, views * COUNT, views)
    assert judging.tolist() == list(range(0, COUNT, 8))
    assert sorted({int(row) % COUNT for row in learning}) == [i for i in range(COUNT) if i % 8]
    assert len(learning) == views * COUNT * 7 // 8
    assert all(len(rows) == 50 * views for rows in parted(settings, 50 * views, views))


@pytest.mark.parametrize(
    ("name", "method", "share"),
    [
        ("block_called_twice", "qdrop", 0.5), ("cifar_resnet", "qdrop", 0.5), ("shufflenet_v2", "qdrop", 0.5),
        ("cifar_resnet", "brecq", 0.3), ("cifar_resnet", "brecq", 0.5), ("cifar_resnet", "brecq", 0.8),
    ],
)  # fmt: skip
def test_going_on_after_some_units_gives_the_same_codes(name: str, method: Any, share: float) -> None:
    """Also at the border between two phases (0.5 of brecq's units), where the ranges are found again."""
    recipe = ReconstructRecipe(method=method, iterations=3, rounding_lr=0.1, zero_point_lr=0.1, loss="fisher", views=2)
    x = NETWORKS[name].example(batch=16)

    def fresh() -> QuantModel:
        two_bits = QuantRecipe(weights=WeightRecipe(bits=2), activations=ActivationRecipe(bits=2))
        return quantized(folded(name), two_bits, x)

    def observer(model: QuantModel) -> Callable[[], None]:
        return lambda: calibrate_activations(model, ActivationRecipe(bits=2), [x], quantized_weights=True)

    whole = fresh()
    reports = list(reconstruct(whole, x, recipe, seed=3, observe=observer(whole)))
    done = int(len(reports) * share)
    assert method == "qdrop" or {r.phase for r in reports[done:]} == {"roundings", "scales"} - (
        {"roundings"} if share >= 0.5 else set()
    )
    begun, after = fresh(), fresh()
    for _, report in zip(range(done), reconstruct(begun, x, recipe, 3, observe=observer(begun)), strict=False):
        assert report.unit
    restore(after, artifact_tensors(begun))
    rest = reconstruct(after, x, recipe, seed=3, done_units=done, observe=observer(after))
    assert len(list(rest)) == len(reports) - done
    expected, got = artifact_tensors(whole), artifact_tensors(after)
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []
