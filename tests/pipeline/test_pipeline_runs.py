"""What a run leaves, and the ways to make one: from files, from a live network, without labels, with bad images."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import calibquant
from calibquant import TensorImages, pipeline
from calibquant.data import read_manifest
from calibquant.pipeline import Run
from calibquant.recipe import load_recipe, make_recipe
from calibquant.runfolder import open_run, sha256

FILES = {
    "recipe.yaml", "manifest.csv", "model.safetensors", "graph.json", "record.json", "record.txt", "metrics.json",
    "receipt.json", "log.txt", "float.onnx", "fake_quant.onnx", "deploy.onnx", "parity.json",
}  # fmt: skip
STAGES = ("prepare", "weights", "activations", "accumulation", "evaluate_float", "evaluate_quantized",
          "evaluate_deployed", "export")  # fmt: skip


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def tensors(count: int = 24, seed: int = 0, labels: bool = True) -> TensorImages:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 12, 12, generator=generator)
    return TensorImages(images, [i % 4 for i in range(count)] if labels else None)


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    """A recipe's fields for live networks."""
    return {"runs": str(tmp_path / "runs"), "calibration": {"count": 16, "batch_size": 5}, "threads": 1}


@pytest.fixture
def digits(tmp_path: Path) -> Run:
    """A run on the digits with random weights."""
    return calibquant.quantize({
        "model": {"name": "digits_resnet"},
        "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}},
        "calibration": {"count": 20},
        "evaluation": {"count": 30},
        "runs": str(tmp_path / "runs"),
        "threads": 1,
    })  # fmt: skip


def test_a_run_holds_its_files_and_nothing_else(digits: Run, tmp_path: Path) -> None:
    assert {p.name for p in digits.folder.iterdir()} == FILES
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["digits_resnet-w4a4-001"]


def test_the_recipe_of_a_run_makes_the_same_run_again(digits: Run, tmp_path: Path) -> None:
    recipe = load_recipe(digits.folder / "recipe.yaml")
    assert recipe == pipeline.run_recipe(open_run(digits.folder))
    assert (recipe.calibration.count, recipe.quant.boundary) == (20, "qdrop")
    again = calibquant.quantize(recipe.model_copy(update={"runs": tmp_path / "again"}))
    for name in ("model.safetensors", "graph.json", "manifest.csv"):
        assert (again.folder / name).read_bytes() == (digits.folder / name).read_bytes()


def test_the_manifest_lists_the_calibration_images(digits: Run) -> None:
    images = calibquant.open_images(load_recipe(digits.folder / "recipe.yaml").data, "calibration")
    known = {images.name(i): (images.sha256(i), images.label(i)) for i in range(len(images))}
    rows = read_manifest(digits.folder / "manifest.csv").rows
    assert len(rows) == len({row.path for row in rows}) == 20
    assert all(known[row.path] == (row.sha256, row.label) for row in rows)
    assert {(row.strategy, row.seed, row.score) for row in rows} == {("random", 1005, None)}


def test_the_metrics_hold_accuracy_size_coverage_and_times(digits: Run) -> None:
    metrics = json.loads((digits.folder / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(digits.metrics))
    assert (metrics["setting"], metrics["evaluated_on"]) == ("W4A4", "evaluation images")
    assert metrics["float"]["count"] == metrics["quantized"]["count"] == 30
    assert 0 <= metrics["quantized"]["agreement"] <= 1
    assert metrics["float"]["agreement"] is None
    assert metrics["size"]["file"] == (digits.folder / "model.safetensors").stat().st_size
    assert metrics["size"]["packed"] <= metrics["size"]["file"] < metrics["size"]["float32"]
    assert tuple(metrics["seconds"]) == STAGES
    assert all(seconds >= 0 for seconds in metrics["seconds"].values())


def test_the_receipt_can_be_checked(digits: Run) -> None:
    receipt = json.loads((digits.folder / "receipt.json").read_text())
    assert set(receipt["files"]) == FILES - {"receipt.json", "log.txt"}
    assert all(sha256((digits.folder / name).read_bytes()) == digest for name, digest in receipt["files"].items())
    assert receipt["images"] == {"count": 20, "sha256": receipt["files"]["manifest.csv"]}
    assert (receipt["seed"], receipt["threads"], receipt["device"], receipt["weights"]) == (1005, 1, "cpu", None)
    assert receipt["versions"]["torch"] == torch.__version__


def test_the_receipt_names_the_weights(tmp_path: Path, digits: Run) -> None:
    path = tmp_path / "w.safetensors"
    calibquant.zoo.save_weights(calibquant.zoo.build("digits_resnet"), path)
    recipe = make_recipe(load_recipe(digits.folder / "recipe.yaml").model_dump(), [f"model.weights={path}"])
    receipt = open_run(calibquant.quantize(recipe).folder).read_json("receipt.json")
    assert receipt["weights"] == {"path": str(path), "sha256": sha256(path.read_bytes())}


def test_the_log_has_the_steps_with_their_times(digits: Run) -> None:
    lines = (digits.folder / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) ", line) for line in lines)
    assert re.findall(r"\[(\d)/7\]", "\n".join(lines)) == list("1234567")


class Listener:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.done: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def step(self, number: int, total: int, title: str) -> None:
        self.steps.append((number, total))

    def progress(self, done: int, total: int) -> None:
        self.done.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_reporter_hears_every_step_and_progress_to_its_end(fields: dict[str, Any]) -> None:
    listener = Listener()
    calibquant.quantize(fields, small(), tensors(), tensors(seed=1), listener)
    assert listener.steps == [(i, 7) for i in range(1, 8)]
    assert [pair for pair in listener.done if pair[0] == pair[1]] == [(2, 2), (16, 16), *[(24, 24)] * 3]
    assert listener.notes[0].startswith("16 calibration images; ")


def test_a_live_network_is_quantized_and_left_as_it_was(fields: dict[str, Any]) -> None:
    network = small().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run = calibquant.quantize(fields, network, tensors(), tensors(40, seed=1))
    assert run.folder.name == "sequential-w4a4-001"
    assert (run.metrics["evaluated_on"], run.metrics["quantized"]["count"]) == ("evaluation images", 40)
    assert network.training
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    images = torch.rand(7, 3, 12, 12)
    assert torch.equal(calibquant.load(run.folder)(images), run.model(images))
    with torch.inference_mode(), run.model.float_mode():
        torch.testing.assert_close(run.model(images), network.eval()(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("labels", [True, False])
def test_without_evaluation_images_the_calibration_images_are_measured(labels: bool, fields: dict[str, Any]) -> None:
    metrics = calibquant.quantize(fields, small(), tensors(labels=labels)).metrics
    assert (metrics["evaluated_on"], metrics["quantized"]["count"]) == ("calibration images", 16)
    assert metrics["quantized"]["agreement"] is not None
    assert (metrics["quantized"]["top1"] is not None) == labels


def manifest(run: Run) -> list[str]:
    return [row.path for row in read_manifest(run.folder / "manifest.csv").rows]


def test_the_seed_decides_the_draw_and_nothing_else_does(fields: dict[str, Any]) -> None:
    def run(seed: int) -> Run:
        torch.rand(seed + 1)  # torch's own generator is somewhere else each time
        return calibquant.quantize(fields | {"seed": seed}, small(), tensors())

    first, same, other = run(1), run(1), run(2)
    assert manifest(first) == manifest(same) != manifest(other)
    for name in ("model.safetensors", "graph.json", "record.json", "record.txt", "manifest.csv"):
        assert (first.folder / name).read_bytes() == (same.folder / name).read_bytes()


def test_a_run_leaves_torchs_generator_alone(digits: Run, tmp_path: Path) -> None:
    recipe = load_recipe(digits.folder / "recipe.yaml")
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    calibquant.quantize(recipe)
    assert torch.equal(torch.rand(3), expected)


def test_the_strategy_first_takes_the_first_images(fields: dict[str, Any]) -> None:
    fields["calibration"] |= {"strategy": "first"}
    assert manifest(calibquant.quantize(fields, small(), tensors())) == [f"tensor#{i}" for i in range(16)]


def test_range_count_sets_the_ranges_with_the_first_of_the_calibration_images(fields: dict[str, Any]) -> None:
    images = tensors()
    louder = TensorImages(torch.stack([images.image(i) * (1 if i < 6 else 50) for i in range(24)]))
    minmax = {"quant": {"activations": {"observer": "minmax"}}}
    fields["calibration"] |= {"strategy": "first"}

    def scales(source: TensorImages, **calibration: int) -> list[float]:
        run = calibquant.quantize(
            fields | minmax | {"calibration": fields["calibration"] | calibration}, small(), source
        )
        return [float(q.scale) for q in run.model.activation_quantizers.values()]  # type: ignore[arg-type]

    assert scales(louder, range_count=6) == scales(images, count=6)
    assert scales(louder, range_count=6) != scales(louder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve images for calibration and four for evaluation, without labels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        (tmp_path / "pictures" / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / split / f"{i:02d}.png")
    return tmp_path / "pictures"


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def vanish(path: Path) -> None:
    with (path.parents[1] / "list.csv").open("a") as file:
        file.write("train/gone.png\n")


@pytest.mark.parametrize("spoil", [corrupt, vanish])
def test_unreadable_images_are_skipped_and_named(
    spoil: Callable[[Path], None], fields: dict[str, Any], pictures: Path
) -> None:
    (pictures / "list.csv").write_text("".join(f"{n}\n" for n in ["file", *(f"train/{i:02d}.png" for i in range(12))]))
    for name in ("train/00.png", "val/00.png"):
        corrupt(pictures / name)
    spoil(pictures / "train/01.png")
    kind = (
        {"kind": "csv", "calibration": "list.csv", "evaluation": "list.csv"} if spoil is vanish else {"kind": "folder"}
    )
    total = 13 if spoil is vanish else 12
    fields |= {
        "data": {"root": str(pictures), "on_error": "skip", **kind},
        "calibration": {"count": total, "strategy": "first", "batch_size": 2},
    }
    listener = Listener()
    run = calibquant.quantize(fields, small(), reporter=listener)
    unreadable = {"train/00.png", "train/gone.png" if spoil is vanish else "train/01.png"}
    assert set(manifest(run)) == {f"train/{i:02d}.png" for i in range(12)} - unreadable
    assert run.metrics["calibration_images"] == total - 2
    assert run.metrics["quantized"]["count"] == (11 if spoil is vanish else 3)
    evaluated = unreadable if spoil is vanish else {"val/00.png"}
    assert run.metrics["skipped"] == {"calibration": sorted(unreadable), "evaluation": sorted(evaluated)}
    log = (run.folder / "log.txt").read_text()
    assert all(re.search(f"WARNING image skipped: .*{name}: ", log) for name in unreadable)
    assert listener.notes[-1] == f"{len(unreadable | (set() if spoil is vanish else {'val/00.png'}))} " + (
        "unreadable images were left out; log.txt names them"
    )


def test_unlabelled_images_give_agreement_and_empty_labels(fields: dict[str, Any], pictures: Path) -> None:
    fields |= {"data": {"kind": "folder", "root": str(pictures)}, "calibration": {"count": 12}}
    run = calibquant.quantize(fields, small())
    with (run.folder / "manifest.csv").open() as file:
        assert {row["label"] for row in csv.DictReader(file)} == {""}
    assert run.metrics["quantized"]["top1"] is None
    assert run.metrics["quantized"]["agreement"] is not None
