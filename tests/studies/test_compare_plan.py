"""Which cells a comparison has, and what makes it impossible; nothing is left behind then."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from calibquant.errors import RecipeError
from calibquant.recipe import PRESETS, load_recipe, make_recipe
from calibquant.studies.compare import Comparison
from calibquant.studies.compare.cells import essence, same_run
from calibquant.studies.compare.planning import Study, chosen_study, make_study

FIELDS: dict[str, Any] = {"model": {"name": "digits_resnet"}, "data": {"kind": "digits"}, "runs": "elsewhere"}


def plan(**change: Any) -> Study:
    arguments: dict[str, Any] = {
        "recipe": FIELDS, "methods": ["nearest", "qdrop"], "bits": ["w4a4"], "seeds": 1, "baseline": None,
        "overrides": [], "out": None, "jobs": 1,
    }  # fmt: skip
    return make_study(**arguments | change)


def test_cells_are_methods_by_settings_by_seeds_with_pairs_together() -> None:
    study = plan(bits=["w4a4", "W2A8"], seeds=2)
    assert [(cell.setting, cell.seed, cell.method) for cell in study.cells] == [
        (setting, seed, method)
        for setting in ("W4A4", "W2A8") for seed in (1005, 1006) for method in ("nearest", "qdrop")
    ]  # fmt: skip
    assert study.cells[-1].folder == Path("elsewhere/compare/qdrop-w2a8-seed1006")
    assert str(study.cells[-1]) == "qdrop W2A8 seed 1006"


def test_grids_multiply_methods_and_have_cells_where_there_are_bits() -> None:
    study = plan(
        methods=["nearest", "qdrop"], grids=["uniform", "apot", "binary", "nuq"], bits=["1..2", "w8a8", "w5a8"]
    )
    assert [f"{cell.method} {cell.setting}" for cell in study.cells] == [
        "nearest:binary W1A4", "qdrop:binary W1A4",
        "nearest:uniform W2A4", "nearest:apot W2A4", "nearest:binary W2A4",
        "qdrop:uniform W2A4", "qdrop:apot W2A4", "qdrop:binary W2A4",
        "nearest:uniform W8A8", "qdrop:uniform W8A8",
        "nearest:uniform W5A8", "nearest:apot W5A8", "nearest:binary W5A8", "nearest:nuq W5A8",
        "qdrop:uniform W5A8", "qdrop:apot W5A8", "qdrop:binary W5A8", "qdrop:nuq W5A8",
    ]  # fmt: skip
    cell = study.cells[-1]
    assert (cell.recipe.quant.weights.grid, cell.recipe.reconstruct.method) == ("nuq", "qdrop")
    assert cell.recipe.quant.weights.bits == 8, "32 of the levels of 8 bits, which take 5"
    assert cell.folder == Path("elsewhere/compare/qdrop-nuq-w5a8-seed1005")
    assert study.baseline == "nearest:uniform"
    again = plan(methods=list(study.methods), bits=["w1a4", "w2a4", "w8a8", "w5a8"])
    assert again.cells == study.cells


@pytest.mark.parametrize("method", PRESETS)
def test_a_cell_is_its_preset_at_the_bits_and_seed(method: str) -> None:
    (cell,) = plan(methods=[method], bits=["w3a5"], overrides=["seed=7", "calibration.batch_size=8"]).cells
    bits = ["quant.weights.bits=3", "quant.activations.bits=5", "calibration.batch_size=8"]
    expected = make_recipe(FIELDS | {"preset": method}, [*bits, "seed=7"])
    assert cell.recipe == expected.model_copy(update={"runs": Path(f"elsewhere/compare/{method}-w3a5-seed7")})


@pytest.mark.parametrize(
    ("seeds", "overrides", "expected"),
    [
        (3, [], (1005, 1006, 1007)),
        (2, ["seed=7"], (7, 8)),
        ([1005, 2005], [], (1005, 2005)),
        ((0,), [], (0,)),
    ],
)
def test_seeds_are_counted_or_listed(seeds: Any, overrides: list[str], expected: tuple[int, ...]) -> None:
    assert plan(seeds=seeds, overrides=overrides).seeds == expected


@pytest.mark.parametrize(
    ("jobs", "overrides", "threads"),
    [(1, [], None), (1, ["threads=3"], 3), (2, ["threads=3"], 3), (2, [], 4), (99, [], 1)],
)
def test_threads_are_shared_among_jobs_and_stated(
    jobs: int, overrides: list[str], threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert plan(jobs=jobs, overrides=overrides).cells[0].recipe.threads == threads


def test_the_command_makes_the_same_study(tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text(yaml.safe_dump(FIELDS))
    study = plan(recipe=recipe, overrides=["seed=3", "data.preprocess.mean=[0.5]"], baseline="qdrop", out=Path("o"))
    assert study.command == (
        f"calibquant compare '{recipe}' 'data.preprocess.mean=[0.5]' --methods nearest,qdrop --bits w4a4 --seeds 3, "
        "--baseline qdrop --out o --jobs 1"
    )


def test_the_preset_of_the_file_gives_way_to_the_methods() -> None:
    study = plan(recipe=FIELDS | {"preset": "int8"})
    assert [cell.recipe for cell in study.cells] == [cell.recipe for cell in plan().cells]


SAME = r"recipe: the methods '{}' and '{}' are the same with it; leave {} out"
HIDES = r"recipe, reconstruct.method: hides what the method '{}' does; leave reconstruct.method out of the recipe"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"methods": ["nearest", "qdrp"]}, "methods: 'qdrp' is unknown; did you mean 'qdrop'"),
    "no method": ({"methods": []}, "methods: none is given; give at least one of methods"),
    "method twice": ({"methods": ["qdrop", "qdrop"]}, "methods: 'qdrop' is given twice; give each once"),
    "unknown baseline": ({"baseline": "neares"}, "baseline: 'neares' is not compared; did you mean 'nearest'"),
    "baseline that is not compared": ({"baseline": "int8"}, "baseline: 'int8' is not compared; known are nearest, qd"),
    "no setting": ({"bits": []}, "bits: none is given"),
    "malformed setting": ({"bits": ["4"]}, "bits: '4' is no setting; write for example w4a4,w2a2"),
    "setting with more": ({"bits": ["w4a4x"]}, "bits: 'w4a4x' is no setting"),
    "1 bit": ({"bits": ["w4a1"]}, "bits: 'w4a1' asks for 1 bits, which no grid has; use 2, 3, 4, 5, 6, 7, 8 or 16"),
    "1 bit of uniform weights": ({"bits": ["w1a4"]}, "bits: no method has a grid of these bits; use other bits"),
    "unknown grid": ({"grids": ["apto"]}, "grids: 'apto' is unknown; did you mean 'apot'"),
    "unknown grid of a method": ({"methods": ["qdrop:apto"]}, "grids: 'apto' is unknown; did you mean 'apot'"),
    "grid twice": ({"grids": ["apot", "apot"]}, "grids: 'apot' is given twice"),
    "12 bits": ({"bits": ["w4a12"]}, "bits: 'w4a12' asks for 12 bits"),
    "setting twice": ({"bits": ["w4a4", "W4A4"]}, "bits: 'w4a4' is given twice"),
    "0 seeds": ({"seeds": 0}, "seeds: 0 is no number of seeds; give 1 to 100, or a list with a comma"),
    "negative seeds": ({"seeds": -1}, "seeds: -1 is no number of seeds"),
    "a seed in place of a number": ({"seeds": 1005}, "seeds: 1005 is no number of seeds; .* such as 1005,2005"),
    "negative seed": ({"seeds": [1, -1]}, "seeds: -1 is negative; use whole numbers from 0"),
    "seed twice": ({"seeds": [1, 2, 1]}, "seeds: '1' is given twice"),
    "no seed": ({"seeds": []}, "seeds: none is given"),
    "two ways to give seeds": ({"seeds": [1], "overrides": ["seed=2"]}, "override 'seed=2': the seeds are listed alr"),
    "no jobs": ({"jobs": 0}, "jobs: 0 cells at a time"),
    "bits by override": ({"overrides": ["quant.weights.bits=2"]}, "bits=2': --bits sets this field; leave the overr"),
    "method by override": ({"overrides": ["preset=int8"]}, "'preset=int8': --methods sets this field; leave"),
    "unknown field": ({"overrides": ["sed=1"]}, "sed: this key is unknown; did you mean 'seed'"),
    "no evaluation data": ({"overrides": ["data.kind=null"]}, "recipe, data.kind: this field is required"),
    "a recipe that hides a method": (
        {"overrides": ["reconstruct.method=qdrop"], "methods": ["qdrop", "nearest"]}, HIDES.format("nearest"),
    ),
    "a recipe that takes the learning away": (
        {"overrides": ["reconstruct={method: none}"], "methods": ["qdrop", "brecq"]}, HIDES.format("qdrop"),
    ),
    "methods that differ in what the recipe sets": (
        {"overrides": ["quant.boundary=none"], "methods": ["nearest", "qdrop", "captq"]},
        SAME.format("qdrop", "captq", "quant.boundary"),
    ),
    "methods that differ in one field of many": (
        {"overrides": ["quant.boundary=qdrop", "calibration.count=16"],
         "methods": ["captq-reference", "qdrop-reference"]},
        SAME.format("captq-reference", "qdrop-reference", "quant.boundary"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_impossible_is_one_line_and_leaves_nothing(
    name: str, study: Callable[..., Comparison], fields: dict[str, Any]
) -> None:
    change, message = BAD[name]
    with pytest.raises(RecipeError, match=message) as caught:
        study(**change)
    assert "\n" not in str(caught.value)
    assert not Path(fields["runs"]).exists()


@pytest.mark.parametrize(
    ("wanted", "found", "same"),
    [
        ([], [], True),
        ([], ["threads=4", "device=cpu", "runs=far", "preset=int8", "quant.placement=integer",
              "quant.boundary=qdrop", "quant.weights={bits: 4, symmetric: false, observer: mse}",
              "quant.activations={bits: 4, observer: mse}", "quant.weights.rounding=nearest",
              "quant.bias_correction=none"], True),
        (["reconstruct.iterations=5"], [], True),  # without reconstruction its fields say nothing
        (["reconstruct.method=qdrop"], [], False),
        (["reconstruct.method=qdrop"], ["reconstruct.method=qdrop", "reconstruct.regularizer=0.3"], True),
        (["reconstruct.method=qdrop", "reconstruct.regularizer=0.2"],
         ["reconstruct.method=qdrop", "reconstruct.regularizer=0.3"], False),
        (["reconstruct.method=qdrop", "reconstruct.iterations=5"], ["reconstruct.method=qdrop"], False),
        (["seed=1"], [], False),
        (["evaluation.count=10"], [], False),
        (["model.weights=a"], ["model.weights=b"], False),
    ],
)  # fmt: skip
def test_recipes_that_make_the_same_run(wanted: list[str], found: list[str], same: bool) -> None:
    assert same_run(make_recipe(FIELDS, wanted), make_recipe(FIELDS, found)) is same


def test_an_essence_survives_the_file(tmp_path: Path) -> None:
    recipe = make_recipe(FIELDS | {"preset": "brecq-reference"})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert essence(load_recipe(tmp_path / "recipe.yaml")) == essence(recipe)


def test_the_ablation_is_the_papers_table() -> None:
    """Each part alone differs from the base in its own fields only, and all together have all of them."""
    methods, bits = chosen_study("aciq-ablation", [], [])
    study = plan(methods=list(methods), bits=list(bits), seeds=1)
    assert [cell.setting for cell in study.cells[::5]] == ["W8A4", "W4A8", "W4A4"]
    base, *parts, everything = (flat(cell.recipe.quant.model_dump()) for cell in study.cells[:5])
    changed = [{k: v for k, v in part.items() if v != base[k]} for part in parts]
    assert [set(c) for c in changed] == [
        {"activations.observer"},
        {"weights.allocation", "activations.allocation", "activations.granularity"},
        {"weights.correction"},
    ]
    assert {k: v for k, v in everything.items() if v != base[k]} == {k: v for c in changed for k, v in c.items()}
    assert chosen_study(None, ["qdrop"], ["w4a4"]) == (["qdrop"], ["w4a4"])


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows
