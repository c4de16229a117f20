"""What a run says of its images: files left out, counts above what there is, images that a manifest repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import calibquant
from calibquant import pipeline
from calibquant.data import ManifestRow, manifest_csv, read_manifest
from calibquant.data.manifest import Manifest
from calibquant.recipe import make_recipe
from calibquant.zoo import build, save_weights


class Notes:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def step(self, number: int, total: int, title: str) -> None: ...

    def progress(self, done: int, total: int, where: str = "") -> None: ...

    def note(self, text: str) -> None:
        if text.startswith("warning: "):
            self.warnings.append(text.removeprefix("warning: "))


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    """A folder of eight images for each of two sets."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for k in range(8):
            pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{k}.png")
    return {
        "runs": tmp_path / "runs",
        "data": {"kind": "folder", "root": tmp_path},
        "calibration": {"count": 8},
        "export": {"onnx": False},
    }


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def warned(fields: dict[str, Any]) -> list[str]:
    """The warnings of a run, which its log.txt holds once each."""
    notes = Notes()
    run = calibquant.quantize(make_recipe(fields), network(), reporter=notes)
    lines = (run.folder / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition(" WARNING ")[2] for line in lines if " WARNING " in line] == notes.warnings
    return notes.warnings


def test_a_run_without_such_has_no_warning(fields: dict[str, Any]) -> None:
    calibration = {"count": 8, "range_count": 8, "pool": 8}
    assert warned(fields | {"calibration": calibration, "evaluation": {"count": 8}}) == []


@pytest.mark.parametrize(
    ("section", "name", "there"),
    [
        ("calibration", "range_count", "8 images of the calibration"),
        ("calibration", "pool", "8 images of the calibration set"),
        ("evaluation", "count", "8 images of the evaluation"),
    ],
)
def test_counts_above_what_there_is_are_one_warning(
    fields: dict[str, Any], section: str, name: str, there: str
) -> None:
    told = warned(fields | {section: fields.get(section, {}) | {name: 9}})
    assert told == [f"{section}.{name}=9 is more than there are; all {there} are used"]


def test_what_is_left_out_reaches_console_and_log(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "train/a.txt").touch()
    (tmp_path / "val/b.json").touch()
    assert warned(fields) == [
        f"{tmp_path / split}: files left out because they are not images: 1 ({suffix} 1)"
        for split, suffix in (("train", ".txt"), ("val", ".json"))
    ]


def test_an_image_six_times_in_a_manifest_is_one_warning(fields: dict[str, Any], tmp_path: Path) -> None:
    rows = list(read_manifest(calibquant.quantize(make_recipe(fields), network()).folder / "manifest.csv").rows)
    path = tmp_path / "own.csv"
    listed = fields | {"calibration": {"manifest": path}}
    path.write_text(manifest_csv(Manifest(tuple(rows[:3]))))
    assert warned(listed) == []
    path.write_text(manifest_csv(Manifest((*rows[:3], *[rows[1]] * 5))))
    told = f"{path}: images listed more than once: 1 ({rows[1].path} 6 times); each row counts as an image"
    assert warned(listed) == [told]
    weighted = [ManifestRow(r.path, r.sha256, r.label, r.score, "moments-weighted", r.seed) for r in [rows[0]] * 3]
    path.write_text(manifest_csv(Manifest(tuple(weighted))))
    assert warned(listed) == []  # this strategy repeats images on purpose


def test_copies_of_an_image_are_found_by_their_hash(fields: dict[str, Any], tmp_path: Path) -> None:
    for k in (1, 2):
        (tmp_path / f"train/{k}.png").write_bytes((tmp_path / "train/0.png").read_bytes())
    run = calibquant.quantize(make_recipe(fields), network())
    (told,) = warned(fields | {"calibration": {"manifest": run.folder / "manifest.csv"}})
    assert "images listed more than once: 1 (train/" in told
    assert "png 3 times)" in told


def test_evaluations_warn_of_their_count(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_weights(build("digits_resnet"), tmp_path / "digits.safetensors")
    recipe = make_recipe(
        {
            "model": {"name": "digits_resnet", "weights": tmp_path / "digits.safetensors"},
            "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}},
            "evaluation": {"count": 600},
        }
    )
    notes = Notes()
    scores = pipeline.evaluate_float(recipe, notes)
    assert json.dumps(scores)
    assert notes.warnings == ["evaluation.count=600 is more than there are; all 597 images of the evaluation are used"]
