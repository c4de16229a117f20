"""Runs with reconstruction on the digits: what metrics.json and log.txt say, and that equal runs give equal bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import calibquant
from calibquant.data import batches
from calibquant.graph import units
from calibquant.pipeline import Reporter, Run
from calibquant.recipe import make_recipe

FIELDS: dict[str, Any] = {
    "model": {"name": "digits_resnet"},
    "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}},
    "calibration": {"count": 72},
    "evaluation": {"count": 40},
    "quant": {"weights": {"bits": 2}, "activations": {"bits": 2}},
    "threads": 1,
}
ROW = {"unit", "loss_before", "loss_after", "kept", "settled", "seconds"}


def settings(method: str) -> dict[str, Any]:
    return {"method": method, "iterations": 8, "rounding_lr": 0.05, "scale_lr": 1e-3}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, the same for all runs."""
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    torch.manual_seed(0)
    calibquant.zoo.save_weights(calibquant.zoo.build("digits_resnet"), path)
    return path


def run(weights: Path, runs: Path, method: str, **fields: Any) -> Run:
    tree = FIELDS | {"runs": str(runs), "model": {**FIELDS["model"], "weights": str(weights)}} | fields
    return calibquant.quantize(make_recipe(tree | {"reconstruct": settings(method)}))


@pytest.fixture(scope="module")
def by_method(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {m: run(weights, tmp_path_factory.mktemp(m), m) for m in ("none", "adaround", "qdrop")}


@pytest.mark.parametrize(("method", "granularity"), [("adaround", "layer"), ("qdrop", "block")])
def test_metrics_hold_a_row_for_each_unit(by_method: dict[str, Run], method: str, granularity: str) -> None:
    done = by_method[method]
    rows = json.loads((done.folder / "metrics.json").read_text())["units"]
    assert [row["unit"] for row in rows] == [u.name for u in units(done.model.teacher.graph, granularity)]
    for row in rows:
        assert set(row) == ROW
        assert row["kept"] == (row["loss_after"] < row["loss_before"]), "72 images are enough to hold some out"
        assert 0 <= row["settled"] <= 1
        assert row["seconds"] > 0
    assert any(row["kept"] for row in rows)
    assert rows == done.metrics["units"]
    assert done.metrics["seconds"]["reconstruct"] > 0


@pytest.mark.parametrize("method", ["adaround", "qdrop"])
def test_the_log_says_what_became_of_each_unit(by_method: dict[str, Run], method: str) -> None:
    done = by_method[method]
    log = (done.folder / "log.txt").read_text()
    lines = re.findall(r"unit (\S+): loss (\S+) -> (\S+), (kept|rolled back)", log)
    rows = done.metrics["units"]
    assert [line[0] for line in lines] == [row["unit"] for row in rows]
    for (_, before, after, verdict), row in zip(lines, rows, strict=True):
        assert float(before) == pytest.approx(row["loss_before"], rel=1e-4)
        assert float(after) == pytest.approx(row["loss_after"], rel=1e-4)
        assert (verdict == "kept") == row["kept"]
    rolled = sum(not row["kept"] for row in rows)
    assert f"{len(rows)} units, {rolled} rolled back" in log


@pytest.mark.parametrize("method", ["none", "adaround", "qdrop"])
def test_the_artifact_loads_bit_for_bit(by_method: dict[str, Run], method: str) -> None:
    done = by_method[method]
    images = calibquant.open_images(make_recipe(FIELDS).data, "evaluation")
    x = next(batches(images, 20)).images
    loaded = calibquant.load(done.folder)
    with torch.no_grad():
        assert torch.equal(loaded(x), done.model(x))
    for name, quantizer in done.model.weight_quantizers.items():
        assert torch.equal(loaded.weight_quantizers[name].get().codes, quantizer.get().codes)
    for name, activation in done.model.activation_quantizers.items():
        assert torch.equal(loaded.activation_quantizers[name].get()[0], activation.get()[0])


def test_methods_differ_in_what_they_learn(by_method: dict[str, Run]) -> None:
    """Both change codes; only qdrop changes activation scales."""
    models = {method: done.model for method, done in by_method.items()}

    def codes(method: str) -> list[torch.Tensor]:
        return [q.get().codes for q in models[method].weight_quantizers.values()]

    def scales(method: str) -> list[float]:
        return [q.get()[0].item() for q in models[method].activation_quantizers.values()]

    for method in ("adaround", "qdrop"):
        assert not all(torch.equal(a, b) for a, b in zip(codes(method), codes("none"), strict=True))
    assert scales("adaround") == scales("none") != scales("qdrop")


def test_without_reconstruction_there_are_no_units(by_method: dict[str, Run]) -> None:
    done = by_method["none"]
    assert json.loads((done.folder / "metrics.json").read_text())["units"] == []
    assert "reconstruct" not in done.metrics["seconds"]
    assert "unit " not in (done.folder / "log.txt").read_text()


@pytest.mark.parametrize("method", ["adaround", "qdrop"])
def test_two_runs_are_byte_identical(by_method: dict[str, Run], weights: Path, tmp_path: Path, method: str) -> None:
    torch.manual_seed(99)  # the caller's stream has no say
    done, again = by_method[method], run(weights, tmp_path, method)
    for name in ("model.safetensors", "graph.json", "manifest.csv", "record.json", "record.txt"):
        assert (again.folder / name).read_bytes() == (done.folder / name).read_bytes(), name
    for one, other in zip(done.metrics["units"], again.metrics["units"], strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_another_seed_gives_another_network(by_method: dict[str, Run], weights: Path, tmp_path: Path) -> None:
    other = run(weights, tmp_path, "qdrop", seed=3, calibration={"count": 72, "order": "first"})
    same = run(weights, tmp_path, "qdrop", seed=4, calibration={"count": 72, "order": "first"})
    assert (other.folder / "manifest.csv").read_bytes() != (by_method["qdrop"].folder / "manifest.csv").read_bytes()
    losses = [[row["loss_after"] for row in r.metrics["units"]] for r in (other, same)]
    assert losses[0] != losses[1], "on the same images"


class Heard(Reporter):
    """Remembers the steps and the progress inside them."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.progressed: dict[str, list[tuple[int, int | None]]] = {}

    def step(self, number: int, total: int, title: str) -> None:
        self.steps.append(f"{number}/{total} {title}")

    def progress(self, done: int, total: int | None = None) -> None:
        self.progressed.setdefault(self.steps[-1], []).append((done, total))

    def note(self, text: str) -> None:
        pass


def test_the_step_is_announced_and_its_progress_ends_at_the_total(weights: Path, tmp_path: Path) -> None:
    heard = Heard()
    tree = FIELDS | {"runs": str(tmp_path), "model": {**FIELDS["model"], "weights": str(weights)}}
    done = calibquant.quantize(make_recipe(tree | {"reconstruct": settings("qdrop")}), reporter=heard)
    (step,) = [s for s in heard.steps if "Reconstruct" in s]
    assert step == "4/7 Reconstruct by qdrop"
    total = 8 * len(done.metrics["units"])
    assert heard.progressed[step] == [(i, total) for i in range(1, total + 1)]
