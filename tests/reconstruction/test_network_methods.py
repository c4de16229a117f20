"""Phases, losses and features of whole networks, and the growth of their error."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS, folded, quantized, values_of
from test_network import METHODS, chain_of, codes, images, outcome, schedule, w2a2
from torch import Tensor

from calibquant.features import Features, FeatureStore
from calibquant.graph import units
from calibquant.graph.subgraph import subgraph
from calibquant.numerics.clipping import mse_range
from calibquant.numerics.grid import PerTensor
from calibquant.quantization import QuantModel, calibrate_activations
from calibquant.quantization.quantizers import activation_affine
from calibquant.recipe import ActivationRecipe, Placement, QuantRecipe, WeightRecipe
from calibquant.reconstruction import feature_errors, network, reconstruct
from calibquant.reconstruction.engine import UnitData
from calibquant.reconstruction.phases import phases


def test_brecq_finds_the_ranges_again_on_the_network_with_learned_weights() -> None:
    """Once, between the phases, with the roundings learned and no activation quantized while observing."""
    model, x = w2a2(0, "academic"), images(0)
    start, seen = codes(model), []

    def observe() -> None:
        seen.append({name for name, now in codes(model).items() if not torch.equal(now, start[name])})
        calibrate_activations(model, ActivationRecipe(bits=2), [x], quantized_weights=True)
        model.enable(activations=False)
        want = values_of(model.simulation, x)
        model.enable()
        for name, quantizer in model.activation_quantizers.items():
            low, high = mse_range(want[name], quantizer.plan.grid, False, PerTensor())
            scale, zero_point = activation_affine(low, high, quantizer.plan)
            assert quantizer.get()[0] == pytest.approx(float(scale), rel=0.05), name
            assert abs(int(quantizer.get()[1]) - int(zero_point)) <= 1, name

    list(reconstruct(model, x, schedule("brecq"), 0, observe=observe))
    assert len(seen) == 1
    assert seen[0]


def test_the_first_unit_can_be_left_out() -> None:
    model = w2a2(0, "academic")
    start, settings = codes(model), schedule("brecq", iterations=20, skip_first=True, never_worse=False)
    reports = list(reconstruct(model, images(0), settings, 0))
    assert "stem" not in {r.unit for r in reports}
    changed = {name for name, now in codes(model).items() if not torch.equal(now, start[name])}
    assert changed
    assert "stem.weight" not in changed


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_the_second_phase_takes_the_inputs_it_is_told(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantized side that is noise changes what is learned only where it is asked for."""
    found = []
    for spoil in (0.0, 0.3):
        model = w2a2(0, "academic")
        settings = schedule("brecq", iterations=8, scale_lr=1e-2, scale_inputs=inputs, never_worse=False)
        (scales,) = [p for p in phases(settings) if p.name == "scales"]
        monkeypatch.setattr(network, "phases", lambda _, only=scales: [only])
        learn = network.learn_unit

        def noisy(name: str, part: QuantModel, data: UnitData, *rest: Any, spoil: float = spoil, learn: Any = learn):  # type: ignore[no-untyped-def]
            return learn(name, part, replace(data, quantized=data.quantized + spoil), *rest)

        monkeypatch.setattr(network, "learn_unit", noisy)
        list(reconstruct(model, images(0), settings, 0))
        monkeypatch.setattr(network, "learn_unit", learn)
        found.append([q.get()[0].item() for q in model.activation_quantizers.values()])
    assert (found[0] == found[1]) == (inputs == "float")


# --- Fisher-weighted loss ---------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_networks_kl_divergence() -> None:
    """Against finite differences of KL(float || quantized up to the unit, float behind), in float64."""
    model, x = w2a2(0, "academic"), images(0)[:3]
    settings = schedule("brecq", loss="fisher")
    (phase, _), chain = phases(settings), chain_of(model, settings)
    walk = network._Walk(model, x, len(x), 1, chain, settings, phase, 0, "cpu", FeatureStore(), 0)
    side = Features(model.teacher.graph, model.part, x, 2)
    model.enable(activations=False)
    unit = chain[1]
    side.advance(unit.nodes[0])
    gradient = walk._gradient(unit, side)
    values = values_of(model.simulation, x)
    model.enable()
    behind = [n.name for n in model.teacher.graph.nodes if n.op == "call_function"]
    behind = behind[behind.index(unit.output) + 1 :]
    tail = copy.deepcopy(subgraph(model.teacher, behind, [behind[-1]])).double()
    want = model.teacher(x).double().log_softmax(1)

    def divergence(output: Tensor) -> float:
        return float((want.exp() * (want - tail(output).log_softmax(1))).sum())

    output = values[unit.output].double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        at = tuple(int(torch.randint(0, size, (), generator=generator)) for size in output.shape)
        up, down = output.clone(), output.clone()
        up[at] += 1e-6
        down[at] -= 1e-6
        slope = (divergence(up) - divergence(down)) / 2e-6
        assert float(gradient[at]) == pytest.approx(slope, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["densenet", "mobilenet_v3", "unet", "block_called_twice", "tied_linears", "pools"])
def test_hard_networks_learn_with_the_fisher_weighted_loss(name: str) -> None:
    """The rest of the network behind a unit reads its output and whatever else is still live."""
    x = NETWORKS[name].example(6, seed=1)
    model = quantized(folded(name), QuantRecipe(weights=WeightRecipe(observer="minmax")), x)
    for method in ("adaround", "brecq"):
        reports = list(reconstruct(model, x, schedule(method, iterations=2, batch_size=4, loss="fisher"), 0))
        assert all(r.loss_after >= 0 for r in reports)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["tied_embedding", "token_convolution"])
def test_a_network_that_reads_tokens_is_reconstructed(name: str, method: str) -> None:
    x = NETWORKS[name].example(6, seed=1)
    model = quantized(folded(name), QuantRecipe(weights=WeightRecipe(observer="minmax")), x)
    assert list(reconstruct(model, x, schedule(method, iterations=2, batch_size=4), 0))


# --- features kept elsewhere ------------------------------------------------------------------------------------------


def test_features_on_disk_change_nothing_and_bfloat16_little(tmp_path: Path) -> None:
    found = {}
    for key, fields in {"memory": {}, "disk": {"cache_limit": 0.0}, "bfloat16": {"cache": "bfloat16"}}.items():
        model = w2a2(0, "academic")
        reports = list(reconstruct(model, images(0), schedule("qdrop", **fields), 0, folder=tmp_path))
        found[key] = (codes(model), [r.loss_after for r in reports])
    assert found["disk"][1] == found["memory"][1]
    assert all(torch.equal(found["disk"][0][name], code) for name, code in found["memory"][0].items())
    assert found["bfloat16"][1] != found["memory"][1]
    assert found["bfloat16"][1] == pytest.approx(found["memory"][1], rel=0.2)
    assert not list(tmp_path.iterdir())


# --- growth of the error ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["integer", "academic"])
@pytest.mark.parametrize("batch", [96, 20])
def test_feature_errors_are_relative_norms_after_each_block(placement: Placement, batch: int) -> None:
    """Against whole-network values of both networks, in numpy."""
    model, x = w2a2(1, placement), images(1)
    want, got = values_of(model.teacher, x), values_of(model.simulation, x)
    found = feature_errors(model, x.split(batch))
    chain = units(model.teacher.graph)
    assert list(found) == [unit.output for unit in chain]
    for name, error in found.items():
        f, q = want[name].double().numpy(), got[name].double().numpy()
        assert error == pytest.approx(np.linalg.norm(q - f) / np.linalg.norm(f), rel=1e-5)
    with model.float_mode():
        assert set(feature_errors(model, [x]).values()) == {0.0}


def test_reconstruction_makes_the_errors_grow_less() -> None:
    for seed in range(2):
        before, after = (
            feature_errors(m, [images(seed)]) for m in (w2a2(seed, "integer"), outcome(seed, "qdrop", "integer")[0])
        )
        assert list(after.values())[-1] < list(before.values())[-1]
