"""The record: its text form read by a parser of its own gives our values, its JSON form fits the graph."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS, folded, quantized
from torch import Tensor

from calibquant.export.amct import amct_config
from calibquant.export.record import record, record_text
from calibquant.quantization import QuantModel
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe

CASES: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "2 bits": {"bits": 2},
    "symmetric": {"symmetric": True},
    "8 bits": {"bits": 8, "placement": "academic"},
    "per tensor": {"granularity": "per_tensor"},
    "dynamic": {"dynamic": True},
}


def model_of(
    name: str, bits: int = 4, symmetric: bool = False, placement: Any = "integer", dynamic: bool = False,
    granularity: Any = "per_channel",
) -> QuantModel:  # fmt: skip
    recipe = QuantRecipe(
        placement=placement,
        weights=WeightRecipe(bits=bits, symmetric=symmetric, granularity=granularity, observer="minmax"),
        activations=ActivationRecipe(bits=bits, symmetric=symmetric, dynamic=dynamic, observer="minmax"),
    )
    return quantized(folded(name), recipe, NETWORKS[name].example(4, seed=1))


def parse(text: str) -> list[dict[str, Any]]:
    """AMCT's record file: `record { key: "…" value { name: number … } }`, names may repeat."""
    tokens: Iterator[str] = iter(re.findall(r'"[^"]*"|[{}]|[^\s{}":]+:?', text))

    def block() -> dict[str, list[Any]]:
        fields: dict[str, list[Any]] = {}
        for token in tokens:
            if token == "}":
                return fields
            if token.endswith(":"):
                fields.setdefault(token[:-1], []).append(json.loads(next(tokens)))
            else:
                assert next(tokens) == "{"
                fields.setdefault(token, []).append(block())
        raise AssertionError("a brace is not closed")

    records = []
    for token in tokens:
        assert (token, next(tokens)) == ("record", "{")
        fields = block()
        assert set(fields) == {"key", "value"}
        records.append({"key": fields["key"][0], **fields["value"][0]})
    return records


def amct_codes(value: Tensor, scale: np.ndarray, offset: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes by AMCT's formula, in float32."""
    codes = np.rint(value.numpy() / scale) + offset
    return np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["cifar_resnet", "squeezenet", "conv_called_twice"])
def test_the_text_form_means_the_same_values(name: str, case: str) -> None:
    model = model_of(name, **CASES[case])
    records, rows = parse(record_text(model)), record(model)
    weights = dict(model.teacher.named_buffers())
    keys = [r["key"] for r in records]
    layers = [row["layer"] for row in rows]
    expected = [row["node"] if row["layer"] in layers[:i] else row["layer"] for i, row in enumerate(rows)]
    assert keys == expected
    assert len(set(keys)) == len(keys)
    for entry, row in zip(records, rows, strict=True):
        quantizer = model.weight_quantizers[row["weight"]["parameter"]]
        bits = quantizer.plan.grid.bits
        widest = max(bits, row["input"]["bits"] if row["input"] else 0)
        assert entry["dst_type"] == ["INT4" if widest <= 4 else "INT8" if widest <= 8 else "INT16"]
        weight = weights[quantizer.name]
        assert len(entry["scale_w"]) == len(entry["offset_w"]) == quantizer.get().scale.numel()
        shape = (-1,) + (1,) * (weight.dim() - 1)
        scale, offset = (np.array(entry[k], np.float32).reshape(shape) for k in ("scale_w", "offset_w"))
        codes = amct_codes(weight, scale, offset, bits)
        assert np.array_equal((codes - offset) * scale, quantizer(weight).numpy())
        source = row["input"]
        if source is None:
            assert "scale_d" not in entry
            assert "offset_d" not in entry
            continue
        activation = model.activation_quantizers[source["quantizer"]]
        x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * activation.scale * 2 ** source["bits"] / 3
        scale_d, offset_d = (np.array(entry[k], np.float32) for k in ("scale_d", "offset_d"))
        data = amct_codes(x, scale_d, offset_d, source["bits"])
        assert np.array_equal((data - offset_d) * scale_d, activation(x).numpy())


def test_records_fit_the_graph() -> None:
    model = model_of("cifar_resnet")
    rows = json.loads(json.dumps(record(model), allow_nan=False))
    layers = ["conv1", *[f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1) for c in (1, 2)], "linear"]
    assert [row["layer"] for row in rows] == layers
    assert [row["op"] for row in rows] == ["conv2d"] * 13 + ["linear"]
    assert [row["weight"]["bits"] for row in rows] == [7, *[4] * 12, 7]
    assert [row["weight"]["signed"] for row in rows] == [True, *[False] * 12, True]
    sources = [row["input"]["quantizer"] for row in rows]
    # a block's first convolution reads the sum before it, its second what its first gives; the classifier the pool
    assert sources == [
        "x", "relu", "layer1_0_relu", "layer1_0_relu_1", "layer1_1_relu", "layer1_1_relu_1", "layer2_0_relu",
        "layer2_0_relu_1", "layer2_1_relu", "layer2_1_relu_1", "layer3_0_relu", "layer3_0_relu_1", "layer3_1_relu",
        "avg_pool2d",
    ]  # fmt: skip
    outputs = [row["output"]["quantizer"] if row["output"] else None for row in rows]
    # residual branches are quantized before their sum
    assert outputs == [
        "relu", "layer1_0_relu", "layer1_0_conv2", "layer1_1_relu", "layer1_1_conv2", "layer2_0_relu",
        "layer2_0_conv2", "layer2_1_relu", "layer2_1_conv2", "layer3_0_relu", "layer3_0_conv2", "layer3_1_relu",
        "layer3_1_conv2", None,
    ]  # fmt: skip
    for row in rows:
        quantizer = model.activation_quantizers[row["input"]["quantizer"]]
        assert row["input"]["scale"] == float(quantizer.scale)
        assert row["input"]["zero_point"] == int(quantizer.zero_point)
        assert len(row["weight"]["scale"]) == len(dict(model.teacher.named_buffers())[row["weight"]["parameter"]])


@pytest.mark.parametrize(("name", "calls"), [("conv_called_twice", 2), ("block_called_twice", 3), ("tied_linears", 2)])
def test_every_call_of_a_shared_weight_has_its_own_record(name: str, calls: int) -> None:
    rows = record(model_of(name))
    keys = [row["weight"]["parameter"] for row in rows]
    shared = [row for row in rows if keys.count(row["weight"]["parameter"]) > 1]
    assert len(shared) == calls
    assert len({row["input"]["quantizer"] for row in shared}) == calls
    assert len({str(row["weight"]) for row in shared}) == 1


def test_what_is_float_is_told() -> None:
    academic = record(model_of("cifar_resnet", placement="academic"))
    assert academic[0]["input"] is None
    assert academic[-1]["input"] is None  # the mean of quantized values lies on no grid
    assert all(row["input"] for row in academic[1:-1])
    assert all(row["input"] is None and row["output"] is None for row in record(model_of("lenet", dynamic=True)))


def test_an_input_is_found_through_what_only_moves_values() -> None:
    rows = {row["layer"]: row for row in record(model_of("vgg_bn"))}
    assert rows["features.4"]["input"]["quantizer"] == "features_2"  # a maximum pool lies between
    assert rows["classifier.3"]["input"]["quantizer"] == "classifier_1"


def test_amcts_words_for_observers() -> None:
    model = model_of("lenet")
    words = {"kl": "hfmg", "hfmg": "hfmg", "ifmr": "ifmr", "minmax": "ifmr", "aciq": "ifmr"}
    for observer, word in words.items():
        recipe = QuantRecipe(activations=ActivationRecipe(observer=observer))  # type: ignore[arg-type]
        config = amct_config(model, recipe, batches=1, learned=False)
        params = next(v for v in config.values() if isinstance(v, dict))["activation_quant_params"]
        assert params["act_algo"] == word
        assert params.get("search_range", [0.7, 1.3]) == [0.7, 1.3]
        assert ("num_of_bins" in params) == (word == "hfmg")
