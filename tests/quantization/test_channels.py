"""Activations with a scale for each channel: observed, rounded, shared and saved as numpy says."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import quantized, values_of
from safetensors.torch import load_file
from torch import Tensor, fx, nn

import calibquant
from calibquant.errors import QuantizationError, RecipeError
from calibquant.export.artifact import MODEL, load_artifact, save_artifact, size_of
from calibquant.export.lowering import refusal
from calibquant.export.onnx_writer import fake_quant_onnx
from calibquant.export.record import record, record_text
from calibquant.export.session import open_session
from calibquant.graph import capture, fold_batch_norm
from calibquant.numerics.grid import Grid, PerChannel, PerTensor
from calibquant.numerics.histogram import Histogram
from calibquant.quantization import TensorPlan, make_plan
from calibquant.quantization.allocation import error_of, spread_of
from calibquant.quantization.channels import ChannelObserver
from calibquant.quantization.observers import make_observer
from calibquant.recipe import ActivationRecipe, QuantRecipe, make_recipe
from calibquant.runfolder import RunFolder


class Net(nn.Module):
    """Maps of several sizes, one of a single position, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 5, 6)
        self.fc, self.out = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.out(torch.relu(self.fc(torch.relu(self.c(x)).flatten(1))))


@cache
def graph_of() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = Net().eval()
        with torch.no_grad():
            net.a.weight *= torch.logspace(-1.5, 1, 6)[:, None, None, None]
            net.a.weight[2], net.a.bias[2] = 0, -1  # type: ignore[index]  # a channel that is 0 after the ReLU
    return fold_batch_norm(capture(net, torch.zeros(2, 3, 8, 8)))


def images(count: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def recipe_of(placement: str = "integer", **fields: object) -> QuantRecipe:
    activations = {"bits": 4, "observer": "minmax", "granularity": "per_channel", **fields}
    return QuantRecipe.model_validate(
        {"activations": activations, "weights": {"observer": "minmax"}, "boundary": "none", "placement": placement}
    )


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_only_maps_of_several_positions_have_scales_per_channel() -> None:
    plan = make_plan(graph_of(), recipe_of(allocation="banner"))
    found = {name: (p.granularity, p.role, p.allocation) for name, p in plan.activations.items()}
    own, one = PerChannel(1), PerTensor()
    assert found == {
        "x": (own, "integer", "none"), "relu": (own, "main", "banner"), "relu_1": (own, "main", "banner"),
        "relu_2": (one, "main", "none"), "relu_3": (one, "main", "none"),
    }  # fmt: skip


def test_a_graph_whose_shapes_are_not_known_cannot_be_planned_by_them(tmp_path: Path) -> None:
    """Such as the graph of a run of version 0.1.0, which does not hold the shape of its input."""
    run = RunFolder(tmp_path)
    save_artifact(quantized(graph_of(), recipe_of(), images()), run)
    assert make_plan(load_artifact(run).teacher, recipe_of()).activations
    stored = run.read_json("graph.json")
    del stored["input"]
    run.write_json("graph.json", stored)
    with pytest.raises(QuantizationError, match="plan, x: the shape of its value is not known; capture"):
        make_plan(load_artifact(run).teacher, recipe_of())


# --- observers --------------------------------------------------------------------------------------------------------


OBSERVERS = ["minmax", "moving-average", "percentile", "mse", "mse-batch", "mse-shrink", "kl"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", OBSERVERS)
def test_each_channel_is_observed_as_if_alone(name: str, symmetric: bool) -> None:
    recipe = ActivationRecipe(observer=name, granularity="per_channel")  # type: ignore[arg-type]
    plan = TensorPlan(Grid(4), symmetric, PerChannel(1))
    x = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 7])[:, None, None]
    x[:, 1].abs_()
    observer, other = ChannelObserver(recipe, plan), ChannelObserver(recipe, plan)
    for batch in x[:4].split(2):
        observer.update(batch)
    other.update(x[4:])
    observer.merge(other)
    low, high = observer.range()
    assert low.shape == high.shape == (3,)
    for c in range(3):
        alone = make_observer(recipe, TensorPlan(Grid(4), symmetric))
        for batch in x.split(2):
            alone.update(batch[:, c])
        assert (low[c], high[c]) == alone.range()


def test_an_observer_without_values() -> None:
    observer = ChannelObserver(ActivationRecipe(), TensorPlan(Grid(4), False, PerChannel(1), allocation="banner"))
    observer.update(torch.zeros(0, 3, 2, 2))
    for call in (observer.range, observer.allocated):
        with pytest.raises(QuantizationError, match="has seen no values"):
            call()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 8), st.booleans())
def test_what_a_histogram_says_of_spread_and_error_is_near_the_values_own(seed: int, bits: int, one: bool) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(seed))
    x = x.abs() if one else x
    histogram = Histogram.empty().add(x)
    assert spread_of(histogram) == pytest.approx(float(x.double().std(correction=0)), rel=1e-3)
    scale = float(x.max() - x.clamp(max=0).min()) / (2**bits - 1)
    zero = round(-float(x.clamp(max=0).min()) / scale)
    values = (np.clip(np.rint(x.numpy() / scale) + zero, 0, 2**bits - 1) - zero) * scale
    error = error_of(histogram, torch.tensor(scale), torch.tensor(zero, dtype=torch.int32), Grid(bits))
    assert error == pytest.approx(float(((values - x.numpy()) ** 2).sum()), rel=0.05)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("allocation", ["banner", "optimal"])
def test_shared_bits_and_their_ranges(allocation: str, observer: str) -> None:
    recipe = ActivationRecipe.model_validate(
        {"observer": observer, "granularity": "per_channel", "allocation": allocation, "bits": 3}
    )
    plan = TensorPlan(Grid(3), False, PerChannel(1), "main", allocation)
    x = torch.randn(20, 5, 6, 6, generator=torch.Generator().manual_seed(0)).relu()
    x *= torch.tensor([0.0, 0.05, 0.5, 1, 20])[:, None, None]
    seen = ChannelObserver(recipe, plan)
    for batch in x.split(5):
        seen.update(batch)
    low, high, bits = seen.allocated()
    assert bits.dtype == torch.int32
    assert bits[0] == 0 or allocation == "optimal", "a channel of zeros needs none"
    assert list(bits[1:]) == sorted(bits[1:])
    assert allocation == "banner" or int(bits.sum()) == 15
    assert abs(float(bits.double().mean()) - 3) <= 0.5
    for c in range(5):
        alone = make_observer(recipe, TensorPlan(Grid(max(1, int(bits[c]))), False))
        alone.update(x[:, c])
        assert (low[c], high[c]) == alone.range()


# --- the simulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("allocation", ["none", "banner", "optimal"])
def test_the_simulation_rounds_each_channel_as_numpy_does(allocation: str, symmetric: bool) -> None:
    graph, x = graph_of(), images()
    model = quantized(graph, recipe_of(allocation=allocation, symmetric=symmetric), x)
    quantizer = model.activation_quantizers["relu"]
    value = values_of(graph, x)["relu"]
    bits = [4] * 6 if quantizer.channel_bits is None else quantizer.channel_bits.tolist()
    assert (allocation == "none") == (quantizer.channel_bits is None)
    got = quantizer(value).numpy()
    for c, b in enumerate(bits):
        v = value[:, c].numpy()
        if b == 0:
            assert not got[:, c].any()
            continue
        scale = np.maximum(np.float32(v.max() / np.float32(2**b - 1)), np.float32(1e-8))
        expected = np.clip(np.rint(v / scale), 0, 2**b - 1) * scale  # after a ReLU the whole grid serves [0, max]
        np.testing.assert_allclose(got[:, c], expected, rtol=1e-6)
    with torch.no_grad(), model.float_mode():
        assert torch.equal(model(x), graph(x))


def test_an_image_of_both_signs_too() -> None:
    model, x = quantized(graph_of(), recipe_of(), images()), images()
    got = model.activation_quantizers["x"](x).numpy()
    for c in range(3):
        v = x[:, c].numpy()
        scale = np.float32((v.max() - v.min()) / np.float32(255))
        zero = np.rint(-v.min() / scale)
        np.testing.assert_allclose(got[:, c], (np.clip(np.rint(v / scale) + zero, 0, 255) - zero) * scale, rtol=1e-6)


def test_more_channels_scales_are_closer_and_shared_bits_closer_still() -> None:
    x, graph = images(64), graph_of()
    want = values_of(graph, x)["relu"]

    def error(recipe: QuantRecipe) -> float:
        model = quantized(graph, recipe, x)
        return float((model.activation_quantizers["relu"](want) - want).square().sum())

    one = error(recipe_of(granularity="per_tensor"))
    each, best = error(recipe_of()), error(recipe_of(allocation="optimal"))
    assert best < each < one


def test_coverage_and_the_program_say_simulation_only() -> None:
    model = quantized(graph_of(), recipe_of(allocation="optimal"), images())
    notes = {row.node: (row.input_bits, row.note) for row in model.coverage()}
    assert notes["a"] == ((8,), "input per channel: simulation only")
    bits = model.activation_quantizers["relu"].channel_bits
    assert bits is not None
    expected = f"input bits {int(bits.min())} to {int(bits.max())} by optimal; input per channel: simulation only"
    assert notes["b"] == ((4,), expected)
    assert notes["fc"] == ((4,), "")
    assert refusal(model) == "activations with a scale for each channel exist in simulation only"
    assert set(model.biases()) == {"fc", "out"}, "a product of inputs with several scales has no integer bias"


def test_scales_per_channel_cannot_be_learned() -> None:
    model = quantized(graph_of(), recipe_of(), images())
    with pytest.raises(QuantizationError, match="relu: has a scale for each channel; learn scales per tensor only"):
        model.activation_quantizers["relu"].start_learning()
    for method in ("brecq", "qdrop"):
        fields = {"quant": {"activations": {"granularity": "per_channel"}}, "reconstruct": {"method": method}}
        with pytest.raises(RecipeError, match=f"reconstruct.method: {method} learns one scale for an activation; use"):
            make_recipe(fields)


# --- files and runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["integer", "academic"])
@pytest.mark.parametrize("allocation", ["none", "banner", "optimal"])
def test_saved_and_loaded_it_is_the_same(allocation: str, placement: str, tmp_path: Path) -> None:
    model, x = quantized(graph_of(), recipe_of(placement, allocation=allocation), images()), images(seed=9)
    run = RunFolder(tmp_path)
    save_artifact(model, run)
    loaded = load_artifact(run)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert loaded.plan == model.plan
    assert loaded.coverage() == model.coverage()
    tensors = load_file(tmp_path / MODEL)
    assert size_of(model).packed == sum(t.numel() * t.element_size() for t in tensors.values())
    assert tensors["activations.relu.scale"].shape == (6,)
    assert ("activations.relu.channel_bits" in tensors) is (allocation != "none")


@pytest.mark.parametrize("allocation", ["none", "banner"])
def test_as_onnx_it_computes_the_same(allocation: str) -> None:
    model, x = quantized(graph_of(), recipe_of(allocation=allocation), images()), images(4, seed=3)
    session = open_session("fake_quant.onnx", fake_quant_onnx(model, x), 1)
    with torch.no_grad():
        np.testing.assert_allclose(session.run(x.numpy())[0], model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_a_record_lists_the_scales_of_channels_and_amcts_has_none() -> None:
    model = quantized(graph_of(), recipe_of(allocation="banner"), images())
    row = next(r for r in record(model) if r["node"] == "b")
    quantizer = model.activation_quantizers["relu"]
    assert quantizer.channel_bits is not None
    assert row["input"]["scale"] == quantizer.get()[0].tolist()
    assert row["input"]["channel_bits"] == quantizer.channel_bits.tolist()
    assert row["input"]["bits"] == int(quantizer.channel_bits.max())
    entries = {e.split('"')[1]: e for e in record_text(model).split("record {")[1:]}
    assert {key: "scale_d" in entry for key, entry in entries.items()} == {
        "a": False, "b": False, "c": False, "fc": True, "out": True,
    }  # fmt: skip


@pytest.mark.parametrize("reconstruct", [{}, {"method": "adaround", "iterations": 3, "loss": "fisher"}])
def test_a_run_leaves_no_deploy_onnx_and_says_why(reconstruct: dict[str, object], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = Net()
    recipe = {
        "runs": str(tmp_path), "calibration": {"count": 32}, "threads": 1, "reconstruct": reconstruct,
        "quant": {"activations": {"granularity": "per_channel", "allocation": "banner"},
                  "weights": {"allocation": "optimal", "observer": "minmax"}},
    }  # fmt: skip
    run = calibquant.quantize(recipe, network, calibquant.TensorImages(images()))
    assert not (run.folder / "deploy.onnx").exists()
    assert (run.folder / "fake_quant.onnx").exists()
    assert "deploy.onnx was not written: activations with a scale for each channel exist in simulation only" in (
        run.folder / "log.txt"
    ).read_text(encoding="utf-8")
    coverage = json.loads((run.folder / "metrics.json").read_text())["coverage"]
    assert any("simulation only" in row["note"] for row in coverage)
    with torch.no_grad():
        assert torch.equal(calibquant.load(run.folder)(images()), run.model(images()))
