"""Choosing calibration images in a run, alone and again from a manifest; judging sets from everywhere."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import calibquant
from calibquant import TensorImages, pipeline
from calibquant.cli import main
from calibquant.data import read_manifest
from calibquant.errors import CalibQuantError, DataError
from calibquant.pipeline import selecting
from calibquant.recipe import load_recipe, make_recipe
from calibquant.reconstruction import network as reconstruction
from calibquant.selection import STRATEGIES
from calibquant.studies.digits import FIELDS
from calibquant.zoo import build, save_weights


@pytest.fixture
def fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Digits at W4A4 with random weights, 24 of 200 candidates."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_weights(build("digits_resnet"), tmp_path / "digits.safetensors")
    return FIELDS | {
        "model": {"name": "digits_resnet", "weights": "digits.safetensors"},
        "calibration": {"count": 24, "pool": 200, "batch_size": 50},
        "evaluation": {"count": 20},
        "reconstruct": {"method": "none"},
        "export": {"onnx": False},
    }


def by(fields: dict[str, Any], **calibration: Any) -> dict[str, Any]:
    return fields | {"calibration": fields["calibration"] | calibration}


@pytest.mark.parametrize("strategy", [*STRATEGIES, "herding=0.75,tail=0.25"])
def test_a_run_calibrates_with_the_images_that_select_chooses(fields: dict[str, Any], strategy: str) -> None:
    recipe = make_recipe(by(fields, strategy=strategy))
    run = calibquant.quantize(recipe)
    rows = read_manifest(run.folder / "manifest.csv").rows
    assert len(rows) == 24
    assert len({row.path for row in rows}) == 24 or strategy == "moments-weighted"
    assert {row.strategy for row in rows} == {part.partition("=")[0] for part in strategy.split(",")}
    out = Path("chosen.csv")
    assert calibquant.select(recipe, out=out).rows == rows
    assert out.read_bytes() == (run.folder / "manifest.csv").read_bytes()
    assert (strategy in ("captq", "hard", "tail")) <= (rows[0].score is not None)


def test_a_manifest_gives_the_same_network_again(fields: dict[str, Any]) -> None:
    first = calibquant.quantize(make_recipe(by(fields, strategy="moments")))
    again = calibquant.quantize(make_recipe(by(fields, manifest=str(first.folder / "manifest.csv"), count=7)))
    for name in ("model.safetensors", "manifest.csv"):
        assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_a_manifest_may_repeat_images_and_order_them(fields: dict[str, Any]) -> None:
    lines = calibquant.select(make_recipe(fields), out=Path("m.csv")).rows
    text = Path("m.csv").read_text().splitlines()
    Path("m.csv").write_text("\n".join([text[0], *text[3:6], *text[3:6]]) + "\n")
    run = calibquant.quantize(make_recipe(by(fields, manifest="m.csv")))
    paths = [row.path for row in read_manifest(run.folder / "manifest.csv").rows]
    assert paths == [row.path for row in lines[2:5]] * 2
    assert run.metrics["calibration_images"] == 6


def test_an_image_that_is_not_the_manifests_is_refused(fields: dict[str, Any]) -> None:
    calibquant.select(make_recipe(fields), out=Path("m.csv"))
    text = Path("m.csv").read_text()
    digest = read_manifest("m.csv").rows[4].sha256
    Path("m.csv").write_text(text.replace(digest, "0" * 64))
    with pytest.raises(DataError, match=r"this calibration image has changed \(its hash is not the manifest's\)"):
        calibquant.quantize(make_recipe(by(fields, manifest="m.csv")))
    assert not list(Path("runs").glob("*"))


def test_candidates_are_a_draw_of_the_pool(fields: dict[str, Any]) -> None:
    names = [{row.path for row in calibquant.select(make_recipe(by(fields, count=n))).rows} for n in (200, 24)]
    assert names[1] < names[0]
    other = make_recipe(by(fields, count=200) | {"seed": 3})
    assert {row.path for row in calibquant.select(other).rows} != names[0]


def test_labels_that_are_missing_come_from_the_network(fields: dict[str, Any]) -> None:
    torch.manual_seed(2)
    net, images = build("digits_resnet").eval(), torch.randn(60, 1, 16, 16) * 3
    recipe = make_recipe({"calibration": {"count": 20, "strategy": "class-balanced"}})
    with torch.no_grad():
        classes = net(images).argmax(1).numpy()
    rows = calibquant.select(recipe, net, TensorImages(images)).rows
    chosen = [int(row.path.removeprefix("tensor#")) for row in rows]
    there, counts = np.unique(classes, return_counts=True)
    got = {c: int((classes[chosen] == c).sum()) for c in there}
    assert len(there) > 1
    assert all(got[c] == n or got[c] >= max(got.values()) - 1 for c, n in zip(there, counts, strict=True))
    assert all(row.label is None for row in rows)


def test_a_run_that_goes_on_does_not_choose_again(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(by(fields, strategy="moments") | {"reconstruct": {"method": "qdrop", "iterations": 2}})
    whole = calibquant.quantize(recipe)
    with monkeypatch.context() as patch:
        learn, seen = reconstruction.learn_unit, []

        def once(*args: Any, **kwargs: Any) -> Any:
            if seen:
                raise KeyboardInterrupt
            seen.append(1)
            return learn(*args, **kwargs)

        patch.setattr(reconstruction, "learn_unit", once)
        with pytest.raises(CalibQuantError, match="was interrupted"):
            calibquant.quantize(recipe)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("chosen again")

    monkeypatch.setattr(selecting, "score_pool", never)
    resumed = pipeline.resume(whole.folder.with_name(whole.folder.name.replace("001", "002")))
    assert (resumed.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert not list(resumed.folder.glob("checkpoint*"))


def test_unreadable_candidates_are_left_out(fields: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    for i in range(30):
        path = Path("set/train") / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    Path("set/train/1/4.png").write_bytes(b"no image")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    )  # fmt: skip
    data = {"kind": "folder", "root": "set", "on_error": "skip"}
    for strategy in ("moments", "class-balanced"):
        recipe = make_recipe({"data": data, "calibration": {"count": 29, "strategy": strategy}})
        paths = [row.path for row in calibquant.select(recipe, net).rows]
        assert "train/1/4.png" not in paths
        assert len(paths) in (28, 29)


SETS = ("manifest", "run", "csv", "folder", "live")


@pytest.mark.parametrize("kind", SETS)
def test_sets_from_everywhere_are_judged(fields: dict[str, Any], kind: str) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (60, 16, 16, 3), dtype=np.uint8)
    for i, pixels in enumerate(images):
        path = Path("set/train") / str(i % 3) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    )  # fmt: skip
    recipe = make_recipe({"data": {"kind": "folder", "root": "set"}, "calibration": {"count": 20}})
    manifest = calibquant.select(recipe, net, out=Path("m.csv"))
    opened = calibquant.open_images(recipe.data, "calibration")
    names = {opened.name(i): i for i in range(len(opened))}
    if kind == "manifest":
        given: Any = Path("m.csv")
    elif kind == "run":
        held = opened.subset(range(5))
        given = calibquant.quantize(recipe, net, opened, held).folder
    elif kind == "csv":
        with Path("set/list.csv").open("w") as file:
            csv.writer(file).writerows([["file"], *([row.path] for row in manifest.rows)])
        given = Path("set/list.csv")
    elif kind == "folder":
        given = Path("mine")
        given.mkdir()
        for row in manifest.rows:
            (given / Path(row.path).name).write_bytes((Path("set") / row.path).read_bytes())
    else:
        given = opened.subset([names[row.path] for row in manifest.rows])
    found = calibquant.judge(recipe, given, net)
    assert (found.judgement.images, found.judgement.distinct, found.pool) == (20, 20, 60)
    assert 0 < found.judgement.percentile <= 100
    assert len(found.add) == 10
    assert set(found.add) <= set(names)
    same = calibquant.judge(recipe, Path("m.csv"), net)
    assert found.judgement.moment_error == pytest.approx(same.judgement.moment_error, rel=1e-4)


def test_copies_are_counted(fields: dict[str, Any]) -> None:
    recipe = make_recipe(fields)
    rows = calibquant.select(recipe, out=Path("m.csv")).rows
    text = Path("m.csv").read_text().splitlines()
    Path("m.csv").write_text("\n".join([text[0], *text[1:4] * 8]) + "\n")
    found = calibquant.judge(recipe, Path("m.csv")).judgement
    assert (found.images, found.distinct, len(rows)) == (24, 3, 24)
    assert found.percentile < 5


def test_an_image_that_makes_a_range_wide_is_named(fields: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("set/train/0")
    folder.mkdir(parents=True)
    for i, light in enumerate([8, 9, 10, 9, 8, 10, 9, 255]):
        Image.fromarray(np.full((32, 32, 3), light, dtype=np.uint8)).save(folder / f"{i}.png")
    save_weights(build("cifar_resnet20"), Path("net.safetensors"))
    others = {"model": {"name": "cifar_resnet20", "weights": "net.safetensors"}, "data": {
        "kind": "folder", "root": "set", "preprocess": {"mean": [0, 0, 0], "std": [1, 1, 1]},
    }}  # fmt: skip
    Path("recipe.yaml").write_text(make_recipe(by(fields, pool=8) | others).to_yaml())
    assert main(["judge", "recipe.yaml", "set/train"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    named = r"make a range wide for all others: train/0/7\.png \(\d+ times the usual peak of \w+\)"
    assert re.search(named, told), told


def test_the_commands(fields: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(make_recipe(fields).to_yaml())
    assert main(["select", "recipe.yaml", "--strategy", "herding", "--count", "16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["manifest"], told["images"], told["strategy"]) == ("manifest.csv", 16, "herding")
    assert calibquant.select(
        load_recipe("recipe.yaml", ["calibration.strategy=herding", "calibration.count=16"])
    ) == read_manifest("manifest.csv")
    assert main(["judge", "recipe.yaml", "manifest.csv", "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert judged["judgement"]["images"] == 16
    assert judged["pool"] == 200
    assert main(["judge", "recipe.yaml", "manifest.csv"]) == 0
    assert "better than" in capsys.readouterr().out
    assert main(["select", "recipe.yaml"]) == 0
    assert "24 images by random" in capsys.readouterr().out
    assert main(["select", "recipe.yaml", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in STRATEGIES)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("select recipe.yaml --strategy herdng", "calibration.strategy: there is no strategy 'herdng'; did you mean"),
        ("select recipe.yaml --strategy tail=x", "'x' is no share of tail; write such as"),
        ("select recipe.yaml --count 9999", "calibration.count: 9999 images are asked for but .*; use a count"),
        ("select recipe.yaml --out recipe.yaml/chosen.csv", "is a file, not a folder"),
        ("judge recipe.yaml nothing.csv", "nothing.csv: there is no such file or folder; give a manifest"),
        ("quantize recipe.yaml calibration.manifest=no.csv", "no.csv: cannot be read"),
        ("select recipe.yaml calibration.pool=30 --strategy best-of-random --count 30", "no images left to judge with"),
    ],
)
def test_bad_input_is_one_line(
    fields: dict[str, Any], capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    Path("recipe.yaml").write_text(make_recipe(fields).to_yaml())
    assert main(command.split()) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(message, error), error
    assert not Path("manifest.csv").exists()
