"""Other tools' 8-bit methods: what they made, checked by hand, and their place in a comparison."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_study import Study, Told, content, predictions
from torch import Tensor

from calibquant.errors import ModelError, RecipeError
from calibquant.export.onnx_writer import float_onnx
from calibquant.pipeline import Prepared, prepare
from calibquant.quantization import QuantModel, make_plan
from calibquant.recipe import QuantRecipe, make_recipe
from calibquant.studies.compare import Comparison
from calibquant.studies.external import METHODS, Converted, static_peer

BOTH = {"methods": ["nearest", "onnxruntime-int8"], "bits": ["w8a8", "w4a4"]}
METHOD = [
    pytest.param(name, marks=pytest.mark.skipif(
        importlib.util.find_spec(external.package) is None, reason=f"{external.package} is not installed"
    ))
    for name, external in METHODS.items()
]  # fmt: skip


@pytest.fixture
def prepared(fields: dict[str, Any]) -> Prepared:
    return prepare(make_recipe(fields))


def batches(prepared: Prepared) -> Iterator[Tensor]:
    return prepared.batches(5)  # the last of them has one image


@pytest.mark.parametrize("method", METHOD)
def test_eight_bits_are_close_to_float_at_any_batch_size(method: str, prepared: Prepared) -> None:
    made = METHODS[method].convert(prepared, batches(prepared))
    assert isinstance(made, Converted)
    images = torch.cat(list(batches(prepared)))
    with torch.inference_mode():
        want = prepared.network(images)
        whole, single = made.network(images), made.network(images[:1])
    assert torch.allclose(single, whole[:1], atol=1e-5)
    assert 0 < (whole - want).abs().max() < 0.1 * want.abs().max()
    assert made.weight_bits == 8  # convolutions and the linear layer, all of them
    weights = sum(p.numel() for p in prepared.network.parameters() if p.dim() > 1)
    assert weights < made.bytes < 2 * weights


def test_onnx_runtime_gets_the_images_and_the_float_network(prepared: Prepared) -> None:
    """The image's scale is the min-max one of all batches; codes are weights rounded within their scale."""
    model = QuantModel(prepared.teacher, make_plan(prepared.teacher, QuantRecipe()))
    images = torch.cat(list(batches(prepared)))
    source = onnx.load_from_string(float_onnx(model, images))
    data = static_peer(source.SerializeToString(), (part.numpy() for part in batches(prepared)))
    graph = onnx.load_from_string(data).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    entry = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "x")
    low, high = min(0.0, images.min().item()), max(0.0, images.max().item())
    assert stored[entry.input[1]] == pytest.approx((high - low) / 255, rel=1e-5)
    weights = {t.name: numpy_helper.to_array(t) for t in source.graph.initializer if len(t.dims) == 4}
    found = 0
    for node in graph.node:
        name = node.input[0].removesuffix("_quantized")
        if node.op_type == "DequantizeLinear" and name in weights:
            scale = stored[node.input[1]].reshape(-1, 1, 1, 1)
            difference = stored[node.input[0]] * scale - weights[name]
            assert (np.abs(difference) <= scale * 0.501).all()
            found += 1
    assert found == len(weights) > 2


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_the_frameworks_codes_are_the_weights_rounded(prepared: Prepared) -> None:
    network = METHODS["framework-int8"].convert(prepared, batches(prepared)).network
    assert isinstance(network, torch.fx.GraphModule)
    folded = [p for p in prepared.teacher.state_dict().values() if p.dim() == 4]
    codes = [t for t in network.state_dict().values() if t.dtype == torch.int8 and t.dim() == 4]
    fits = [[_rounded_to(weight, code) for code in codes] for weight in folded]
    assert len(codes) == len(folded) > 2
    assert np.array_equal(np.sum(fits, axis=0), np.ones(len(codes)))
    assert np.array_equal(np.sum(fits, axis=1), np.ones(len(codes)))


def _rounded_to(weight: Tensor, code: Tensor) -> bool:
    """Whether the codes are a weight's at its symmetric min-max scales, one a channel."""
    scale = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 127.5
    return weight.shape == code.shape and bool(((code * scale - weight).abs() <= 0.51 * scale).all())


@pytest.fixture
def compared(study: Study) -> Comparison:
    return study(**BOTH)


def test_a_comparison_measures_them_on_the_same_images(compared: Comparison) -> None:
    result = compared.result
    assert [(row["setting"], row["method"]) for row in result["table"]] == [
        ("W8A8", "nearest"), ("W8A8", "onnxruntime-int8"), ("W4A4", "nearest"),
    ]  # fmt: skip
    assert (result["done"], result["planned"]) == (6, 6)
    facts = result["methods"]["onnxruntime-int8"]
    assert (facts["boundary"], facts["placement"], facts["calibration_count"]) == ("none", "the tool's own", 16)
    own, other = (cell for cell in result["cells"] if cell["setting"] == "W8A8" and cell["seed"] == 1005)
    assert np.array_equal(predictions(compared, own)[1], predictions(compared, other)[1])
    metrics = json.loads((compared.folder / other["run"] / "metrics.json").read_text())
    guesses, labels = predictions(compared, other)
    assert metrics["quantized"]["top1"] == pytest.approx((guesses == labels).mean())
    assert other["agreement"] == metrics["quantized"]["agreement"] > 0.8
    mine, theirs = ((compared.folder / c["run"] / "manifest.csv").read_bytes() for c in (own, other))
    assert mine == theirs
    assert [test["method"] for test in result["tests"]] == ["onnxruntime-int8"]
    page = (compared.folder / "compare.md").read_text()
    assert [line.split("|")[3].strip() for line in page.splitlines() if line.startswith("| onnxruntime-int8 ")] == ["–"]


def test_finished_cells_are_taken_and_lost_predictions_made_again(
    compared: Comparison, study: Study, told: Told
) -> None:
    stored = compared.folder / "onnxruntime-int8-w8a8-seed1006/predictions.npz"
    before = content(compared.folder)
    study(**BOTH, reporter=told)
    assert told.ways == ["taken"] * 6
    stored.unlink()
    study(**BOTH, reporter=told)
    assert sorted(told.ways[6:]) == ["evaluated again"] + ["taken"] * 5
    assert {n: d for n, d in content(compared.folder).items() if n.endswith(".npz")} == {
        n: d for n, d in before.items() if n.endswith(".npz")
    }
    study(**BOTH | {"seeds": 3}, reporter=told)
    assert told.ways[12:] == ["taken"] * 6 + ["run"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": ["w4a4", "w8a4"]}, "compare, bits: 'onnxruntime-int8' knows 8 bits alone; add w8a8, or leave the"),
        ({"methods": ["nearest", "framework-in8"]}, "methods: 'framework-in8' is unknown; did you mean 'framework"),
        ({"methods": ["framework-int8"]},
         r"framework-int8: needs torchao, which is not installed; pip install 'calibquant\[baselines\]'$"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_one_line_and_leaves_nothing(
    change: dict[str, Any], message: str, study: Study, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibquant.studies.external.find_spec", lambda name: None)
    with pytest.raises((RecipeError, ModelError), match=message):
        study(**BOTH | change)
    assert not Path(fields["runs"]).exists()


def test_a_part_of_a_network_is_refused(study: Study) -> None:
    with pytest.raises(RecipeError, match=r"model.submodule: onnxruntime-int8 quantizes whole networks; leave it out"):
        study(methods=["onnxruntime-int8"], bits=["w8a8"], overrides=["model.submodule=layer2"])


def test_what_a_tool_does_not_take_is_one_line(prepared: Prepared) -> None:
    with pytest.raises(ModelError, match=r"quantize_static W8A8: does not take float.onnx \(.*\); "):
        static_peer(float_onnx(QuantModel(prepared.teacher, make_plan(prepared.teacher, QuantRecipe())),
                               next(batches(prepared))), [np.zeros((1, 2, 3, 4), np.float32)])  # fmt: skip
