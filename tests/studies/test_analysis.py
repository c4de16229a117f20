"""Analysis: facts against NumPy, a spoiled layer is found and explained, the suggested bits do what is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from torch import Tensor, nn

from calibquant.data import TensorImages
from calibquant.errors import RecipeError
from calibquant.graph import capture, fold_batch_norm
from calibquant.numerics.aciq import DensityFit
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import Recipe, make_recipe
from calibquant.studies.analysis import PAGE, RESULT, Analysis, analyze
from calibquant.studies.analysis.advice import Harm, about_observers, widest_harm
from calibquant.studies.analysis.figures import gauss, laplace
from calibquant.studies.analysis.ranges import RangeRow, ranges_by_observer
from calibquant.studies.analysis.tensors import activation_facts, weight_facts

SPOILED, FACTOR = 3, 64.0


class Chain(nn.Module):
    """Three convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.fc(torch.relu(self.third(x)).mean((2, 3)))


def chain(spoiled: bool) -> Chain:
    """Spoiled: one channel of the second layer is 64 times as large, and what reads it 64 times smaller."""
    torch.manual_seed(0)
    network = Chain().eval()
    with torch.no_grad():
        network.fc.weight.mul_(20)
        if spoiled:
            network.second.weight[SPOILED].mul_(FACTOR)
            network.second.bias[SPOILED].mul_(FACTOR)
            network.third.weight[:, SPOILED].div_(FACTOR)
    return network


def images(count: int = 48) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def recipe(runs: Path, **quant: Any) -> Recipe:
    fields = {
        "boundary": "none", "weights": {"bits": 4, "granularity": "per_tensor", "observer": "minmax"},
        "activations": {"bits": 8, "observer": "minmax"},
    }  # fmt: skip
    tree = {
        "calibration": {"count": 48, "strategy": "first"},
        "quant": {**fields, **quant},
        "runs": str(runs),
        "threads": 1,
    }
    return make_recipe(tree)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    runs = tmp_path_factory.mktemp("runs")
    return analyze(recipe(runs), chain(True), TensorImages(images()))


def test_the_spoiled_layer_does_most_of_the_harm_and_is_named(found: Analysis) -> None:
    worst = max((h for h in found.harms if h.kind == "weight"), key=lambda h: h.harm)
    assert worst.name == "second.weight"
    assert found.advice[0].text.startswith("weight second.weight does")
    (facts,) = [t for t in found.tensors if t.name == "second.weight"]
    assert facts.outliers == (SPOILED,)
    about = [a for a in found.advice if "second.weight: 1 of its channels (3)" in a.text]
    assert about[0].overrides == ("quant.weights.granularity=per_channel",)


def test_without_the_spoiling_it_does_not(tmp_path: Path) -> None:
    sound = analyze(recipe(tmp_path), chain(False), TensorImages(images()), images=16)
    assert not any(t.outliers for t in sound.tensors)
    harm = {h.name: h.harm for h in sound.harms}
    spoiled = analyze(recipe(tmp_path), chain(True), TensorImages(images()), images=16)
    assert {h.name: h.harm for h in spoiled.harms}["second.weight"] > 20 * harm["second.weight"]


def test_the_suggested_bits_have_the_measured_effect(found: Analysis, tmp_path: Path) -> None:
    """The same network with the suggested bits in its recipe, quantized by the stages alone."""
    effect = found.effect
    assert effect is not None
    assert "second.weight" in effect.names
    assert effect.loss[1] < effect.loss[0] / 2
    settings = recipe(tmp_path, bits=dict.fromkeys(effect.names, 8)).quant
    teacher = fold_batch_norm(capture(chain(True), images(2)))
    model = QuantModel(teacher, make_plan(teacher, settings))
    calibrate_weights(model, settings)
    calibrate_activations(model, settings.activations, [images()])
    with torch.no_grad():
        want, got = teacher(images()[: found.images]), model(images()[: found.images])
    p, q = torch.log_softmax(want.double(), 1), torch.log_softmax(got.double(), 1)
    assert effect.loss[1] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4, abs=1e-9)
    sizes = {n: t.numel() for n, t in teacher.named_buffers() if n in effect.names}
    more = sum(sizes[n] * (model.plan.weights[n].grid.bits - 4) / 8 for n in sizes)
    assert effect.bytes[1] - effect.bytes[0] == pytest.approx(more, abs=len(sizes))


def test_facts_of_a_weight_are_numpys() -> None:
    teacher = fold_batch_norm(capture(chain(True), images(2)))
    settings = recipe(Path("runs"), weights={"bits": 3, "granularity": "per_tensor", "observer": "percentile",
                                             "percentile": 95}).quant  # fmt: skip
    model = QuantModel(teacher, make_plan(teacher, settings))
    calibrate_weights(model, settings)
    (facts,) = [f for f in weight_facts(model) if f.name == "second.weight"]
    weight, value = chain(True).second.weight.detach().double().numpy(), model.weight_quantizers["second.weight"].get()
    codes, scale, zero = value.codes.numpy().astype(np.float64), float(value.scale), int(value.zero_point)
    error = (codes - zero) * scale - weight
    outside = (weight > (7 - zero) * scale + scale / 2) | (weight < -zero * scale - scale / 2)
    ranges = np.abs(weight).max(axis=(1, 2, 3))
    assert facts.sqnr == pytest.approx(10 * math.log10((weight**2).sum() / (error**2).sum()), rel=1e-6)
    assert facts.clipped == pytest.approx(outside.mean())
    assert outside.any()
    assert (facts.low, facts.high, facts.count) == pytest.approx((weight.min(), weight.max(), weight.size))
    assert facts.spread == pytest.approx(ranges.max() / np.sort(ranges)[3], rel=1e-6)  # the lower median of eight


@pytest.mark.parametrize("own", ["per_tensor", "per_channel"])
def test_what_lies_between_few_levels_is_not_clipped(own: str) -> None:
    teacher = fold_batch_norm(capture(chain(True), images(2)))
    weights = {"bits": 2, "grid": "codebook", "codebook": own}
    settings = recipe(Path("runs"), weights=weights, activations={"bits": 2, "grid": "codebook"}).quant
    model = QuantModel(teacher, make_plan(teacher, settings))
    calibrate_weights(model, settings)
    calibrate_activations(model, settings.activations, [images()])
    facts = [*weight_facts(model), *activation_facts(model, [images(12)])]
    leveled = [f for f in facts if f.bits == 2]
    assert {f.kind for f in leveled} == {"weight", "activation"}
    for fact in leveled:
        assert fact.clipped < 0.05
        assert 5 < fact.sqnr < 30
    (site,) = [f for f in leveled if f.kind == "activation"][:1]
    quantizer = model.activation_quantizers[site.name]
    levels, scale = quantizer.levels.double(), float(quantizer.get()[0])  # type: ignore[union-attr]
    x = torch.relu(chain(True).first(images(12))).detach().double()
    ends = [float(levels[-1] - quantizer.get()[1]) * scale, float(levels.diff().max()) * scale / 2]
    assert site.clipped == pytest.approx(float((x > sum(ends)).double().mean()), abs=2e-3)


def test_facts_of_an_activation_do_not_depend_on_the_batches_and_see_the_float_network() -> None:
    teacher = fold_batch_norm(capture(chain(True), images(2)))
    settings = recipe(Path("runs"), activations={"bits": 3, "observer": "percentile", "percentile": 98}).quant
    model = QuantModel(teacher, make_plan(teacher, settings))
    calibrate_weights(model, settings)
    calibrate_activations(model, settings.activations, [images()])
    whole, parts = activation_facts(model, [images(12)]), activation_facts(model, images(12).split(5))
    x = torch.relu(chain(True).first(images(12))).detach()
    (site,) = [f for f in whole if f.name == "relu" or f.high == pytest.approx(float(x.max()))]
    scale, _ = model.activation_quantizers[site.name].get()
    assert site.clipped == pytest.approx(float((x > 7.5 * scale).float().mean()), abs=1e-6)
    for one, other in zip(whole, parts, strict=True):
        assert (one.name, one.clipped, one.outliers, one.histogram) == (
            other.name, other.clipped, other.outliers, other.histogram,
        )  # fmt: skip
        assert one.sqnr == pytest.approx(other.sqnr)


def test_comparing_observers_keeps_the_models_ranges() -> None:
    teacher = fold_batch_norm(capture(chain(False), images(2)))
    settings = recipe(Path("runs"), activations={"bits": 4, "observer": "mse"}).quant
    model = QuantModel(teacher, make_plan(teacher, settings))
    calibrate_weights(model, settings)
    calibrate_activations(model, settings.activations, [images()])
    before = [tuple(map(float, q.get())) for q in model.activation_quantizers.values()]
    rows = ranges_by_observer(model, settings.activations, lambda: [images()], lambda n: n, ("minmax", "mse"))
    assert before == [tuple(map(float, q.get())) for q in model.activation_quantizers.values()]
    levels = {(r.name, r.observer): r.sqnr for r in rows}
    assert all(levels[name, "mse"] >= levels[name, "minmax"] - 0.1 for name, _ in levels)
    assert [r.observer for r in rows[:2]] == ["minmax", "mse"]


def test_the_files_are_complete(found: Analysis) -> None:
    result = json.loads((found.folder / RESULT).read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert result == json.loads(json.dumps(found.to_dict()))
    text = (found.folder / PAGE).read_text()
    for harm in found.harms:
        assert harm.name in text
    for name in (line.split("figures/")[1][:-1] for line in text.splitlines() if line.startswith("![")):
        assert ElementTree.fromstring((found.folder / "figures" / name).read_bytes()).tag.endswith("svg")


def test_dynamic_ranges_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"quant.activations.dynamic: leaves no ranges to analyze; use false"):
        analyze(recipe(tmp_path, activations={"dynamic": True}), chain(False), TensorImages(images()))


def harm(name: str, loss: float, bits: int = 4) -> Harm:
    return Harm(name, "weight", bits, loss, None, 0.0, 0.0, 10)


@pytest.mark.parametrize(
    ("harms", "want"),
    [
        ([harm("a", 1), harm("b", 5), harm("c", 3)], ["b"]),
        ([harm("a", 1), harm("b", 1), harm("c", 1)], ["a", "b"]),
        ([harm("a", 9, 8), harm("b", 1)], ["b"]),  # one that has 8 bits already is passed over
        ([harm("a", 0), harm("b", 0)], []),
        ([harm(c, 1) for c in "abcdefghijklm"], list("abcde")),
    ],
)
def test_suggested_are_those_that_do_half_of_the_harm(harms: list[Harm], want: list[str]) -> None:
    assert [h.name for h in widest_harm(harms)] == want


def test_an_observer_is_suggested_only_if_clearly_better() -> None:
    rows = [RangeRow(n, o, 0, 1, level) for n in "ab" for o, level in (("minmax", 10.0), ("mse", 12.0), ("kl", 10.5))]
    (advice,) = about_observers(rows, "minmax")
    assert advice.overrides == ("quant.activations.observer=mse",)
    assert "2.0 dB" in advice.text
    assert about_observers(rows, "mse") == []


def test_drawn_densities_integrate_to_one() -> None:
    fit, x = DensityFit(0.3, 0.7, 0.9, 0.1, 0.2), np.linspace(-20, 20, 400_001)
    for density in (laplace, gauss):
        assert trapezoid(density(fit, x), x) == pytest.approx(1, abs=1e-6)
