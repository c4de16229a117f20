"""The selection study: its plan, that it goes on, what its tables say, and what its shifts do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from calibquant import TensorImages
from calibquant.cli import main
from calibquant.errors import CalibQuantError
from calibquant.recipe import make_recipe
from calibquant.studies.digits import FIELDS
from calibquant.studies.paired import holm, over_seeds
from calibquant.studies.selection import make_selection_study, running, study_selection
from calibquant.studies.selection.shifting import SIGMA, Shifted, blurred, darkened, shifted_candidates
from calibquant.studies.selection.summary import summary
from calibquant.zoo import build, save_weights


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Digits with random weights and nearest rounding: a cell takes a moment."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_weights(build("digits_resnet"), tmp_path / "digits.safetensors")
    fields = FIELDS | {
        "model": {"name": "digits_resnet", "weights": "digits.safetensors"},
        "calibration": {"pool": 120, "batch_size": 60},
        "evaluation": {"count": 40},
        "reconstruct": {"method": "none"},
        "threads": 1,
    }
    Path("recipe.yaml").write_text(make_recipe(fields).to_yaml())
    return Path("recipe.yaml")


def small(recipe: Path, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "strategies": ["class-balanced", "moments"], "sizes": [8, 24], "draws": [0, 1], "seeds": [5],
    }  # fmt: skip
    return make_selection_study(recipe, **(arguments | changes))


def test_a_study_runs_every_cell_once_and_goes_on(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(recipe)
    ran: list[str] = []
    run = running._run

    def counted(study: Any, cell: Any, *rest: Any) -> Any:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(cell.name)
        return run(study, cell, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(running, "_run", counted)
        with pytest.raises(KeyboardInterrupt):
            study_selection(study)
    assert json.loads((study.out / "selection.json").read_text())["done"] == 3
    found = study_selection(study)
    assert (found.result["done"], found.result["planned"]) == (8, 8)
    assert {(c["strategy"], c["size"], c["draw"]) for c in found.result["cells"]} == {
        (s, n, d) for s in study.strategies for n in (8, 24) for d in (0, 1)
    }
    assert (study.out / "selection.png").stat().st_size > 1000
    assert not list((study.out / "runs").iterdir())
    before = (study.out / "selection.json").read_bytes()
    monkeypatch.setattr(running, "_run", None)  # nothing is left to run
    study_selection(study)
    assert (study.out / "selection.json").read_bytes() == before


def test_strategies_share_the_candidates_of_a_draw(recipe: Path) -> None:
    study = small(recipe, sizes=[60])
    study_selection(study)
    candidates = [set(_paths(study.out / f"manifests/none-{s}-60-draw0.csv")) for s in study.strategies]
    assert len(candidates[0] | candidates[1]) <= 120
    assert candidates[0] != candidates[1]
    other = set(_paths(study.out / "manifests/none-moments-60-draw1.csv"))
    assert other != candidates[1]


def _paths(manifest: Path) -> list[str]:
    return [line.split(",")[0] for line in manifest.read_text().splitlines()[1:]]


def test_what_another_process_works_at_is_left_to_it(recipe: Path) -> None:
    study = small(recipe, sizes=[8], draws=[0])
    first = study.cells[0]
    (study.out / "cells").mkdir(parents=True)
    with running._claimed(study.out / "cells" / f".{first.name}.lock") as ours:
        assert ours
        assert study_selection(study).result["done"] == 1
    assert study_selection(study).result["done"] == 2


@pytest.mark.parametrize("change", [{"shift": "missing-class"}, {"overrides": ["calibration.batch_size=30"]}])
def test_a_folder_holds_one_study(recipe: Path, change: dict[str, Any]) -> None:
    study_selection(small(recipe, sizes=[8], draws=[0]))
    with pytest.raises(CalibQuantError, match=r"plan.json: holds a study with another recipe or shift; name another"):
        study_selection(small(recipe, sizes=[8], draws=[0], **change))
    assert study_selection(small(recipe, sizes=[8], draws=[0, 1])).result["done"] == 4


def cell(strategy: str, draw: int, seed: int, top1: float, size: int = 8) -> dict[str, Any]:
    return {
        "setting": "w2a2", "strategy": strategy, "size": size, "draw": draw, "seed": seed, "float_top1": 0.9,
        "top1": top1, "agreement": top1, "worst_class": top1 / 2, "images": 40, "seconds": 1.0,
    }  # fmt: skip


def test_differences_are_paired_by_draw_and_corrected(recipe: Path) -> None:
    study = small(recipe, strategies=["class-balanced", "moments", "tail"], draws=[0, 1, 2], seeds=[5, 6],
                  sizes=[8, 16], named=("moments", 8))  # fmt: skip
    random = np.random.default_rng(0)
    done = [
        cell(s, d, seed, 0.5 + 0.1 * d + shift + 0.01 * random.standard_normal(), size)
        for s, shift in (("class-balanced", 0), ("moments", 0.05), ("tail", -0.02))
        for d in range(3) for seed in (5, 6) for size in (8, 16)
    ]  # fmt: skip
    found = summary(study, done)
    values = {
        (s, n): np.array([[c["top1"] for c in done if (c["strategy"], c["size"], c["draw"]) == (s, n, d)]
                          for d in range(3)]).mean(1)
        for s in study.strategies for n in (8, 16)
    }  # fmt: skip
    tests = {(t["strategy"], t["size"]): t for t in found["tests"]}
    assert len(tests) == 4
    for (name, size), test in tests.items():
        expected = over_seeds((values[name, size] - values["class-balanced", size]).tolist())
        assert (test["p"], test["difference"]) == pytest.approx((expected.p, expected.difference.mean))
    named = tests.pop(("moments", 8))
    assert (named["named"], named["p_holm"]) == (True, None)
    assert [t["p_holm"] for t in tests.values()] == holm([t["p"] for t in tests.values()])
    row = next(r for r in found["table"] if (r["strategy"], r["size"]) == ("tail", 16))
    assert row["top1"]["mean"] == pytest.approx(values["tail", 16].mean())
    assert row["top1"]["sd"] == pytest.approx(values["tail", 16].std(ddof=1))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # Holm 1979 by hand: sorted p times 4, 3, 2, 1, made monotone.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([], []),
    ],
)
def test_holm(values: list[float], expected: list[float]) -> None:
    assert holm(values) == pytest.approx(expected)


IMAGES = torch.rand(10, 3, 32, 24, generator=torch.Generator().manual_seed(1))


def test_a_blur_is_scipys() -> None:
    expected = np.stack([gaussian_filter(c.double().numpy(), SIGMA * 24, mode="nearest", radius=4) for c in IMAGES[0]])
    assert blurred(IMAGES[0]).numpy() == pytest.approx(expected, abs=1e-5)


def test_dark_images_keep_black_and_a_quarter_of_the_rest() -> None:
    black = torch.tensor([-1.0, 0.0, 0.5])
    flat = black[:, None, None] + torch.ones(3, 2, 2)
    assert torch.equal(darkened(flat, black), black[:, None, None] + torch.full((3, 2, 2), 0.25))


@pytest.mark.parametrize("shift", ["blurred", "dark"])
def test_half_of_the_candidates_are_changed(shift: str) -> None:
    base = TensorImages(IMAGES, [0, 1] * 5)
    images, indices = shifted_candidates(base, range(1, 9), shift, 3, torch.zeros(3))
    assert isinstance(images, Shifted)
    changed = [i for i in range(10) if not torch.equal(images.image(i), IMAGES[i])]
    assert (indices, len(changed), set(changed) <= set(range(1, 9))) == (list(range(1, 9)), 4, True)
    assert [images.sha256(i) for i in range(10)] == [base.sha256(i) for i in range(10)]
    assert changed != [
        i for i in range(10) if i in shifted_candidates(base, range(1, 9), shift, 4, torch.zeros(3))[0].changed
    ]  # type: ignore[attr-defined]


def test_a_class_is_missing_and_another_in_the_next_draw() -> None:
    base = TensorImages(IMAGES, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    for draw in range(4):
        _, indices = shifted_candidates(base, range(10), "missing-class", draw, torch.zeros(3))
        assert {base.label(i) for i in indices} == {0, 1, 2} - {draw % 3}
    assert shifted_candidates(base, [4, 2], "none", 0, torch.zeros(3)) == (base, [4, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ["class-balanced", "momnts"]}, "there is no strategy 'momnts'; did you mean 'moments'"),
        ({"baseline": "random"}, "calibquant study, baseline: 'random' is not studied"),
        ({"sizes": [500]}, "500 images cannot be chosen of 120 candidates; use smaller sizes, or set calibration.pool"),
        ({"sizes": [1]}, "sizes: 1 is too small"),
        ({"sizes": [8, 8]}, "sizes: one is given twice; give each once"),
        ({"draws": []}, "draws: none is given"),
        ({"bits": ["w9a9"]}, "bits: 'w9a9' asks for 9 bits, which no grid has"),
        ({"named": ("class-balanced", 8)}, "'class-balanced:8' is no comparison of this study; name one"),
        ({"shift": "dusk"}, "shift: 'dusk' is unknown"),
    ],
)
def test_a_plan_that_is_none(recipe: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibQuantError, match=message):
        small(recipe, **changes)


def test_the_command(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "study",
        "selection",
        "recipe.yaml",
        "--strategies",
        "class-balanced captq",
        "--sizes",
        "8",
        "--draws",
        "2",
    ]
    assert main([*words, "--seeds", "3", "--named", "captq:8", "--bits", "w4a4"]) == 0
    out = capsys.readouterr().out
    assert "| captq |" in out
    assert "W4A4, worst class %" in out
    result = json.loads(Path("runs/selection/selection.json").read_text())
    assert (result["done"], result["named"], result["draws"]) == (4, ["captq", 8], [0, 1])
    assert main([*words, "--seeds", "x"]) == 1
    assert "seeds: 'x' is no list of numbers; give whole numbers" in capsys.readouterr().err


def test_the_command_that_is_told_makes_the_study(recipe: Path) -> None:
    import shlex

    study = small(recipe, named=("moments", 24), overrides=["seed=3"])
    words = shlex.split(study.command)
    assert words[:5] == ["calibquant", "study", "selection", "recipe.yaml", "seed=3"]
    assert main([*words[1:], "--json"]) == 0
    assert json.loads((study.out / "selection.json").read_text())["command"] == replace(study).command
