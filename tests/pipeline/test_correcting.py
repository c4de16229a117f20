"""Equalization and corrections in a run: steps, metrics, files, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import calibquant
from calibquant import TensorImages, pipeline
from calibquant.errors import RecipeError, RunFolderError
from calibquant.pipeline.reporting import Silent
from calibquant.reconstruction import network as reconstruction


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


IMAGES = TensorImages(torch.rand(72, 3, 12, 12, generator=torch.Generator().manual_seed(3)), [i % 4 for i in range(72)])


class Steps(Silent):
    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, number: int, total: int, title: str) -> None:
        self.steps.append(f"{number}/{total} {title}")


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    return {
        "runs": str(tmp_path / "runs"), "calibration": {"count": 72, "batch_size": 36}, "threads": 1,
        "quant": {"equalize": True, "bias_correction": "empirical", "weights": {"correction": "mean-variance"}},
    }  # fmt: skip


def test_a_run_equalizes_corrects_and_tells(fields: dict[str, Any]) -> None:
    heard = Steps()
    run = calibquant.quantize(fields, small(), IMAGES, reporter=heard)
    assert heard.steps[1] == "2/9 Equalize the weight ranges of neighbouring layers"
    assert heard.steps[4] == "5/9 Correct weights and biases"
    assert [int(step.split("/")[0]) for step in heard.steps] == list(range(1, 10))
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert {"equalize", "correct"} <= set(metrics["seconds"])
    pairs = metrics["equalization"]["pairs"]
    assert [(p["producer"], p["consumer"]) for p in pairs] == [("_0", "_3"), ("_3", "_5"), ("_5", "_8")]
    assert not metrics["equalization"]["undone"]
    assert [len(metrics["corrections"][what]) for what in ("weights", "biases")] == [4, 4]
    log = (run.folder / "log.txt").read_text()
    assert "_0 -> _3: " in log
    assert "correction of biases, _8: bias changed by up to" in log
    assert (run.folder / "deploy.onnx").is_file()
    images = torch.rand(4, 3, 12, 12)
    loaded = calibquant.load(run.folder)
    with torch.no_grad():
        assert torch.equal(loaded(images), run.model.to("cpu")(images))
    parity = json.loads((run.folder / "parity.json").read_text())
    assert {row["file"] for row in parity["files"]} == {"float.onnx", "fake_quant.onnx", "deploy.onnx"}


def test_without_them_metrics_say_so(fields: dict[str, Any]) -> None:
    run = calibquant.quantize({**fields, "quant": {}}, small(), IMAGES)
    assert run.metrics["equalization"] is None
    assert run.metrics["corrections"] == {}


@pytest.mark.parametrize("correction", ["analytic", "empirical"])
def test_after_reconstruction_biases_are_corrected_and_a_resumed_run_ends_the_same(
    correction: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields |= {
        "quant": {"equalize": True, "bias_correction": correction, "weights": {"bits": 2}},
        "reconstruct": {"method": "qdrop", "iterations": 3, "rounding_lr": 0.05},
    }
    whole = calibquant.quantize(fields, small(), IMAGES)
    assert any(delta.delta is not None for delta in whole.model.bias_deltas.values())
    learn, calls = reconstruction.learn_unit, []

    def stops(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(args[0])
        return learn(*args, **kwargs)

    monkeypatch.setattr(reconstruction, "learn_unit", stops)
    with pytest.raises(RunFolderError, match="was interrupted") as caught:
        calibquant.quantize(fields, small(), IMAGES)
    monkeypatch.setattr(reconstruction, "learn_unit", learn)
    resumed = pipeline.resume(Path(caught.value.where), small(), IMAGES)
    for name in ("model.safetensors", "graph.json", "record.json"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_correction_of_weights_and_learned_roundings_exclude_each_other(fields: dict[str, Any]) -> None:
    fields["reconstruct"] = {"method": "qdrop"}
    with pytest.raises(RecipeError, match=r"quant.weights.correction: corrects rounding to nearest, which .*; use "):
        calibquant.quantize(fields, small(), IMAGES)
