"""The recipe: its defaults, presets and overrides, the way through YAML, and the hints for wrong keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from calibquant.errors import RecipeError
from calibquant.recipe import PRESETS, Recipe, load_recipe, make_recipe


def value(recipe: Recipe, key: str) -> Any:
    """The field at a dotted key."""
    found: Any = recipe
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("quant.weights.bits", 4),
        ("quant.activations.bits", 4),
        ("quant.boundary", "qdrop"),
        ("quant.boundary_bits", 8),
        ("quant.residual_bits", 8),
        ("quant.placement", "integer"),
        ("calibration.count", 1024),
        ("data.on_error", "fail"),
        ("device", "auto"),
        ("runs", Path("runs")),
    ],
)
def test_defaults(key: str, expected: Any) -> None:
    assert value(Recipe(), key) == expected


def test_every_preset_is_a_recipe_that_changes_something() -> None:
    for name in PRESETS:
        recipe = make_recipe({"preset": name})
        assert recipe.preset == name
        assert name == "nearest" or recipe.model_copy(update={"preset": None}) != Recipe()


@pytest.mark.parametrize(
    ("tree", "overrides", "key", "expected"),
    [
        ({}, [], "quant.weights.bits", 4),
        ({"preset": "int8"}, [], "quant.weights.bits", 8),
        ({"preset": "int8", "quant": {"weights": {"bits": 6}}}, [], "quant.weights.bits", 6),
        ({"preset": "int8", "quant": {"weights": {"bits": 6}}}, [], "quant.weights.observer", "minmax"),
        ({"preset": "int8", "quant": {"weights": {"bits": 6}}}, ["quant.weights.bits=3"], "quant.weights.bits", 3),
        ({"preset": "int8"}, ["preset=qdrop-reference"], "quant.placement", "academic"),
        ({}, ["preset=int8", "quant.boundary=brecq"], "quant.boundary", "brecq"),
        ({}, ["preset=int8", "quant.boundary=brecq"], "quant.weights.symmetric", True),
        ({}, ["seed=1", "seed=2"], "seed", 2),
        ({}, [" seed =3"], "seed", 3),
        ({}, ["model.weights=a=b.pth"], "model.weights", Path("a=b.pth")),
        ({"model": {"weights": "w.pth"}}, ["model.weights=null"], "model.weights", None),
        ({}, ["data.preprocess.resize=[24, 32]"], "data.preprocess.resize", (24, 32)),
        ({}, ["data.preprocess.crop=224"], "data.preprocess.crop", 224),
        ({}, ["data.preprocess={mean: [0.5], std: [0.25]}"], "data.preprocess.std", (0.25,)),
        ({"model": {"options": {"a": 1}}}, ["model.options.b=2"], "model.options", {"a": 1, "b": 2}),
        ({}, ["threads=2"], "threads", 2),
    ],
)
def test_the_file_wins_over_the_preset_and_overrides_over_both(
    tree: dict[str, Any], overrides: list[str], key: str, expected: Any
) -> None:
    before = yaml.safe_dump(tree)
    assert value(make_recipe(tree, overrides), key) == expected
    assert yaml.safe_dump(tree) == before


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_a_recipe_written_as_yaml_is_the_same_when_read(name: str | None, tmp_path: Path) -> None:
    overrides = [
        "data.root=Bilder/größe", "data.preprocess.resize=[24, 32]", "quant.weights.bits=3", "model.options.width=0.5",
        "data.calibration_preprocess.crop=8",
    ]  # fmt: skip
    recipe = make_recipe({"preset": name}, overrides)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_the_yaml_writes_out_every_default() -> None:
    def leaves(tree: Any) -> int:
        return sum(leaves(v) for v in tree.values()) if isinstance(tree, dict) and tree else 1

    written = yaml.safe_load(Recipe().to_yaml())
    assert leaves(written) == leaves(Recipe().model_dump())
    assert written["quant"]["weights"]["granularity"] == "per_channel"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sead": 1}, r"recipe, sead: this key is unknown; did you mean 'seed'\?"),
        ({"quant": {"weights": {"bit": 2}}}, r"recipe, quant.weights.bit: .*; did you mean 'bits'\?"),
        ({"data": {"preprocess": {"interpolate": "nearest"}}}, "data.preprocess.interpolate: .*'interpolation'"),
        ({"data": {"calibration_preprocess": {"reszie": 3}}}, "data.calibration_preprocess.reszie: .*'resize'"),
        ({"zzz": 1}, "recipe, zzz: this key is unknown; known are calibration, data, "),
        ({"seed": "x", "quant": {"bitts": 2}}, "quant.bitts: this key is unknown"),
        ({"data": {"preprocess": {"resize": [1, 2, 3]}}}, r"recipe, data.preprocess.resize: .*; got \[1, 2, 3\]"),
        ({"data": {"preprocess": {"crop": [4, 0]}}}, r"recipe, data.preprocess.crop.1: .*or equal to 1; got 0"),
        ({"data": {"preprocess": {"std": [1.0, 0.0]}}}, r"recipe, data.preprocess.std.1: .*greater than 0; got 0.0"),
        ({"data": {"preprocess": {"std": [float("inf")]}}}, "data.preprocess.std.0: .*finite"),
        ({"data": {"preprocess": {"mean": [float("nan")]}}}, "data.preprocess.mean.0: .*finite"),
        ({"quant": {"weights": {"bits": True}}}, "quant.weights.bits: input should be 1, .*; got 'True'"),
        ({1: 2}, "keys should be strings"),
    ],
)
def test_an_invalid_field_is_named_with_the_nearest_key(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(tree)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 3  # type: ignore[misc]


def test_the_setting_is_the_short_form_of_the_bits() -> None:
    assert make_recipe({}, ["quant.weights.bits=2", "quant.activations.bits=16"]).setting == "W2A16"
