"""Runs with Gram rounding: what they leave, that deploy.onnx stays exact, and that an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import calibquant
from calibquant import pipeline
from calibquant.errors import RecipeError, RunFolderError
from calibquant.pipeline import stages
from calibquant.recipe import make_recipe
from calibquant.studies.digits import FIELDS
from calibquant.zoo import build, save_weights

FILES = ("model.safetensors", "record.json", "manifest.csv")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Digits at W2A4 with random weights, Gram rounding and no reconstruction."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_weights(build("digits_resnet"), tmp_path / "digits.safetensors")
    return FIELDS | {
        "model": {"name": "digits_resnet", "weights": "digits.safetensors"},
        "calibration": {"count": 72, "batch_size": 36},
        "evaluation": {"count": 20},
        "quant": {"weights": {"bits": 2, "rounding": "gram"}, "activations": {"bits": 4}},
        "reconstruct": {"method": "none"},
        "export": {"onnx": False},
    }


def _learning(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | {"reconstruct": {"method": "qdrop", "iterations": 3}}


@pytest.mark.parametrize("learning", [False, True])
def test_metrics_and_log_say_what_became_of_each_layer(recipe: dict[str, Any], learning: bool) -> None:
    done = calibquant.quantize(make_recipe(_learning(recipe) if learning else recipe))
    metrics = json.loads((done.folder / "metrics.json").read_text())
    layers, log = metrics["layers"], (done.folder / "log.txt").read_text()
    assert [row["layer"] for row in layers] == list(done.model.weight_quantizers)
    assert any(row["kept"] for row in layers)
    assert all(row["kept"] == (row["loss_after"] < row["loss_before"]) for row in layers)
    assert log.count("layer ") >= len(layers)
    assert ("Round weights by Gram matrices" in log, "Reconstruct by qdrop" in log) == (True, learning)
    assert (metrics["rounding"], len(metrics["units"]) > 0) == ("gram", learning)
    assert metrics["seconds"]["gram"] > 0
    last = metrics["feature_errors"][-1]
    assert last["reconstructed"] < last["nearest"]


def test_deploy_onnx_is_exact(recipe: dict[str, Any]) -> None:
    """Every code of the integer network is the integer executor's, with biases on the new scales."""
    done = calibquant.quantize(make_recipe(recipe | {"export": {"onnx": True, "images": 8}}))
    assert (done.folder / "deploy.onnx").is_file()
    assert "is left out" not in (done.folder / "log.txt").read_text()
    loaded = calibquant.load(done.folder)
    x = torch.rand(4, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(x), done.model(x))


@pytest.mark.parametrize(("learning", "layers"), [(False, 3), (True, 2), (True, 99)])
def test_an_interrupted_run_ends_with_the_same_bytes(
    learning: bool, layers: int, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after some layers, or after all of them, before the first unit."""
    recipe = _learning(recipe) if learning else recipe
    whole, save, left = calibquant.quantize(make_recipe(recipe)), stages.save_checkpoint, [layers]

    def counted(folder: Any, model: Any, manifest: str, progress: stages.Progress, fields: dict[str, Any]) -> None:
        if not left[0] or progress.reports:
            raise KeyboardInterrupt
        left[0] -= 1
        save(folder, model, manifest, progress, fields)

    monkeypatch.setattr(stages, "save_checkpoint", counted)
    with pytest.raises(RunFolderError, match="was interrupted") as caught:
        calibquant.quantize(make_recipe(recipe))
    monkeypatch.setattr(stages, "save_checkpoint", save)
    again = pipeline.resume(Path(caught.value.where))
    assert len(again.metrics["layers"]) == len(whole.metrics["layers"])
    for name in FILES:
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert not list(again.folder.glob("checkpoint*"))


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Sum()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.head(x), self.head(-x)).mean((2, 3))


class _Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.conv(x + y)


def test_a_part_with_several_inputs_is_refused(tmp_path: Path) -> None:
    tree = {
        "model": {"submodule": "inner"},
        "calibration": {"count": 8},
        "quant": {"weights": {"rounding": "gram"}},
        "runs": str(tmp_path),
    }
    with pytest.raises(RecipeError, match=r"quant\.weights\.rounding: gram needs .* one input; use nearest"):
        calibquant.quantize(tree, _Two(), calibquant.TensorImages(torch.rand(8, 3, 8, 8)))
