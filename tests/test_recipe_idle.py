"""Fields without effect: the table against real runs, what counts as set by the user, and where warnings are told."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from calibquant import pipeline
from calibquant.cli import main
from calibquant.errors import RecipeError
from calibquant.pipeline.reporting import Silent
from calibquant.recipe import PRESETS, Recipe, changed, idle_fields, load_recipe, make_recipe
from calibquant.recipe.idle import ADOPTED, ROWS
from calibquant.recipe.section import leaves
from calibquant.recipe.shipped import shipped_recipes
from calibquant.studies.compare.planning import idle_everywhere, make_study

SWEEP = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "idle_fields.py"))


def idle(*overrides: str, command: Any = "quantize") -> dict[str, str]:
    """Reasons by field."""
    return {found.field: found.reason for found in idle_fields(make_recipe({}, list(overrides)), command)}


def test_every_field_is_known_to_the_sweep() -> None:
    """A new field gets another value in benchmarks/idle_fields.py, and a row of recipe/idle.py where it may be idle."""
    known = {*SWEEP["OTHER"], *SWEEP["ELSEWHERE"]}
    assert known == set(leaves(Recipe))
    assert len(known) >= 160


def test_the_table_names_fields_that_exist() -> None:
    fields = list(leaves(Recipe))
    sections = {field[:i] for field in fields for i, letter in enumerate(field) if letter == "."}
    for row in (*ROWS, *ADOPTED):
        assert {row.because, *row.fields} <= {"", "reconstruct.network", "preset", *fields, *sections}
        assert row.because or row.words


@pytest.mark.parametrize(
    ("overrides", "field", "reason"),
    [
        (["reconstruct.time=20m"], "reconstruct.time", "reconstruct.method is none"),
        (["reconstruct.views=2"], "reconstruct.views", "reconstruct.method is none"),
        (["reconstruct.loss=fisher"], "reconstruct.loss", "reconstruct.method is none"),
        (["reconstruct.network.iterations=9"], "reconstruct.network.iterations", "reconstruct.method is none"),
        (["preset=adaround", "reconstruct.drop=0.2"], "reconstruct.drop", "reconstruct.method is adaround; only qdrop"),
        (["preset=brecq", "reconstruct.drop=0.2"], "reconstruct.drop", "reconstruct.method is brecq"),
        (["preset=adaround", "reconstruct.scale_lr=1"], "reconstruct.scale_lr", "reconstruct.method is adaround"),
        (["preset=qdrop", "reconstruct.scale_iterations=9"], "reconstruct.scale_iterations", "method is qdrop"),
        (["preset=qdrop", "reconstruct.network.rise=0.5"], "reconstruct.network.rise", "network.iterations is 0"),
        (["preset=qdrop", "reconstruct.regularizer=0", "reconstruct.beta=[9, 2]"], "reconstruct.beta",
         "reconstruct.regularizer is 0.0"),
        (["preset=qdrop", "reconstruct.time=9s", "reconstruct.iterations=7"], "reconstruct.iterations",
         "reconstruct.time is 9.0"),
        (["quant.placement=academic", "quant.residual_bits=6"], "quant.residual_bits", "placement is academic"),
        (["quant.boundary=none", "quant.boundary_bits=6"], "quant.boundary_bits", "quant.boundary is none"),
        (["quant.boundary_bits=3"], "quant.boundary_bits", "the larger number holds"),
        (["preset=int8", "quant.boundary=brecq"], "quant.boundary", "quant.boundary_bits is 8"),
        (["preset=int8", "quant.weights.symmetric=false"], "quant.weights.symmetric", "weights of 8 bits are"),
        (["quant.activations.dynamic=true", "quant.activations.observer=kl"], "quant.activations.observer",
         "quant.activations.dynamic is true"),
        (["quant.activations.dynamic=true", "calibration.range_count=9"], "calibration.range_count", "dynamic is true"),
        (["quant.weights.percentile=99"], "quant.weights.percentile", "quant.weights.observer is mse"),
        (["quant.weights.codebook=per_channel"], "quant.weights.codebook", "quant.weights.grid is uniform"),
        (["quant.weights.grid=codebook", "quant.weights.levels=128", "quant.weights.bits=2"], "quant.weights.bits",
         "quant.weights.levels is 128"),
        (["quant.weights.grid=apot", "quant.boundary=none", "quant.weights.observer=minmax"], "quant.weights.observer",
         "quant.weights.grid is apot; levels have no range"),
        (["quant.mixed.limit=3", "quant.weights.bits=2"], "quant.weights.bits", "quant.mixed.choices is (2, 3, 4, 8)"),
        (["calibration.manifest=m.csv", "calibration.strategy=herding"], "calibration.strategy", "manifest is m.csv"),
        (["data.augment.flip=true"], "data.augment.flip", "calibration.augment is false"),
        (["data.kind=digits", "data.root=x"], "data.root", "data.kind is digits"),
        (["data.kind=cifar10", "data.on_error=skip"], "data.on_error", "data.kind is cifar10"),
        (["data.preprocess.interpolation=nearest"], "data.preprocess.interpolation", "resize is not set"),
        (["export.onnx=false", "export.images=9"], "export.images", "export.onnx is false"),
        (["quant.placement=academic", "export.storage=int8"], "export.storage", "there is no deploy.onnx"),
        (["finetune.iterations=9", "finetune.epochs=2"], "finetune.epochs", "finetune.iterations is 9"),
        (["finetune.nesterov=false"], "finetune.nesterov", "finetune.optimizer is adamw"),
        (["finetune.label_smoothing=0.1"], "finetune.label_smoothing", "finetune.labels is 0.0"),
        (["finetune.weights=arq", "finetune.activations=fixed", "finetune.freeze=0.5"], "finetune.freeze", "arq"),
        (["model.options={a: 1}"], "model.options", "model.name is not set"),
        (["preset=adaround", "reconstruct.method=brecq"], "preset", "the recipe's own fields leave nothing"),
        (["preset=best", "reconstruct.method=none"], "preset", "the recipe's own fields leave nothing of it"),
    ],
)  # fmt: skip
def test_a_field_without_effect_is_named_with_its_reason(overrides: list[str], field: str, reason: str) -> None:
    found = idle(*overrides)
    assert list(found) == [field]
    assert reason in found[field]


@pytest.mark.parametrize(
    "overrides",
    [
        ["preset=qdrop", "reconstruct.drop=0.2", "reconstruct.scale_lr=1", "reconstruct.views=2"],
        ["preset=brecq", "reconstruct.scale_iterations=9", "reconstruct.scale_power=2"],
        ["quant.weights.rounding=gram", "reconstruct.cache=bfloat16", "reconstruct.never_worse=false"],
        ["calibration.strategy=best-of-random", "reconstruct.never_worse=false"],
        ["quant.bias_correction=empirical", "reconstruct.cache_limit=1"],
        ["quant.activations.dynamic=true", "quant.weights.grid=codebook", "quant.weights.clustering=second-order",
         "calibration.range_count=9"],
        ["data.augment.flip=true", "finetune={}"],
        ["data.augment.scale=[0.5, 1]", "data.augment.ratio=[1, 1]", "data.preprocess.interpolation=nearest",
         "data.preprocess.crop=8", "calibration.augment=true"],
        ["quant.weights.grid=codebook", "quant.weights.codebook=per_channel", "quant.weights.bits=3"],
        ["quant.weights.bits=8", "quant.weights.symmetric=true", "quant.bits.a=4"],
        ["quant.boundary_bits=16", "quant.weights.bits=8", "quant.activations.bits=8", "quant.boundary=brecq"],
        ["quant.mixed.limit=3", "quant.weights.bits=16"],
        ["train.momentum=0.5", "train.nesterov=false"],
    ],
)  # fmt: skip
def test_a_field_with_an_effect_is_not_warned_of(overrides: list[str]) -> None:
    assert idle(*overrides) == {}


@pytest.mark.parametrize("name", [*PRESETS, *shipped_recipes()])
def test_what_comes_along_sets_nothing_in_vain(name: str) -> None:
    recipe = make_recipe({"preset": name}) if name in PRESETS else load_recipe(name)
    assert idle_fields(recipe) == []


def test_a_section_of_another_command_is_left_out() -> None:
    both = ["train.iterations=9", "train.epochs=2", "reconstruct.drop=0.2"]
    assert list(idle(*both)) == ["reconstruct.drop"]
    assert list(idle(*both, command="train")) == ["train.epochs"]
    assert list(idle(*both, "calibration.manifest=m", "calibration.pool=9", command="select")) == ["calibration.pool"]
    assert list(idle("reconstruct.cache=bfloat16", "preset=qdrop", command="finetune")) == ["reconstruct.cache"]


def test_only_what_the_user_sets_counts(tmp_path: Path) -> None:
    """Not a preset's fields, nor those of a file with everything written out; included files and overrides do."""
    assert idle("preset=adaround-reference") == {}
    (tmp_path / "part.yaml").write_text("reconstruct: {drop: 0.2}")
    (tmp_path / "recipe.yaml").write_text("{include: [part.yaml], preset: brecq}")
    assert [f.field for f in idle_fields(load_recipe(tmp_path / "recipe.yaml"))] == ["reconstruct.drop"]
    found = load_recipe(tmp_path / "recipe.yaml", ["reconstruct.drop=null", "reconstruct.network.rise=0.2"])
    assert [f.field for f in idle_fields(found)] == ["reconstruct.network.rise"]
    (tmp_path / "whole.yaml").write_text(found.to_yaml())
    assert idle_fields(load_recipe(tmp_path / "whole.yaml")) == []
    again = load_recipe(tmp_path / "whole.yaml", ["reconstruct.drop=0.1"])
    assert [f.field for f in idle_fields(again)] == ["reconstruct.drop"]
    assert [f.field for f in idle_fields(changed(again, {"seed": 3, "reconstruct.views": 2}))] == ["reconstruct.drop"]
    python = Recipe(preset="brecq", reconstruct={"drop": 0.2})  # type: ignore[arg-type]
    assert [f.field for f in idle_fields(python)] == ["reconstruct.drop"]
    assert python.reconstruct.scale_lr == make_recipe({"preset": "brecq"}).reconstruct.scale_lr


# What changes of fields do to a network of four layers; benchmarks/idle_fields.py tries all fields under 30 recipes.
ACTS = {
    "qdrop": ["reconstruct.drop", "reconstruct.scale_lr", "reconstruct.beta"],
    "brecq": ["reconstruct.scale_power", "reconstruct.loss"],
    "dynamic": ["quant.activations.symmetric", "quant.residual_bits"],
    "levels": ["quant.weights.codebook", "quant.weights.observer"],
    "eight": ["quant.boundary_bits", "quant.weights.observer"],
    "arq": ["finetune.lr", "finetune.temperature"],
}
IDLE = {
    "qdrop": ["reconstruct.scale_power", "reconstruct.network.rise", "quant.weights.percentile"],
    "brecq": ["reconstruct.drop", "reconstruct.network.augment"],
    "dynamic": ["quant.activations.observer", "calibration.range_count", "reconstruct.iterations"],
    "levels": ["quant.weights.bits", "reconstruct.network.iterations", "data.preprocess.interpolation"],
    "eight": ["quant.boundary", "quant.weights.symmetric", "reconstruct.time"],
    "arq": ["finetune.scale_lr", "finetune.freeze", "finetune.nesterov", "finetune.label_smoothing"],
}
PAIRS = [(base, field, "acts") for base, fields in ACTS.items() for field in fields] + [
    (base, field, "warned") for base, fields in IDLE.items() for field in fields
]


@pytest.mark.parametrize(("base", "field", "expected"), PAIRS)
def test_the_table_says_what_runs_do(base: str, field: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SWEEP["OTHER"], "quant.boundary", "brecq")
    monkeypatch.setitem(SWEEP["OTHER"], "quant.boundary_bits", "16")
    monkeypatch.setitem(SWEEP["OTHER"], "reconstruct.time", "10s")
    assert SWEEP["verdict"](base, field) == expected


class Told(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def warnings(self) -> list[str]:
        return [text for text in self.notes if text.startswith("warning: ")]


FIELDS = {
    "model": {"name": "digits_resnet"},
    "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}, "root": "nowhere"},
    "calibration": {"count": 16, "batch_size": 8},
    "evaluation": {"count": 8},
    "export": {"onnx": False},
}
LINE = "data.root has no effect, because data.kind is digits"


def test_each_command_tells_each_field_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = Told()
    run = pipeline.quantize(FIELDS | {"preset": "adaround-reference", "reconstruct": {"method": "none"}}, reporter=told)
    assert told.warnings == [f"warning: {LINE}"]
    assert run.metrics["warnings"] == json.loads((run.folder / "metrics.json").read_bytes())["warnings"] == [LINE]
    assert (run.folder / "log.txt").read_text().count(LINE) == 1

    told = Told()
    keys = ["finetune.iterations=1", "finetune.batch_size=8", "finetune.epochs=3", "reconstruct.drop=0.1"]
    tuned = pipeline.finetune(run.folder, keys, reporter=told)
    assert [text.split()[1] for text in told.warnings] == ["reconstruct.drop", "finetune.epochs"]
    with pytest.raises(RecipeError, match=r"quant.weights.bits: is 4 in .*, and a run that is trained further keeps"):
        pipeline.finetune(tuned.folder, ["quant.weights.bits=2"])

    told = Told()
    pipeline.train(FIELDS | {"train": {"iterations": 1, "epochs": 2, "batch_size": 600}}, reporter=told)
    assert [text.split()[1] for text in told.warnings] == ["data.root", "train.epochs"]

    told = Told()
    pipeline.select(make_recipe(FIELDS), reporter=told)
    assert told.warnings == [f"warning: {LINE}"]

    assert [str(field) for field in pipeline.dry_run(make_recipe(FIELDS)).idle] == [LINE]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(FIELDS))
    assert main(["quantize", "recipe.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out.count(LINE) == 1
    assert main(["quantize", "recipe.yaml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == [LINE]
    assert main(["quantize", "recipe.yaml"]) == 0
    assert capsys.readouterr().out.count(f"warning: {LINE}") == 1


def test_a_comparison_warns_of_what_no_cell_heeds() -> None:
    fields = FIELDS | {"reconstruct": {"drop": 0.3, "scale_power": 3.0}}
    study = make_study(fields, ["qdrop", "adaround"], ["w4a4"], 1, None, [], Path("out"), 1)
    assert [found.field for found in idle_everywhere(study)] == ["data.root", "reconstruct.scale_power"]
