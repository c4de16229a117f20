"""A damaged or inconsistent artifact is a one-line error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, folded, quantized
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibquant.errors import RunFolderError
from calibquant.export.artifact import GRAPH, MODEL, load_artifact, save_artifact
from calibquant.quantization import QuantModel
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe
from calibquant.runfolder import RunFolder

Description = dict[str, Any]


def _edit(change: Callable[[Description], Any]) -> Callable[[RunFolder], None]:
    def damage(run: RunFolder) -> None:
        description = json.loads(run.read(GRAPH))
        changed = change(description)
        run.write(GRAPH, json.dumps(description if changed is None else changed))

    return damage


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[RunFolder], None]:
    def damage(run: RunFolder) -> None:
        tensors = load_file(run.path / MODEL)
        change(tensors)
        save_file(tensors, run.path / MODEL)

    return damage


def _cut(file: str, keep: int) -> Callable[[RunFolder], None]:
    return lambda run: (run.path / file).write_bytes(run.read(file)[:keep]) and None


def _conv(description: Description) -> Description:
    return next(row for row in description["nodes"] if row["op"] == "conv2d")


DAMAGES: dict[str, Callable[[RunFolder], None]] = {
    "graph.json is missing": lambda run: (run.path / GRAPH).unlink(),
    "model.safetensors is missing": lambda run: (run.path / MODEL).unlink(),
    "graph.json ends early": _cut(GRAPH, 300),
    "model.safetensors ends early": _cut(MODEL, 2000),
    "model.safetensors is empty": _cut(MODEL, 0),
    "graph.json is a list": _edit(lambda d: [d]),
    "graph.json is a number": _edit(lambda d: 3),
    "graph.json is of another version": _edit(lambda d: d.update(format_version=99)),
    "no nodes": _edit(lambda d: d.pop("nodes") and None),
    "nodes is no list": _edit(lambda d: d.update(nodes={"a": 1})),
    "nodes is a number": _edit(lambda d: d.update(nodes=1)),
    "a node is no dictionary": _edit(lambda d: d["nodes"].insert(0, "x")),
    "an unknown op": _edit(lambda d: _conv(d).update(op="os.system")),
    "an attribute is missing": _edit(lambda d: _conv(d)["attributes"].pop("stride") and None),
    "weights is a list": _edit(lambda d: d.update(weights=[])),
    "a weight's row is a number": _edit(lambda d: d["weights"].update({"conv1.weight": 1})),
    "bits of text": _edit(lambda d: d["weights"]["conv1.weight"].update(bits="four")),
    "too many bits": _edit(lambda d: d["weights"]["conv1.weight"].update(bits=99)),
    "other bits": _edit(lambda d: d["weights"]["conv1.weight"].update(bits=4)),
    "another shape": _edit(lambda d: d["weights"]["conv1.weight"].update(shape=[1, 2])),
    "an axis too far": _edit(lambda d: d["weights"]["conv1.weight"].update(axis=9)),
    "the wrong axis": _edit(lambda d: d["weights"]["conv1.weight"].update(axis=1)),
    "a weight that no node uses": _edit(lambda d: d["weights"].update(ghost=d["weights"]["conv1.weight"])),
    "an activation that no node is": _edit(lambda d: d["activations"].append({**d["activations"][0], "node": "ghost"})),
    "activations is null": _edit(lambda d: d.update(activations=None)),
    "codes are missing": _tensors(lambda t: t.pop("conv1.weight.codes")),
    "codes are too short": _tensors(lambda t: t.update({"conv1.weight.codes": torch.zeros(3, dtype=torch.uint8)})),
    "codes are float": _tensors(lambda t: t.update({"linear.weight.codes": torch.zeros(320)})),
    "a scale is missing": _tensors(lambda t: t.pop("conv1.weight.scale")),
    "a scale of another shape": _tensors(lambda t: t.update({"conv1.weight.scale": torch.ones(3)})),
    "a bias is missing": _tensors(lambda t: t.pop("linear.bias")),
    "too many activation scales": _tensors(lambda t: t.update({"activations.scale": torch.ones(99)})),
    "an activation scale without a zero point": _tensors(lambda t: t.pop("activations.zero_point")),
    "too few activation scales": _tensors(lambda t: t.update({"activations.scale": torch.ones(2)})),
    "no activation scales": _tensors(lambda t: t.pop("activations.scale")),
}


@pytest.fixture(scope="module")
def model() -> QuantModel:
    images = NETWORKS["cifar_resnet"].example(4)
    recipe = QuantRecipe(weights=WeightRecipe(observer="minmax"), activations=ActivationRecipe(observer="minmax"))
    return quantized(folded("cifar_resnet"), recipe, images)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_a_one_line_error(name: str, model: QuantModel, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    save_artifact(model, run)
    load_artifact(run)
    DAMAGES[name](run)
    with pytest.raises(RunFolderError) as caught:
        load_artifact(run)
    text = str(caught.value)
    assert "\n" not in text
    assert GRAPH in text or MODEL in text
    assert len(text) < 500
