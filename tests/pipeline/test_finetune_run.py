"""`calibquant finetune`: from a run or a recipe to a trained run, its files, its resume, what it refuses."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training_run import DIGITS, StopAt

import calibquant
from calibquant.cli import main
from calibquant.data import TensorImages, batches
from calibquant.errors import ModelError, RecipeError, RunFolderError
from calibquant.pipeline import resume
from calibquant.pipeline.deployed import evaluate_onnx
from calibquant.pipeline.dry_run import PlannedTraining, planned_training
from calibquant.pipeline.finetuning import diverged, harmed
from calibquant.recipe import load_recipe, make_recipe

FILES = ("model.safetensors", "graph.json", "record.json", "record.txt", "manifest.csv", "deploy.onnx")
SHORT = ["finetune.epochs=2", "finetune.batch_size=48", "finetune.lr=0.005", "finetune.holdout=0.1"]


class Notes:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def step(self, number: int, total: int, title: str) -> None: ...

    def progress(self, done: int, total: int, where: str = "") -> None: ...

    def note(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A trained network of digits at W2A2."""
    runs = tmp_path_factory.mktemp("runs")
    trained = calibquant.train(DIGITS | {"runs": str(runs)})
    return {
        "model": {"name": "digits_resnet", "weights": str(trained.folder / "weights.safetensors")},
        "data": DIGITS["data"], "threads": 1, "runs": str(runs), "calibration": {"count": 64, "batch_size": 32},
        "quant": {"weights": {"bits": 2}, "activations": {"bits": 2}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def start(recipe: dict[str, Any]) -> calibquant.Run:
    return calibquant.quantize(recipe)


@pytest.fixture(scope="module")
def tuned(start: calibquant.Run) -> calibquant.Run:
    return calibquant.finetune(start.folder, SHORT)


def test_training_helps_and_tells_before_and_after(start: calibquant.Run, tuned: calibquant.Run) -> None:
    told = tuned.metrics["finetune"]
    assert told["before"]["top1"] == start.metrics["quantized"]["top1"]
    assert tuned.metrics["quantized"]["top1"] > start.metrics["quantized"]["top1"] + 0.02
    assert [row["epoch"] for row in told["epochs"]] == [1, 2]
    assert told["kept"]
    assert told["held_out_after"] == told["epochs"][-1]["accuracy"]
    assert (told["training_images"], told["held_out_images"], told["processes"]) == (1080, 120, 1)
    assert tuned.metrics["started_from"] == str(start.folder)
    assert tuned.folder.name == "digits_resnet-w2a2-qat-001"


@pytest.mark.parametrize(
    ("keys", "passed", "looks"),
    [([], 2 * 22 * 48, 3), (["finetune.iterations=30"], 30 * 48, 3), (["finetune.evaluate_every=2"], 2 * 22 * 48, 2)],
    ids=["epochs", "steps", "fewer looks"],
)
def test_a_dry_run_counts_what_the_training_does(
    recipe: dict[str, Any], tuned: calibquant.Run, keys: list[str], passed: int, looks: int
) -> None:
    """1,080 images make 22 full batches of 48; the start and the end of each epoch are looked at on 120 others."""
    planned = planned_training(make_recipe(recipe, [*SHORT, *keys]))
    assert planned == PlannedTraining(1080, passed, looks * 120)
    assert planned.images == tuned.metrics["finetune"]["training_images"]


def test_the_result_is_an_artifact_like_any_other(start: calibquant.Run, tuned: calibquant.Run) -> None:
    files = {path.name for path in tuned.folder.iterdir()}
    assert files == {path.name for path in start.folder.iterdir()}
    images = torch.rand(20, 1, 16, 16)
    loaded = calibquant.load(tuned.folder)
    assert torch.equal(loaded(images), tuned.model(images))
    assert loaded.plan == calibquant.load(start.folder).plan
    assert evaluate_onnx(tuned.folder / "deploy.onnx")["agreement_with_simulation"] == 1.0


def test_a_recipe_with_the_section_does_both(recipe: dict[str, Any], tuned: calibquant.Run) -> None:
    both = calibquant.quantize(make_recipe(recipe, SHORT))
    assert both.metrics["quantized"] == tuned.metrics["quantized"]
    assert both.metrics["finetune"]["before"] == tuned.metrics["finetune"]["before"]


@pytest.mark.parametrize("from_run", [True, False])
def test_interrupted_in_any_epoch_it_ends_with_the_same_bytes(
    recipe: dict[str, Any], start: calibquant.Run, tuned: calibquant.Run, tmp_path: Path, from_run: bool
) -> None:
    keys = [*SHORT, f"runs={tmp_path}"]
    stop = StopAt(30)
    begun = (
        partial(calibquant.finetune, start.folder, keys, reporter=stop)
        if from_run
        else partial(calibquant.quantize, make_recipe(recipe, keys), reporter=stop)
    )
    with pytest.raises(RunFolderError, match="was interrupted; go on with calibquant quantize --resume"):
        begun()
    name = "digits_resnet-w2a2-qat-001" if from_run else "digits_resnet-w2a2-001"
    assert (tmp_path / f".{name}.partial" / "checkpoint-finetune.json").is_file()
    again = resume(tmp_path / name)
    assert again.metrics.get("started_from") == (str(start.folder) if from_run else None)
    for file in FILES[:4]:
        assert (again.folder / file).read_bytes() == (tuned.folder / file).read_bytes(), file
    assert not list(again.folder.glob("checkpoint*"))


@pytest.mark.parametrize(
    ("lost", "won", "expected"),
    [(5, 0, False), (6, 0, True), (20, 10, False), (22, 10, False), (25, 10, True), (0, 20, False)],
)  # two-sided binomial tests: 2 / 2^5 = 0.0625, 2 / 2^6 = 0.031; sums of binomials for the others: 0.099, 0.0501, 0.017
def test_training_harms_if_more_images_are_lost_than_chance_would(lost: int, won: int, expected: bool) -> None:
    both = [True] * 50
    assert harmed(np.array([True] * lost + [False] * won + both), np.array([False] * lost + [True] * won + both)) == (
        expected
    )


def test_what_is_clearly_worse_on_the_images_held_out_is_rolled_back(start: calibquant.Run) -> None:
    keys = ["finetune.iterations=1", "finetune.batch_size=48", "finetune.holdout=0.1", "finetune.lr=0.5"]
    tuned = calibquant.finetune(start.folder, keys)
    assert not tuned.metrics["finetune"]["kept"]
    assert tuned.metrics["finetune"]["held_out_after"] < tuned.metrics["finetune"]["held_out_before"]
    assert tuned.metrics["quantized"] == start.metrics["quantized"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(1.0, 0.5, False), (1.0, 1.29, False), (1.0, 1.31, True), (1e-3, 6e-3, False), (1e-3, 0.06, True),
     (1.0, float("nan"), True), (1.0, float("inf"), True), (0.0, 0.0, False)],
)  # fmt: skip
def test_a_training_diverges_if_its_own_loss_grows(before: float, after: float, expected: bool) -> None:
    assert diverged(before, after) == expected
    assert diverged(3 * before, 3 * after, 3.0) == expected


@pytest.mark.parametrize(
    "keys",
    [["finetune.lr=5.0"], ["finetune.lr=0.05"], ["finetune.lr=2.0", "finetune.ema=0.5"], ["finetune.scale_lr=0.5"],
     ["finetune.lr=5.0", "finetune.labels=1", "finetune.distill=0", "finetune.mixup=0.2"]],
    ids=str,
)  # fmt: skip
def test_a_training_that_diverges_is_rolled_back_although_one_image_is_held_out(
    recipe: dict[str, Any], keys: list[str]
) -> None:
    """64 images, of which one is held out: no test of its decision could show anything."""
    images = next(batches(calibquant.pipeline.preparing.open_set(make_recipe(recipe), "calibration"), 64))
    network = calibquant.pipeline.preparing.build(make_recipe(recipe))
    few, notes = TensorImages(images.images, images.labels.tolist()), Notes()
    asked = ["quant.weights.bits=4", "quant.activations.bits=4", "finetune.epochs=4", "finetune.batch_size=16"]
    given = {"threads": 1, "runs": recipe["runs"], "export": {"onnx": False}, "calibration": {"count": 64}}
    kept = calibquant.quantize(make_recipe(given, [*asked, *keys]), network, few, few, reporter=notes)
    alone = calibquant.quantize(make_recipe(given, asked[:2]), network, few, few)
    assert kept.metrics["finetune"]["held_out_images"] == 1
    assert not kept.metrics["finetune"]["kept"]
    assert torch.equal(kept.model(images.images), alone.model(images.images))
    told = [note for note in notes.told if "diverged" in note]
    assert len(told) == 1
    assert re.fullmatch(
        r"The training diverged: its loss rose from \S+ to \S+ on .* Use a lower finetune\.lr\.", told[0]
    )


def test_a_healthy_training_on_few_images_is_kept(recipe: dict[str, Any]) -> None:
    images = next(batches(calibquant.pipeline.preparing.open_set(make_recipe(recipe), "calibration"), 64))
    network = calibquant.pipeline.preparing.build(make_recipe(recipe))
    for bits, mixup in ((2, 0), (8, 0), (8, 1)):
        asked = [f"quant.weights.bits={bits}", f"quant.activations.bits={bits}", "finetune.epochs=4",
                 "finetune.batch_size=16", f"finetune.mixup={mixup}"]  # fmt: skip
        given = {"threads": 1, "runs": recipe["runs"], "export": {"onnx": False}, "calibration": {"count": 64}}
        run = calibquant.quantize(make_recipe(given, asked), network, TensorImages(images.images))
        assert run.metrics["finetune"]["kept"]


def test_labels_are_not_needed(start: calibquant.Run, recipe: dict[str, Any]) -> None:
    images = TensorImages(torch.rand(60, 1, 16, 16))
    network = calibquant.pipeline.preparing.build(make_recipe(recipe))
    run = calibquant.quantize(
        {"calibration": {"count": 32}, "finetune": {"epochs": 1, "batch_size": 20, "holdout": 0.2}, "threads": 1,
         "runs": recipe["runs"], "export": {"onnx": False}}, network, images,
    )  # fmt: skip
    held = run.metrics["finetune"]["epochs"][0]["accuracy"]
    assert 0 < held <= 1  # agreement with the float network


def test_means_are_put_back_at_the_end(start: calibquant.Run) -> None:
    keys = ["finetune.iterations=3", "finetune.batch_size=48", "finetune.holdout=0", "export.onnx=false"]
    folded = calibquant.finetune(start.folder, keys).model
    again = calibquant.finetune(start.folder, [*keys, "finetune.batch_norm=reestimated"]).model
    images = torch.rand(64, 1, 16, 16)
    with torch.no_grad():
        errors = [float((m(images).mean(0) - m.teacher(images).mean(0)).abs().mean()) for m in (folded, again)]
    pairs = zip(folded.weight_quantizers.values(), again.weight_quantizers.values(), strict=True)
    assert all(torch.equal(a.get().codes, b.get().codes) for a, b in pairs)
    assert errors[0] != errors[1]


def test_amcts_preset_retrains_with_ulq_and_arq(recipe: dict[str, Any]) -> None:
    given = {**recipe, "preset": "amct-qat", "quant": {"weights": {"bits": 4}, "activations": {"bits": 4}}}
    run = calibquant.quantize(make_recipe(given, ["finetune.iterations=60", "finetune.lr=0.001"]))
    told = load_recipe(run.folder / "recipe.yaml").finetune
    assert told is not None
    assert (told.weights, told.activations, told.labels, told.distill) == ("arq", "ulq", 1.0, 0.0)
    assert run.metrics["quantized"]["top1"] > 0.9
    for quantizer in run.model.weight_quantizers.values():
        codes = quantizer.get().codes.flatten(1)
        ends = (codes == quantizer.grid.qmin) | (codes == quantizer.grid.qmax)
        assert ends.any(1).all()  # each filter's range is that of its weights


def test_the_command_goes_from_a_run_to_its_table(
    start: calibquant.Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    keys = ["finetune.iterations=2", "finetune.batch_size=48", f"runs={tmp_path}", "export.onnx=false"]
    assert main(["finetune", str(start.folder), *keys]) == 0
    out = capsys.readouterr().out
    for words in ("Train the quantized network for 2 steps", "top-1 % before training", "top-1 % after", "Run folder:"):
        assert words in out
    assert main(["finetune", str(start.folder), *keys, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finetune"]["kept"]


WRONG = [
    (["finetune.labels=0", "finetune.distill=0"], "finetune.distill: is 0, and finetune.labels too"),
    (["finetune.features=1", "finetune.labels=1", "finetune.distill=0"], "finetune.features: stands beside"),
    (["finetune.batch_size=50", "finetune.accumulate=3"], "finetune.accumulate: 50 images make no 3 equal parts"),
    (["finetune.warm_up=9"], "finetune.warm_up: 9 epochs of 5; leave epochs for the fall"),
    (["finetune.epochs=5", "model.submodule=layer1"], "finetune: trains a whole network, not its part layer1"),
    (["finetune.weights=arq", "quant.weights.grid=apot"], "finetune.weights: arq needs a uniform grid"),
    (["finetune.epochs=5", "quant.activations.granularity=per_channel"], "finetune.activations: learns one range"),
]


@pytest.mark.parametrize(("keys", "words"), WRONG)
def test_settings_that_do_not_fit_are_refused(recipe: dict[str, Any], keys: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(recipe, keys)


def test_a_run_of_another_network_is_refused(start: calibquant.Run) -> None:
    with pytest.raises(RunFolderError, match="is of another network than the recipe's"):
        calibquant.finetune(start.folder, ["model.weights=null", *SHORT])


def test_a_loss_that_diverges_names_the_mend(start: calibquant.Run, tmp_path: Path) -> None:
    keys = [*SHORT, f"runs={tmp_path}", "finetune.scale_lr=1e3"]
    with pytest.raises(
        ModelError, match=r"use a lower finetune\.lr, or go on from the last epoch: calibquant finetune"
    ):
        calibquant.finetune(start.folder, keys)


def test_a_preset_would_change_nothing_of_a_run(start: calibquant.Run) -> None:
    with pytest.raises(RecipeError, match="override, preset: sets what a recipe leaves open, and a run's recipe has"):
        calibquant.finetune(start.folder, ["preset=amct-qat"])


def test_a_training_run_is_no_start(recipe: dict[str, Any]) -> None:
    with pytest.raises(RunFolderError, match="is a run of calibquant train"):
        calibquant.finetune(Path(recipe["model"]["weights"]).parent)


def test_a_damaged_start_is_refused(start: calibquant.Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in start.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RunFolderError, match="is damaged"):
        calibquant.finetune(copy)
