"""`calibquant train` from a recipe to a run folder: its files, its resume, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import calibquant
from calibquant.cli import main
from calibquant.data import TensorImages
from calibquant.data.manifest import read_manifest
from calibquant.errors import ModelError, RecipeError, RunFolderError
from calibquant.pipeline import evaluate_run, resume, resume_training
from calibquant.recipe import load_recipe, make_recipe
from calibquant.runfolder import newest_run, open_run

CONFIGS = Path(__file__).parents[2] / "configs" / "train"
DIGITS: dict[str, Any] = {
    "model": {"name": "digits_resnet"},
    "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}, "augment": {"pad": 1}},
    "train": {"epochs": 4, "batch_size": 48, "schedule": "one-cycle", "holdout": 0.1, "ema": 0.8},
    "threads": 1,
}


class StopAt:
    """A reporter that interrupts the run at a step of the training, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, number: int, total: int, title: str) -> None: ...

    def progress(self, done: int, total: int, where: str = "") -> None:
        if done >= self.at and "epoch" in where:
            raise KeyboardInterrupt

    def note(self, text: str) -> None: ...


class Images(TensorImages):
    """Images that note when they are looked at."""

    log: list[str]
    mark = ""

    def image(self, i: int) -> Tensor:
        self.log.append(self.mark)
        return super().image(i)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> calibquant.pipeline.TrainedRun:
    """Four epochs on the digits."""
    return calibquant.train(DIGITS | {"runs": str(tmp_path_factory.mktemp("runs"))})


def test_digits_are_learned_in_seconds(trained: Any) -> None:
    assert trained.folder.name == "digits_resnet-train-001"
    assert trained.metrics["float"]["count"] == 597
    assert trained.metrics["float"]["top1"] > 0.95
    low, high = trained.metrics["float"]["top1_interval"]
    assert low < trained.metrics["float"]["top1"] < high


def test_the_run_folder_has_weights_curves_and_figures(trained: Any) -> None:
    assert {path.name for path in trained.folder.iterdir()} == {
        "recipe.yaml", "weights.safetensors", "metrics.json", "curves.png", "receipt.json", "log.txt",
    }  # fmt: skip
    metrics = json.loads((trained.folder / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(trained.metrics))
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2, 3, 4]
    assert (metrics["training_images"], metrics["held_out_images"]) == (1080, 120)
    held = [row["accuracy"] for row in metrics["epochs"]]
    assert held[metrics["best_epoch"] - 1] == max(held)
    assert (trained.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "epoch 4: loss" in (trained.folder / "log.txt").read_text()
    receipt = json.loads((trained.folder / "receipt.json").read_text())
    assert receipt["kind"] == "train"
    assert receipt["images"]["count"] == 1080


def test_the_weights_are_those_of_the_network_and_evaluate_measures_them(trained: Any) -> None:
    assert evaluate_run(trained.folder, [])["float"] == trained.metrics["float"]
    recipe = make_recipe(DIGITS, [f"model.weights={trained.folder / 'weights.safetensors'}"])
    loaded = calibquant.pipeline.preparing.build(recipe).state_dict()
    for key, value in trained.network.state_dict().items():
        assert torch.equal(value, loaded[key])


def test_commands_on_quantized_runs_leave_trainings_alone(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"is a run of calibquant train, .* model\.weights=.*weights\.safetensors"):
        open_run(trained.folder)
    with pytest.raises(RunFolderError, match="holds no run yet; run calibquant quantize"):
        newest_run(trained.folder.parent)


def small() -> tuple[nn.Module, TensorImages, TensorImages]:
    """A live network, noise in which the brighter channel is the label, and the same again to measure on."""
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (96,), generator=random)
    noise = torch.randn(96, 2, 6, 6, generator=random)
    noise[torch.arange(96), labels] += 1
    sets = [TensorImages(noise[part], labels[part].tolist()) for part in (slice(64), slice(64, 96))]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 2))
    return network, *sets  # type: ignore[return-value]


SMALL: dict[str, Any] = {
    "train": {"epochs": 4, "batch_size": 8, "lr": 0.02, "holdout": 0.25, "ema": 0.8, "mixup": 0.1},
    "data": {"augment": {"flip": True, "cutout": 2}},
}  # 6 steps an epoch


@pytest.mark.parametrize("step", [7, 13, 24])
def test_an_interrupted_run_goes_on_to_the_same_bytes(step: int, tmp_path: Path) -> None:
    whole = calibquant.train(SMALL | {"runs": str(tmp_path / "whole")}, *small())
    name = tmp_path / "sequential-train-001"
    with pytest.raises(RunFolderError, match=f"was interrupted; go on with calibquant train --resume {name}"):
        calibquant.train(SMALL | {"runs": str(tmp_path)}, *small(), reporter=StopAt(step))
    with pytest.raises(RunFolderError, match="is no run of calibquant quantize; go on with calibquant train --resume"):
        resume(name)
    run = resume_training(name, *small())
    assert run.folder == name
    assert (name / "weights.safetensors").read_bytes() == (whole.folder / "weights.safetensors").read_bytes()
    assert not list(name.glob("checkpoint*"))
    for mine, theirs in zip(run.metrics["epochs"], whole.metrics["epochs"], strict=True):
        assert mine | {"seconds": 0} == theirs | {"seconds": 0}


def test_before_the_first_checkpoint_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibquant.train(SMALL | {"runs": str(tmp_path)}, *small(), reporter=StopAt(1))
    assert list(tmp_path.iterdir()) == []


def interrupted(tmp_path: Path) -> Path:
    """A training that ended in its second epoch."""
    with pytest.raises(RunFolderError, match="was interrupted"):
        calibquant.train(SMALL | {"runs": str(tmp_path)}, *small(), reporter=StopAt(7))
    return tmp_path / "sequential-train-001"


def test_a_checkpoint_is_checked(tmp_path: Path) -> None:
    run = interrupted(tmp_path)
    for override in ("train.optimizer=adamw", "train.ema=0.5", "train.epochs=9", "train.holdout=0.2", "seed=3"):
        field = override.partition("=")[0]
        with pytest.raises(RecipeError, match=rf"{run}, recipe, {field}: was .* and cannot become"):
            resume_training(run, *small(), overrides=[override])
    network, images, *others = small()
    with pytest.raises(RunFolderError, match=r"checkpoint\.json: was made with other images; restore"):
        resume_training(run, network, images.subset(range(len(images) - 1)), *others)
    state = next((tmp_path / ".sequential-train-001.partial").glob("checkpoint-*.pt"))
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match=r"checkpoint\.json: is damaged \(its hash is wrong\); delete"):
        resume_training(run, *small())


def test_a_run_can_go_on_with_other_settings(tmp_path: Path) -> None:
    run = resume_training(interrupted(tmp_path), *small(), overrides=["train.lr=0.01"])
    assert max(row["lr"] for row in run.metrics["epochs"][1:]) <= 0.01 < run.metrics["epochs"][0]["lr"]
    assert load_recipe(run.folder / "recipe.yaml").train.lr == 0.01  # type: ignore[union-attr]
    first = run.metrics["epochs"][0]["lr"]
    changed = json.loads((run.folder / "receipt.json").read_text())["changed"]["train.lr"]
    assert changed[0] >= first > changed[1] == 0.01


def test_of_evaluation_images_the_size_of_one_is_looked_at_before_the_end(tmp_path: Path) -> None:
    log: list[str] = []
    sets = []
    for mark in ("train", "test"):
        sets.append(Images(torch.randn(40, 1, 4, 4), [0, 1] * 20))
        sets[-1].log, sets[-1].mark = log, mark
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    before = network[1].weight.clone()
    recipe = {"runs": str(tmp_path), "train": {"epochs": 2, "batch_size": 8, "holdout": 0.2}}
    calibquant.train(recipe, network, *sets)
    end = len(log) - log[::-1].index("train")
    assert 1 <= log[:end].count("test") <= 3  # one, and what is read ahead of it
    assert log[end:].count("test") >= 40
    assert torch.equal(before, network[1].weight)


def test_images_in_files_train_with_random_resized_crops(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(1)
    for split, count in (("train", 24), ("val", 6)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 100, (20, 26, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / name / f"{i}.png")
    recipe = {
        "model": {"name": "cifar_resnet20", "options": {"num_classes": 2}},
        "data": {"kind": "folder", "root": str(tmp_path), "preprocess": {"resize": 18, "crop": 16},
                 "augment": {"scale": [0.4, 1.0], "flip": True}},
        "train": {"epochs": 4, "batch_size": 16, "precision": "bfloat16"},
        "threads": 1, "runs": str(tmp_path / "runs"),
    }  # fmt: skip
    run = calibquant.train(recipe)
    assert run.metrics["float"]["top1"] == 1.0
    assert run.metrics["held_out_images"] == 0


def test_a_loss_that_diverges_keeps_the_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = iter([1.0] * 9 + [float("nan")] * 9)

    def spoiled(logits: Tensor, *_: Any) -> Tensor:
        return logits.mean() * next(factors)

    monkeypatch.setattr("calibquant.training.losses.classification_loss", spoiled)
    with pytest.raises(ModelError) as caught:
        calibquant.train(SMALL | {"runs": str(tmp_path)}, *small())
    monkeypatch.undo()
    name = tmp_path / "sequential-train-001"
    assert re.match(
        r"training, epoch 2, step 4: the loss is nan; train again with a lower train.lr, ", str(caught.value)
    )
    assert f"go on from the last checkpoint: calibquant train --resume {name} train.lr=…" in str(caught.value)
    assert len(resume_training(name, *small()).metrics["epochs"]) == 4


def test_calibration_images_can_be_changed_at_random(tmp_path: Path) -> None:
    fields = {key: value for key, value in DIGITS.items() if key != "train"}
    fields |= {"calibration": {"count": 32}, "evaluation": {"count": 8}, "export": {"onnx": False}}
    runs = [
        calibquant.quantize(make_recipe(fields | {"runs": str(tmp_path)}, [f"calibration.augment={augment}"]))
        for augment in ("false", "true", "true")
    ]
    codes = [(run.folder / "model.safetensors").read_bytes() for run in runs]
    assert codes[0] != codes[1]
    assert codes[1] == codes[2]
    manifests = [read_manifest(run.folder / "manifest.csv") for run in runs]
    assert manifests[0] == manifests[1]


def test_the_command_trains_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text(make_recipe(DIGITS).to_yaml())
    assert main(["train", "digits.yaml", "train.epochs=1"]) == 0
    printed = capsys.readouterr().out
    assert "[2/4] Train for 1 epochs on 1080 images, 120 held out" in printed
    assert "Run folder: runs/digits_resnet-train-001" in printed
    assert main(["evaluate", "runs/digits_resnet-train-001", "evaluation.count=50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["float"]["count"] == 50
    assert main(["train", "--resume", "runs/digits_resnet-train-001", "train.lr=0.1"]) == 1
    assert "is complete already" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_for_training_are_valid(path: Path) -> None:
    recipe = load_recipe(path, ["train.epochs=15"])
    assert recipe.train is not None
    assert recipe.data.augment is not None
    if recipe.data.augment.scale is not None:
        assert recipe.data.preprocess.crop is not None
