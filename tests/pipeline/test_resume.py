"""An interrupted reconstruction goes on and ends with the bytes of an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calibquant import pipeline
from calibquant.cli import main
from calibquant.errors import RunFolderError
from calibquant.pipeline import stages
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
