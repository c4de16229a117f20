"""An interrupted reconstruction goes on and ends with the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calibquant import pipeline
from calibquant.cli import main
from calibquant.errors import RecipeError, RunFolderError
from calibquant.pipeline import stages
from calibquant.recipe import load_recipe
from calibquant.reconstruction import network as reconstruction
from calibquant.studies.digits import FIELDS
from calibquant.zoo import build, save_weights

FILES = ("model.safetensors", "graph.json", "record.json", "record.txt", "manifest.csv")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Digits at W2A2 with random weights and a very short reconstruction of its five units."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_weights(build("digits_resnet"), tmp_path / "digits.safetensors")
    return FIELDS | {
        "model": {"name": "digits_resnet", "weights": "digits.safetensors"},
        "calibration": {"count": 72, "batch_size": 36},
        "evaluation": {"count": 20},
        "quant": {"weights": {"bits": 2}, "activations": {"bits": 2}},
        "reconstruct": {"method": "qdrop", "iterations": 4, "rounding_lr": 0.05},
    }


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Interrupts when so many further units have been learned."""
    learn, left = reconstruction.learn_unit, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return learn(*args, **kwargs)

    def arm(units: int) -> None:
        left[0] = units
        monkeypatch.setattr(reconstruction, "learn_unit", counted)

    return arm


def _bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def _interrupted(recipe: dict[str, Any], interrupt: Callable[[int], None], units: int = 2) -> Path:
    interrupt(units)
    with pytest.raises(RunFolderError, match="was interrupted; go on with calibquant quantize --resume") as caught:
        pipeline.quantize(recipe)
    interrupt(99)
    return Path(caught.value.where)


@pytest.mark.parametrize("stops", [[1], [2, 1], [1, 1, 1, 1]])
def test_it_ends_with_the_same_bytes(
    stops: list[int], recipe: dict[str, Any], interrupt: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = pipeline.quantize(recipe)
    run = _interrupted(recipe, interrupt, stops[0])
    for more in stops[1:]:
        interrupt(more)
        assert main(["quantize", "--resume", str(run)]) == 1
        assert f"{run}: was interrupted" in capsys.readouterr().err
    interrupt(99)
    assert not run.exists()
    assert main(["quantize", "--resume", str(run)]) == 0
    assert _bytes(run) == _bytes(whole.folder)
    assert not [p.name for p in run.iterdir() if p.name.startswith((".", "checkpoint"))]
    assert not list(run.parent.glob(".*"))


def test_interrupted_before_the_first_checkpoint_nothing_is_left(
    recipe: dict[str, Any], interrupt: Callable[[int], None]
) -> None:
    interrupt(0)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(recipe)
    assert list(Path("runs").iterdir()) == []


def test_units_of_a_resumed_run_have_all_their_reports(
    recipe: dict[str, Any], interrupt: Callable[[int], None]
) -> None:
    names = [u["unit"] for u in pipeline.quantize(recipe).metrics["units"]]
    resumed = pipeline.resume(_interrupted(recipe, interrupt))
    assert [u["unit"] for u in resumed.metrics["units"]] == names
    assert (resumed.folder / "log.txt").read_text(encoding="utf-8").count("going on after 2 reconstructed units") == 1


def _other_weights(partial: Path) -> None:
    save_weights(build("digits_resnet"), Path("digits.safetensors"))


def _cut_tensors(partial: Path) -> None:
    (tensors,) = partial.glob("checkpoint-*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-7])


def _no_tensors(partial: Path) -> None:
    for tensors in partial.glob("checkpoint-*.safetensors"):
        tensors.unlink()


def _bad_json(partial: Path) -> None:
    (partial / "checkpoint.json").write_text('{"tensors": 1}', encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_other_weights, "was made with another network"),
        (_cut_tensors, "is damaged"),
        (_no_tensors, "cannot be read"),
        (_bad_json, "is damaged"),
    ],
)
def test_what_cannot_go_on_says_so_and_keeps_the_checkpoint(
    spoil: Callable[[Path], None],
    expected: str,
    recipe: dict[str, Any],
    interrupt: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = _interrupted(recipe, interrupt)
    partial = run.with_name(f".{run.name}.partial")
    spoil(partial)
    assert main(["quantize", "--resume", str(run)]) == 1
    line = capsys.readouterr().err
    assert expected in line
    assert line.count("\n") == 1
    assert (partial / "checkpoint.json").exists()
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--resume", "runs/nothing-001"], "is no interrupted run"),
        (["--resume", "runs/digits_resnet-w2a2-001"], "is complete already"),
        (["--resume", "runs/digits_resnet-w2a2-001", "--dry-run"], "--dry-run: is for a recipe"),
        ([], "takes a recipe, or --resume RUN; give one"),
    ],
)
def test_resume_needs_an_interrupted_run(
    arguments: list[str], expected: str, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.quantize(recipe)
    assert main(["quantize", *arguments]) == 1
    assert expected in capsys.readouterr().err


def test_a_run_that_goes_on_keeps_the_iterations_planned_for_its_time(
    recipe: dict[str, Any], interrupt: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []

    def plan(*arguments: Any) -> Any:
        planned.append(3 + len(planned))
        return arguments[2].model_copy(update={"iterations": planned[-1], "time": None})

    monkeypatch.setattr(stages, "within_time", plan)
    recipe = recipe | {"reconstruct": recipe["reconstruct"] | {"time": "20m"}}
    run = pipeline.resume(_interrupted(recipe, interrupt))
    assert planned == [3]
    assert run.metrics["iterations"] == {"unit": 3, "network": 0}
    assert not list(run.folder.glob("checkpoint*"))


def test_the_network_is_learned_again_from_its_units_when_it_was_interrupted(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = {"iterations": 6, "batch_size": 16}
    recipe = recipe | {"reconstruct": recipe["reconstruct"] | {"network": network, "bias_lr": 0.01}}
    whole = pipeline.quantize(recipe)
    learn = reconstruction.learn_network
    monkeypatch.setattr(reconstruction, "learn_network", _stopped)
    with pytest.raises(RunFolderError, match="was interrupted") as caught:
        pipeline.quantize(recipe)
    monkeypatch.setattr(reconstruction, "learn_network", learn)
    resumed = pipeline.resume(Path(caught.value.where))
    assert _bytes(resumed.folder) == _bytes(whole.folder)
    assert [u["unit"] for u in resumed.metrics["units"]][-1] == "network"


def _stopped(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("override", "field", "before", "now"),
    [
        ("seed=7", "seed", "1005", "7"),
        ("reconstruct.iterations=5", "reconstruct.iterations", "4", "5"),
        ("reconstruct.method=adaround", "reconstruct.method", "qdrop", "adaround"),
        ("quant.weights.bits=4", "quant.weights.bits", "2", "4"),
        ("finetune.epochs=1", "finetune", "none", "{'epochs': 1"),
        ("data.preprocess.mean=[0.4]", "data.preprocess.mean", r"\[0.5\]", r"\[0.4\]"),
    ],
)
def test_a_run_is_made_by_one_recipe(
    override: str, field: str, before: str, now: str, recipe: dict[str, Any], interrupt: Callable[[int], None]
) -> None:
    run = _interrupted(recipe, interrupt)
    kept = {path.name: path.read_bytes() for path in run.with_name(f".{run.name}.partial").iterdir()}
    expected = (
        f"{run}, recipe, {field}: was {before} when the run began and cannot become {now}.* what may change: runs"
    )
    with pytest.raises(RecipeError, match=expected):
        pipeline.resume(run, overrides=[override])
    assert {path.name: path.read_bytes() for path in run.with_name(f".{run.name}.partial").iterdir()} == kept
    assert pipeline.resume(run).folder == run


def test_a_recipe_that_was_edited_in_the_hidden_folder_is_noticed(
    recipe: dict[str, Any], interrupt: Callable[[int], None]
) -> None:
    run = _interrupted(recipe, interrupt)
    file = run.with_name(f".{run.name}.partial") / "recipe.yaml"
    file.write_text(file.read_text().replace("seed: 1005", "seed: 1006"))
    with pytest.raises(RecipeError, match="recipe, seed: was 1005 when the run began and cannot become 1006"):
        pipeline.resume(run)


def test_what_may_change_changes_no_byte_and_is_kept_in_the_receipt(
    recipe: dict[str, Any], interrupt: Callable[[int], None], tmp_path: Path
) -> None:
    whole = pipeline.quantize(recipe | {"threads": 1})
    run = _interrupted(recipe | {"threads": 1}, interrupt)
    Path("digits.safetensors").rename("moved.safetensors")
    interrupt(1)
    keys = ["threads=2", "model.weights=moved.safetensors", "evaluation.batch_size=10"]
    assert main(["quantize", "--resume", str(run), *keys]) == 1
    interrupt(99)
    assert main(["quantize", "--resume", str(run), "threads=1"]) == 0
    assert (run / "manifest.csv").read_bytes() == (whole.folder / "manifest.csv").read_bytes()
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["changed"] == {
        "threads": [1, 2, 1], "model.weights": ["digits.safetensors", "moved.safetensors"],
        "evaluation.batch_size": [None, 10],
    }  # fmt: skip
    stored = load_recipe(run / "recipe.yaml")
    assert (stored.threads, stored.evaluation.batch_size, stored.model.weights) == (1, 10, Path("moved.safetensors"))
    assert "changed" not in json.loads((whole.folder / "receipt.json").read_text())


def test_a_damaged_interrupted_run_is_one_line(
    recipe: dict[str, Any], interrupt: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = _interrupted(recipe, interrupt)
    partial = run.with_name(f".{run.name}.partial")
    shutil.copytree(partial, "kept")
    stored = json.loads((partial / "checkpoint.json").read_text())
    spoiled = {
        "checkpoint.json": [
            "[]", "{", '{"kind": 5}', "{}", json.dumps(stored | {"tensors": "../digits.safetensors"}),
            json.dumps(stored | {"tensors": "/dev/zero"}), json.dumps(stored | {"recipe": 5}),
            json.dumps(stored | {"units": [5]}), json.dumps(stored | {"tensors": 5}),
        ],
        "checkpoint-changes.json": ["[]", "{", '{"threads": []}', '{"threads": 5}'],
        "recipe.yaml": ["seed: [", "", "- a", "include: [/dev/zero]"],
        "checkpoint-manifest.csv": ["", "a,b"],
    }  # fmt: skip
    for name, contents in spoiled.items():
        for content in contents:
            (partial / name).write_text(content)
            assert main(["quantize", "--resume", str(run)]) == 1, (name, content)
            said = capsys.readouterr().err
            assert said.count("\n") == 1, said
            assert "internal error" not in said, (name, content)
            shutil.rmtree(partial)
            shutil.copytree("kept", partial)
