"""A comparison from end to end: what it leaves, and what it refuses."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_study import Study, Told, content, predictions, without_seconds

from calibquant.errors import CalibQuantError, DataError, RecipeError, RunFolderError
from calibquant.metrics import mcnemar
from calibquant.studies.compare import Comparison
from calibquant.zoo import build, save_weights

CELLS = [("nearest", 1005), ("qdrop", 1005), ("nearest", 1006), ("qdrop", 1006)]


def test_the_folder_holds_every_cell_and_the_results(finished: tuple[Comparison, Told]) -> None:
    comparison, _ = finished
    names = {f"{m}-{s}-seed{seed}" for m, seed in CELLS for s in ("w4a4", "w2a2")}
    assert {p.name for p in comparison.folder.iterdir()} == names | {
        "compare.json",
        "compare.md",
        "compare.png",
        "recipe.yaml",
    }
    assert comparison.folder.name == "compare"
    assert json.loads((comparison.folder / "compare.json").read_text()) == comparison.result
    for cell in comparison.result["cells"]:
        metrics = json.loads((comparison.folder / cell["run"] / "metrics.json").read_text())
        assert (cell["top1"], cell["agreement"]) == (metrics["quantized"]["top1"], metrics["quantized"]["agreement"])
        assert (cell["bytes"], cell["weight_bits"]) == (metrics["size"]["file"], metrics["size"]["weight_bits"])
        assert (cell["setting"], cell["units"]) == (metrics["setting"], len(metrics["units"]))
        recipe = yaml.safe_load((comparison.folder / cell["run"] / "recipe.yaml").read_text())
        assert (recipe["preset"], recipe["seed"], recipe["threads"]) == (cell["method"], cell["seed"], 1)


def test_the_results_say_what_they_are_of(finished: tuple[Comparison, Told]) -> None:
    comparison, _ = finished
    result = comparison.result
    facts = {"boundary": "qdrop", "placement": "integer", "calibration_count": 16}
    assert result["methods"] == {
        "nearest": facts | {"reconstruction": "none", "iterations": None},
        "qdrop": facts | {"reconstruction": "qdrop", "iterations": 3},
    }
    assert (result["seeds"], result["settings"], result["baseline"]) == ([1005, 1006], ["W4A4", "W2A2"], "nearest")
    assert (result["images"], result["labelled"], result["done"], result["planned"]) == (60, 60, 8, 8)
    assert [(c["method"], c["seed"]) for c in result["cells"]] == CELLS * 2
    made_again = re.escape(str(comparison.folder / "recipe.yaml"))
    assert re.search(rf"^calibquant compare {made_again} --methods nearest,qdrop .*1005,1006", result["command"])


def test_table_and_tests_follow_from_the_predictions(finished: tuple[Comparison, Told]) -> None:
    comparison, _ = finished
    result = comparison.result
    right = {
        (c["setting"], c["method"], c["seed"]): np.equal(*predictions(comparison, c)) for c in result["cells"]
    }  # fmt: skip
    for row in result["table"]:
        top1 = [right[row["setting"], row["method"], seed].mean() for seed in (1005, 1006)]
        assert row["top1"] == pytest.approx({"n": 2, "mean": np.mean(top1), "sd": np.std(top1, ddof=1)})
    assert [(t["setting"], t["method"]) for t in result["tests"]] == [("W4A4", "qdrop"), ("W2A2", "qdrop")]
    for test in result["tests"]:
        pairs = [(right[test["setting"], "qdrop", s], right[test["setting"], "nearest", s]) for s in (1005, 1006)]
        assert test["mcnemar"] == [mcnemar(a, b) for a, b in pairs]
        assert test["difference"] == pytest.approx(np.mean([a.mean() - b.mean() for a, b in pairs]))


def test_each_cell_is_told_once(finished: tuple[Comparison, Told]) -> None:
    _, told = finished
    order = [f"{method} {setting} seed {seed}" for setting in ("W4A4", "W2A2") for method, seed in CELLS]
    assert told.steps == [(i, 8, name) for i, name in enumerate(order, start=1)]
    for i, (note, name) in enumerate(zip(told.notes, order, strict=True), start=1):
        assert re.fullmatch(rf"cell {i} of 8, {name}: top-1 \d+\.\d\d %, agreement \d+\.\d\d %, run", note)
    assert told.worked > 20


def test_the_page_shows_the_same(finished: tuple[Comparison, Told]) -> None:
    comparison, _ = finished
    page = (comparison.folder / "compare.md").read_text(encoding="utf-8")
    result = comparison.result
    assert page.splitlines()[2] == f"    {result['command']}"
    line = (
        "boundary qdrop; placement integer; calibration images 16; iterations none (nearest), 3 (qdrop); seeds 1005, "
    )
    assert f"{line}1006; 60 evaluation images; float top-1 {100 * result['float_top1']:.2f} %." in page
    for row in result["table"]:
        assert f" {100 * row['top1']['mean']:.2f} ± {100 * row['top1']['sd']:.2f} (2) |" in page
    assert page.count(" not shown |") + page.count(" better |") + page.count(" worse |") == 2


@pytest.mark.usefixtures("nothing_runs")
def test_a_complete_study_is_taken_as_it_is(
    finished: tuple[Comparison, Told], copied: Path, told: Told, study: Study
) -> None:
    whole, _ = finished
    before = {name: data for name, data in content(copied).items() if not name.startswith("compare.")}
    recipe = copied / "recipe.yaml"
    again = study(recipe=recipe, bits=["w4a4", "w2a2"], out=copied, reporter=told)
    assert {k: v for k, v in again.result.items() if k not in ("command", "recipe")} == {
        k: v for k, v in whole.result.items() if k not in ("command", "recipe")
    }
    assert told.ways == ["taken"] * 8
    # Nor do these fields make another run.
    elsewhere = study(recipe=recipe, overrides=["threads=2", "device=cpu"], out=copied)
    assert elsewhere.result["cells"] == whole.result["cells"][4:]
    study(recipe=recipe, methods=["nearest"], overrides=["reconstruct.iterations=7"], out=copied)
    assert {name: data for name, data in content(copied).items() if not name.startswith("compare.")} == before


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"overrides": ["calibration.count=17"]}, "was made with another recipe; give another folder with --out"),
        ({"overrides": ["reconstruct.rounding_lr=0.1"], "methods": ["qdrop"]}, "was made with another recipe"),
        ({"overrides": ["evaluation.count=50"]}, "was made with another recipe"),
    ],
)
def test_a_run_of_another_recipe_is_an_error_and_stays(
    change: dict[str, Any], problem: str, study: Study, copied: Path
) -> None:
    before = content(copied)
    with pytest.raises(RunFolderError, match=f"digits_resnet-w2a2-001: {problem}") as caught:
        study(**{"recipe": copied / "recipe.yaml", "out": copied} | change)
    assert caught.value.where.startswith(str(copied))
    assert content(copied) == before


def test_other_weights_of_the_same_name_are_an_error(study: Study, fields: dict[str, Any]) -> None:
    study(methods=["nearest"], seeds=1)
    torch.manual_seed(1)
    save_weights(build("digits_resnet"), fields["model"]["weights"])
    with pytest.raises(RunFolderError, match=r"001: was made with other weights than .*; give another folder"):
        study(methods=["nearest"], seeds=1)


def test_other_images_are_an_error(study: Study, fields: dict[str, Any]) -> None:
    comparison = study(methods=["nearest"], seeds=1)
    stored = comparison.folder / "nearest-w2a2-seed1005/predictions.npz"
    np.savez(stored, predictions=np.zeros(60, np.int64), labels=np.full(60, 3))
    with pytest.raises(RunFolderError, match="holds other labels than that of nearest W2A2 seed 1005; delete both"):
        study(methods=["nearest"], seeds=2)


def test_a_failing_cell_says_that_the_same_command_goes_on(study: Study, fields: dict[str, Any]) -> None:
    Path(fields["model"]["weights"]).unlink()
    with pytest.raises(
        CalibQuantError, match=r"digits.safetensors: .*; the same command then goes on after 0 of 4 cel"
    ):
        study()
    assert content(Path(fields["runs"]) / "compare").keys() == {"recipe.yaml"}


def test_several_processes_give_the_same_cells_and_can_be_interrupted(
    study: Study, told: Told, finished: tuple[Comparison, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = finished
    note = told.note

    def interrupt_at_the_third(text: str) -> None:
        note(text)
        if len(told.notes) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(told, "note", interrupt_at_the_third)
        with pytest.raises(RunFolderError, match="was interrupted after 3 of 4 cells; the same command goes on"):
            study(jobs=2, reporter=told)
    assert told.ways == ["run"] * 3
    comparison = study(reporter=told)
    assert told.ways[3:6] == ["taken"] * 3
    assert without_seconds(comparison.result) == without_seconds(whole.result)[4:]
    for cell, twin in zip(comparison.result["cells"], whole.result["cells"][4:], strict=True):
        assert np.array_equal(predictions(comparison, cell), predictions(whole, twin))


def test_an_error_in_a_process_arrives_as_it_was() -> None:
    for kind in (RecipeError, DataError, RunFolderError):
        error = kind("recipe.yaml, seed", "is negative", "use a whole number")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert (str(again), again.where, again.mend) == (str(error), error.where, error.mend)


def test_no_evaluation_images_is_an_error_at_once(study: Study, fields: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"data.evaluation: there is no split 'tset'; did you mean 'test'"):
        study(overrides=["data.evaluation=tset"])
    assert not Path(fields["runs"]).exists()
