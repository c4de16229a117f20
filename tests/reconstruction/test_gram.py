"""Gram rounding of whole networks: the errors reported are those of the outputs, and fall; shared, tied, resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import NETWORKS, folded, quantized, values_of
from torch import Tensor

from calibquant.errors import QuantizationError
from calibquant.export.artifact import artifact_tensors, restore
from calibquant.graph.nodes import activations_of, op_of
from calibquant.quantization import QuantModel
from calibquant.recipe import ActivationRecipe, QuantRecipe, ReconstructRecipe, WeightRecipe
from calibquant.reconstruction import LayerReport, gram, gram_layers, reconstruct, round_weights

RECIPE = ReconstructRecipe()
COUNT = 72
HARD = ["block_called_twice", "cifar_resnet", "mobilenet_v3", "tied_linears", "token_convolution", "unet"]


def low_bits(name: str, count: int = COUNT, **weights: Any) -> tuple[QuantModel, Tensor]:
    """A test network at W2A8, and its images."""
    x = NETWORKS[name].example(count, seed=1)
    fields = {"bits": 2, "observer": "minmax", **weights}
    recipe = QuantRecipe(
        weights=WeightRecipe.model_validate(fields), activations=ActivationRecipe(bits=8, observer="minmax")
    )
    return quantized(folded(name), recipe, x), x


def output_error(model: QuantModel, name: str, x: Tensor) -> float:
    """|simulated - float|^2 / |float|^2 of the products with a weight, from the networks' own values, without bias."""
    off = size = 0.0
    want, got = values_of(model.teacher, x), values_of(model.simulation, x)
    for node in gram_layers(model)[name]:
        op, (source,) = op_of(node), [n.name for n in activations_of(node)]
        weight = dict(model.teacher.named_buffers())[name]
        assert op is not None
        y = op.run(want[source], weight, None, **node.kwargs)
        entering = got[source]
        quantizer = model.activation_quantizers.get(source)
        entering = entering if quantizer is None else quantizer(entering)
        q = op.run(entering, model.weight_quantizers[name].get().dequantize(), None, **node.kwargs)
        off, size = off + float((q - y).double().square().sum()), size + float(y.double().square().sum())
    return off / size


@pytest.mark.parametrize("name", HARD)
def test_every_layer_gets_closer_on_held_out_images_or_stays(name: str) -> None:
    model, x = low_bits(name)
    before = dict(artifact_tensors(model))
    reports = list(round_weights(model, x, RECIPE, 0))
    assert [r.layer for r in reports] == list(gram_layers(model))
    assert all(r.kept == (r.loss_after < r.loss_before) for r in reports)
    assert sum(r.kept for r in reports) > len(reports) / 2
    changed = {key for key, value in artifact_tensors(model).items() if not torch.equal(value, before[key])}
    for report in reports:
        assert any(report.layer in key for key in changed) or not report.kept
    with torch.no_grad():
        assert bool(torch.isfinite(model(x)).all())


@pytest.mark.parametrize(
    ("name", "symmetric", "granularity"),
    [
        ("cifar_resnet", True, "per_channel"), ("mobilenet_v3", False, "per_channel"), ("unet", False, "per_channel"),
        ("unet", True, "per_tensor"), ("conv_called_twice", False, "per_tensor"),
    ],
)  # fmt: skip
def test_the_errors_reported_are_those_of_the_outputs(
    name: str, symmetric: bool, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At all positions of the held-out images, in the network as it is at the end: later layers change no earlier ones.

    A layer used twice is fed, at its second place, through layers that may change after it; so it is left out there.
    """
    monkeypatch.setattr(gram, "FEWEST_POSITIONS", 10**6)
    model, x = low_bits(name, granularity=granularity, symmetric=symmetric)
    reports = list(round_weights(model, x, RECIPE, 0))
    for report in reports:
        if len(gram_layers(model)[report.layer]) == 1:
            want = report.loss_after if report.kept else report.loss_before
            assert want == pytest.approx(output_error(model, report.layer, x[::8]), rel=1e-3, abs=5e-6), report.layer


def test_without_held_out_images_the_error_is_that_of_the_images_that_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never above nearest rounding's on them."""
    monkeypatch.setattr(gram, "FEWEST_POSITIONS", 10**6)
    for count, recipe in ((40, RECIPE), (COUNT, ReconstructRecipe(never_worse=False))):
        model, x = low_bits("cifar_resnet", count)
        for report in round_weights(model, x, recipe, 0):
            assert report.kept == (report.loss_after < report.loss_before)
            now = output_error(model, report.layer, x)
            assert now == pytest.approx(min(report.loss_after, report.loss_before), rel=1e-3, abs=1e-6)


def test_a_weight_used_twice_serves_both_places() -> None:
    """Its inputs at both are summed: in the end it serves them together better than the nearest codes."""
    model, x = low_bits("conv_called_twice", bits=3)
    (name,) = [layer for layer, nodes in gram_layers(model).items() if len(nodes) > 1]
    reports = {r.layer: r for r in round_weights(model, x, RECIPE, 0)}
    assert reports[name].kept
    rounded = output_error(model, name, x)
    nearest = low_bits("conv_called_twice", bits=3)[0].weight_quantizers[name].get()
    model.weight_quantizers[name].set(nearest)
    assert rounded < 0.8 * output_error(model, name, x)


def test_an_embedding_keeps_its_nearest_codes_even_where_it_is_tied() -> None:
    for name in ("tied_embedding", "token_convolution"):
        model, x = low_bits(name)
        before = artifact_tensors(model)
        reports = list(round_weights(model, x, RECIPE, 0))
        looked_up = [n for n in model.weight_quantizers if n not in {r.layer for r in reports}]
        assert looked_up
        after = artifact_tensors(model)
        assert all(torch.equal(after[k], before[k]) for k in after if any(k.startswith(n) for n in looked_up))


@pytest.mark.parametrize("name", ["conv_called_twice", "shufflenet_v2"])
@pytest.mark.parametrize("done", [1, 3])
def test_going_on_after_some_layers_gives_the_same_codes(name: str, done: int) -> None:
    whole, x = low_bits(name)
    reports = list(round_weights(whole, x, RECIPE, 5))
    begun, after = low_bits(name)[0], low_bits(name)[0]
    for _, report in zip(range(done), round_weights(begun, x, RECIPE, 5), strict=False):
        assert report.layer
    restore(after, artifact_tensors(begun))
    rest = list(round_weights(after, x, RECIPE, 5, done_layers=done))
    assert [(r.layer, r.loss_after) for r in rest] == [(r.layer, r.loss_after) for r in reports[done:]]
    expected, got = artifact_tensors(whole), artifact_tensors(after)
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


def test_progress_counts_layers() -> None:
    model, x = low_bits("conv_called_twice")
    told: list[tuple[int, int, str]] = []
    reports: list[LayerReport] = list(round_weights(model, x, RECIPE, 0, progress=lambda *a: told.append(a)))
    assert told == [(i, len(reports), r.layer) for i, r in enumerate(reports, start=1)]


@pytest.mark.parametrize("method", ["adaround", "qdrop"])
def test_reconstruction_starts_from_the_rounded_codes(method: Any) -> None:
    """Steps too small to change a decision leave the codes as they are, nearest or not."""
    model, x = low_bits("cifar_resnet")
    list(round_weights(model, x, RECIPE, 0))
    before = {name: q.get() for name, q in model.weight_quantizers.items()}
    recipe = ReconstructRecipe(method=method, iterations=2, rounding_lr=1e-9, scale_lr=1e-12, never_worse=False)
    list(reconstruct(model, x, recipe, 0))
    for name, quantizer in model.weight_quantizers.items():
        assert torch.equal(quantizer.get().scale, before[name].scale)
        different = quantizer.get().codes != before[name].codes
        assert int(different.sum()) <= before[name].codes.shape[0], "ties of symmetric 8-bit weights, one a channel"
        assert not different.any() or before[name].grid.bits == 8


def test_layers_with_too_many_inputs_to_an_output_keep_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "LARGEST", 60)
    model, x = low_bits("cifar_resnet")
    before = artifact_tensors(model)
    names = {r.layer for r in round_weights(model, x, RECIPE, 0)}
    weights = dict(model.teacher.named_buffers())
    assert names == {n for n in model.weight_quantizers if weights[n][0].numel() <= 60}
    assert 0 < len(names) < len(model.weight_quantizers)
    changed = [k for k, v in artifact_tensors(model).items() if not torch.equal(v, before[k])]
    assert all(any(k.startswith(n) for n in names) for k in changed)


def test_infinite_activations_are_an_error() -> None:
    model, x = low_bits("cifar_resnet")
    x[3] = float("inf")
    model.enable(activations=False)
    with pytest.raises(QuantizationError, match="reads NaN or infinite activations; check the calibration images"):
        list(round_weights(model, x, RECIPE, 0))
