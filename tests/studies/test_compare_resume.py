"""A comparison that was stopped, or partly made elsewhere, goes on."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_study import Study, Told, without_seconds

from calibquant.errors import RunFolderError
from calibquant.pipeline import stages
from calibquant.studies.compare import Comparison, cells

RUN_FILES = ("model.safetensors", "graph.json", "record.json", "manifest.csv")


def test_killed_after_a_cell_it_goes_on(
    study: Study, told: Told, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize, runs = cells.quantize, list[str]()

    def once(recipe: Any, **more: Any) -> Any:
        if runs:
            raise KeyboardInterrupt
        runs.append(recipe.preset)
        return quantize(recipe, **more)

    monkeypatch.setattr(cells, "quantize", once)
    out = Path(fields["runs"]) / "compare"
    with pytest.raises(RunFolderError, match=r"compare: was interrupted after 1 of 4 cells; the same command goes on$"):
        study()
    result = json.loads((out / "compare.json").read_text())
    assert (result["done"], result["planned"], len(result["cells"]), result["tests"]) == (1, 4, 1, [])
    assert "1 of 4 cells are done; the same command goes on." in (out / "compare.md").read_text()
    monkeypatch.setattr(cells, "quantize", quantize)
    assert study(reporter=told).result["done"] == 4
    assert told.ways == ["taken", "run", "run", "run"]


def test_an_interrupted_cell_goes_on_and_ends_with_the_same_bytes(
    study: Study, told: Told, finished: tuple[Comparison, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = stages.save_checkpoint

    def interrupting(folder: Any, *more: Any) -> None:
        save(folder, *more)
        if (folder.path / "checkpoint-0002.safetensors").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(stages, "save_checkpoint", interrupting)
    with pytest.raises(RunFolderError, match="interrupted after 1 of 4 cells; the same command goes on"):
        study()
    monkeypatch.setattr(stages, "save_checkpoint", save)
    comparison = study(reporter=told)
    assert told.ways == ["taken", "resumed", "run", "run"]
    whole, _ = finished
    for cell, twin in zip(comparison.result["cells"], whole.result["cells"][4:], strict=True):
        run, other = comparison.folder / cell["run"], whole.folder / twin["run"]
        assert [name for name in RUN_FILES if (run / name).read_bytes() != (other / name).read_bytes()] == []
        assert not list(run.parent.glob(".*"))
    assert without_seconds(comparison.result) == without_seconds(whole.result)[4:]


def test_an_interrupted_run_of_another_recipe_is_left_alone(study: Study, fields: dict[str, Any], told: Told) -> None:
    folder = Path(fields["runs"]) / "compare/nearest-w2a2-seed1005/.digits_resnet-w2a2-001.partial"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("seed: 99")
    (folder / "checkpoint.json").write_text("{}")
    comparison = study(methods=["nearest"], seeds=1, reporter=told)
    assert told.ways == ["run"]
    assert comparison.result["cells"][0]["run"].endswith("digits_resnet-w2a2-002")
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.json", "recipe.yaml"]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def other_length(path: Path) -> None:
    np.savez(path, predictions=np.zeros(59, np.int64), labels=np.zeros(59, np.int64))


def other_names(path: Path) -> None:
    np.savez(path, guesses=np.zeros(60, np.int64))


class Mine:
    """A pickle of this makes a folder when it is loaded without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("mark"),)


def pickled_array(path: Path) -> None:
    content = io.BytesIO()
    np.savez(content, predictions=np.array([Mine()]), labels=np.zeros(1, np.int64))
    path.write_bytes(content.getvalue())


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        truncated,
        other_length,
        other_names,
        pickled_array,
        lambda path: path.write_bytes(pickle.dumps(Mine())),
    ],
)
@pytest.mark.usefixtures("nothing_runs")
def test_runs_without_fitting_predictions_are_adopted(
    spoil: Callable[[Path], Any],
    study: Study,
    told: Told,
    finished: tuple[Comparison, Told],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = finished
    name = "qdrop-w2a2-seed1005"
    shutil.copytree(whole.folder / name, tmp_path / "out" / name)
    monkeypatch.chdir(tmp_path)
    stored = tmp_path / "out" / name / "predictions.npz"
    before = stored.read_bytes()
    spoil(stored)
    study(recipe=whole.folder / "recipe.yaml", methods=["qdrop"], seeds=1, out=tmp_path / "out", reporter=told)
    assert told.ways == ["evaluated again"]
    assert stored.read_bytes() == before
    assert not Path("mark").exists()
