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
from calibquant.pipeline.quantizing import with_network_defaults
from calibquant.recipe import make_recipe

FIELDS: dict[str, Any] = {
    "model": {"name": "digits_resnet"},
    "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}},
    "calibration": {"count": 72},
    "evaluation": {"count": 40},
    "quant": {"weights": {"bits": 2}, "activations": {"bits": 2}},
    "threads": 1,
}
METHODS = ("adaround", "brecq", "qdrop")
ROW = {"unit", "phase", "loss_before", "loss_after", "kept", "settled", "seconds"}


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
    return {m: run(weights, tmp_path_factory.mktemp(m), m) for m in ("none", *METHODS)}


@pytest.mark.parametrize(("method", "granularity"), [("adaround", "layer"), ("brecq", "block"), ("qdrop", "block")])
def test_metrics_hold_a_row_for_each_unit(by_method: dict[str, Run], method: str, granularity: str) -> None:
    done = by_method[method]
    rows = json.loads((done.folder / "metrics.json").read_text())["units"]
    names = [u.name for u in units(done.model.teacher.graph, granularity)]
    assert [row["unit"] for row in rows if row["phase"] != "scales"] == names
    second = [row["unit"] for row in rows if row["phase"] == "scales"]
    assert second == (names if method == "brecq" else []), "the integer placement quantizes something in every unit"
    for row in rows:
        assert set(row) == ROW
        assert row["kept"] == (row["loss_after"] < row["loss_before"]), "72 images are enough to hold some out"
        assert 0 <= row["settled"] <= 1
        assert row["seconds"] > 0
    assert any(row["kept"] for row in rows)
    assert rows == done.metrics["units"]
    assert done.metrics["seconds"]["reconstruct"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_log_says_what_became_of_each_unit(by_method: dict[str, Run], method: str) -> None:
    done = by_method[method]
    log = (done.folder / "log.txt").read_text()
    lines = re.findall(r"unit (\S+), (?:roundings|scales|both): loss (\S+) -> (\S+), (kept|rolled back)", log)
    rows = done.metrics["units"]
    assert [line[0] for line in lines] == [row["unit"] for row in rows]
    for (_, before, after, verdict), row in zip(lines, rows, strict=True):
        assert float(before) == pytest.approx(row["loss_before"], rel=1e-4)
        assert float(after) == pytest.approx(row["loss_after"], rel=1e-4)
        assert (verdict == "kept") == row["kept"]
    rolled = sum(not row["kept"] for row in rows)
    assert f"{len(rows)} units, {rolled} rolled back" in log


@pytest.mark.parametrize("method", ["none", *METHODS])
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
    """All change codes; adaround keeps the activation scales."""
    models = {method: done.model for method, done in by_method.items()}

    def codes(method: str) -> list[torch.Tensor]:
        return [q.get().codes for q in models[method].weight_quantizers.values()]

    def scales(method: str) -> list[float]:
        return [q.get()[0].item() for q in models[method].activation_quantizers.values()]

    for method in METHODS:
        assert not all(torch.equal(a, b) for a, b in zip(codes(method), codes("none"), strict=True))
    assert scales("adaround") == scales("none") != scales("qdrop")
    assert scales("brecq") != scales("none")


def test_without_reconstruction_there_are_no_units(by_method: dict[str, Run]) -> None:
    done = by_method["none"]
    assert json.loads((done.folder / "metrics.json").read_text())["units"] == []
    assert "reconstruct" not in done.metrics["seconds"]
    assert "unit " not in (done.folder / "log.txt").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_are_byte_identical(by_method: dict[str, Run], weights: Path, tmp_path: Path, method: str) -> None:
    torch.manual_seed(99)  # the caller's stream has no say
    done, again = by_method[method], run(weights, tmp_path, method)
    for name in ("model.safetensors", "graph.json", "manifest.csv", "record.json", "record.txt"):
        assert (again.folder / name).read_bytes() == (done.folder / name).read_bytes(), name
    for one, other in zip(done.metrics["units"], again.metrics["units"], strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_another_seed_gives_another_network(by_method: dict[str, Run], weights: Path, tmp_path: Path) -> None:
    other = run(weights, tmp_path, "qdrop", seed=3, calibration={"count": 72, "strategy": "first"})
    same = run(weights, tmp_path, "qdrop", seed=4, calibration={"count": 72, "strategy": "first"})
    assert (other.folder / "manifest.csv").read_bytes() != (by_method["qdrop"].folder / "manifest.csv").read_bytes()
    losses = [[row["loss_after"] for row in r.metrics["units"]] for r in (other, same)]
    assert losses[0] != losses[1], "on the same images"


class Heard(Reporter):
    """Remembers the steps and the progress inside them."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.where: list[str] = []
        self.progressed: dict[str, list[tuple[int, int]]] = {}

    def step(self, number: int, total: int, title: str) -> None:
        self.steps.append(f"{number}/{total} {title}")

    def progress(self, done: int, total: int, where: str = "") -> None:
        self.progressed.setdefault(self.steps[-1], []).append((done, total))
        self.where.append(where)

    def note(self, text: str) -> None:
        pass


def test_the_step_is_announced_and_its_progress_ends_at_the_total(weights: Path, tmp_path: Path) -> None:
    heard = Heard()
    tree = FIELDS | {"runs": str(tmp_path), "model": {**FIELDS["model"], "weights": str(weights)}}
    done = calibquant.quantize(make_recipe(tree | {"reconstruct": settings("qdrop")}), reporter=heard)
    (step,) = [s for s in heard.steps if "Reconstruct" in s]
    assert step == "4/8 Reconstruct by qdrop"
    total = 8 * len(done.metrics["units"])
    assert heard.progressed[step] == [(i, total) for i in range(1, total + 1)]
    told = [where for where in heard.where if where]
    assert len(told) == total
    for row, where in zip(done.metrics["units"], told[::8], strict=True):
        assert re.fullmatch(rf"{re.escape(row['unit'])}: loss \S+, \d+ % settled", where)


@pytest.mark.parametrize("method", ["none", "qdrop"])
def test_the_growth_of_the_error_is_told_before_and_after(by_method: dict[str, Run], method: str) -> None:
    """Nearest rounding's is the same for all methods; the reconstructed network's is that of the model itself."""
    done = by_method[method]
    rows = json.loads((done.folder / "metrics.json").read_text())["feature_errors"]
    assert [row["after"] for row in rows] == [u.output for u in units(done.model.teacher.graph)]
    assert [row["nearest"] for row in rows] == [r["nearest"] for r in by_method["none"].metrics["feature_errors"]]
    if method == "none":
        assert {row["reconstructed"] for row in rows} == {None}
        return
    assert all(row["reconstructed"] > 0 for row in rows)
    assert rows[-1]["reconstructed"] < rows[-1]["nearest"]


@pytest.mark.parametrize("method", METHODS)
def test_a_part_is_reconstructed_on_what_enters_it(weights: Path, tmp_path: Path, method: str) -> None:
    done = run(weights, tmp_path, method, model={**FIELDS["model"], "weights": str(weights), "submodule": "layer2"})
    rows = done.metrics["units"]
    assert rows
    assert any(row["kept"] for row in rows)
    assert all(row["unit"].split(".")[0].isdigit() for row in rows), "units of layer2 alone"
    assert done.metrics["feature_errors"][-1]["reconstructed"] != done.metrics["feature_errors"][-1]["nearest"]


def test_a_networks_own_regularizer_is_written_into_the_recipe(by_method: dict[str, Run]) -> None:
    stored = calibquant.load_recipe(by_method["qdrop"].folder / "recipe.yaml")
    assert stored.reconstruct.regularizer == 0.01
    assert with_network_defaults(make_recipe({"model": {"name": "mobilenet_v2"}})).reconstruct.regularizer == 0.1
    given = make_recipe({"model": {"name": "mobilenet_v2"}, "reconstruct": {"regularizer": 0.5}})
    assert with_network_defaults(given) is given
