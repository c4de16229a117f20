"""Recipes made of several files, and those that come with the package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from calibquant import zoo
from calibquant.cli import main
from calibquant.errors import RecipeError
from calibquant.recipe import load_recipe, make_recipe
from calibquant.recipe.catalog import catalog
from calibquant.recipe.shipped import FRAGMENTS, shipped_folder, shipped_recipes

ROOT = Path(__file__).parents[1]
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write("parts/a.yaml", "seed: 3") -> the file, in the test's own folder."""

    def put(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return put


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


def test_later_wins_from_default_to_override(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field stands in all layers from some layer on; the last of these must be found."""
    write("parts/deep.yaml", "{seed: 2, threads: 2, quant: {residual_bits: 2, boundary_bits: 2, weights: {bits: 2}}}")
    write("parts/one.yaml", "{include: [deep.yaml], threads: 3, quant: {residual_bits: 3, boundary_bits: 3, weights: "
          "{bits: 3}}}")  # fmt: skip
    write("two.yaml", "{quant: {residual_bits: 4, boundary_bits: 4, weights: {bits: 4}}}")
    path = write("recipe.yaml", "{include: [parts/one.yaml, two.yaml], quant: {boundary_bits: 5, weights: {bits: 5}}}")
    monkeypatch.chdir(tmp_path / "parts")  # includes are beside their file, wherever one stands
    recipe = load_recipe(path, ["quant.weights.bits=6"])
    assert (recipe.seed, recipe.threads) == (2, 3)
    assert (recipe.quant.residual_bits, recipe.quant.boundary_bits, recipe.quant.weights.bits) == (4, 5, 6)
    assert recipe.calibration == make_recipe({}).calibration


def test_no_preset_wins_over_what_a_file_says(write: Write) -> None:
    write("method.yaml", "{preset: int8, quant: {weights: {bits: 6}}}")
    write("bits.yaml", "{quant: {activations: {bits: 5}}}")
    recipe = load_recipe(write("recipe.yaml", "include: [bits.yaml, method.yaml]"))
    assert (recipe.preset, recipe.setting, recipe.quant.weights.observer) == ("int8", "W6A5", "minmax")
    own = load_recipe(write("own.yaml", "{include: [recipe.yaml], preset: qdrop}"))
    assert (own.preset, own.setting, own.reconstruct.method) == ("qdrop", "W6A5", "qdrop")
    assert own.quant.weights.observer == "mse", "of two presets the last alone counts"
    assert load_recipe(write("none.yaml", "{include: [recipe.yaml], preset: null}")).preset is None


def test_the_effective_recipe_stands_alone(write: Write, tmp_path: Path) -> None:
    write("part.yaml", "{preset: qdrop, seed: 4}")
    recipe = load_recipe(write("recipe.yaml", "include: [part.yaml]"))
    assert "include" not in yaml.safe_load(recipe.to_yaml())
    assert load_recipe(write("alone.yaml", recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"recipe": r'include: ["a\0.yaml"]'}, r"a\\x00.yaml: cannot be read \(the path holds a NUL byte\); correct"),
        ({"recipe": "include: [gone.yaml]"}, r"gone.yaml: cannot be .*\(No such .*; correct include in .*recipe.yaml$"),
        ({"recipe": "include: part.yaml"}, r"recipe.yaml, include: is no list of files; write for example include: "),
        ({"recipe": "include: [3]"}, "recipe.yaml, include: is no list of files"),
        ({"recipe": "include: [recipe.yaml]"}, r"yaml, include: goes in a circle \(.*recipe.yaml -> .*recipe.yaml\)"),
        ({"recipe": "include: [a.yaml]", "a": "include: [b.yaml]", "b": "include: [a.yaml]"}, "b.yaml, include: goes"),
        ({"recipe": "include: [a.yaml]", "a": "- 1"}, "a.yaml: is not a recipe; it must hold fields"),
        ({"recipe": "include: [a.yaml]", "a": "a: b: c"}, r"a.yaml: is not valid YAML \(line 1: .*\); correct"),
        ({"recipe": "include: [a.yaml]", "a": "{quant: {weights: {bit: 2}}}"},
         r"a.yaml, quant.weights.bit: this key is unknown; did you mean 'bits'\?"),
        ({"recipe": "{include: [a.yaml], seed: 1}", "a": "{sed: 1}"}, "a.yaml, sed: this key is unknown; did you mean"),
        ({"recipe": "include: [a.yaml, b.yaml]", "a": "seed: -1", "b": "{}"}, "a.yaml, seed: .*or equal to 0; got"),
        ({"recipe": "include: [a.yaml]", "a": "preset: qdrp"}, "a.yaml, preset: 'qdrp' is unknown; did you mean"),
        ({"recipe": "{include: [a.yaml], quant: {weights: {granularity: per_tensor}}}",
          "a": "quant: {weights: {allocation: banner}}"}, "a.yaml, quant.weights.allocation: shares bits among"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_the_file_it_stands_in(files: dict[str, str], message: str, write: Write) -> None:
    for name, text in files.items():
        write(f"{name}.yaml", text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write("recipe.yaml", files["recipe"]))
    assert "\n" not in str(caught.value)


def test_an_override_is_not_laid_at_a_fragments_door(write: Write) -> None:
    write("part.yaml", "seed: 3")
    with pytest.raises(RecipeError, match=r"recipe.yaml, seed: .*; got -1"):
        load_recipe(write("recipe.yaml", "include: [part.yaml]"), ["seed=-1"])


@pytest.mark.parametrize(("tree", "overrides"), [({"include": ["a.yaml"]}, []), ({}, ["include=[a.yaml]"])])
def test_include_is_for_files(tree: dict[str, Any], overrides: list[str]) -> None:
    with pytest.raises(RecipeError, match="recipe, include: is known in recipe files alone; write it"):
        make_recipe(tree, overrides)


def test_one_file_may_be_included_by_two(write: Write) -> None:
    write("base.yaml", "seed: 8")
    write("a.yaml", "include: [base.yaml]")
    write("b.yaml", "include: [base.yaml]")
    assert load_recipe(write("recipe.yaml", "include: [a.yaml, b.yaml]")).seed == 8


SHIPPED = shipped_recipes()
ENTRIES = {entry.name: entry for entry in catalog()}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_that_comes_along_is_complete(name: str) -> None:
    """Valid, of a network of the zoo, of images, and described."""
    recipe = load_recipe(name)
    assert recipe.model.name in zoo.names()
    assert recipe.data.kind is not None
    assert ENTRIES[name].description.endswith(".")
    assert ENTRIES[name].path == ROOT / "configs" / f"{name}.yaml"


def test_no_two_recipes_are_equal() -> None:
    seen: dict[str, list[str]] = {}
    for name in SHIPPED:
        plain = load_recipe(name).model_copy(update={"preset": None})
        seen.setdefault(plain.to_yaml(), []).append(name)
    assert [names for names in seen.values() if len(names) > 1] == []


def test_every_fragment_is_used() -> None:
    files = [yaml.safe_load(path.read_text()) | {"at": path.parent} for path in shipped_folder().rglob("*.yaml")]
    used = {(file["at"] / name).resolve() for file in files for name in file.get("include", [])}
    assert set((shipped_folder() / FRAGMENTS).rglob("*.yaml")) - used == set()


NETWORKS = ("resnet18", "resnet50", "resnet101", "mobilenet_v2", "regnet_x_600mf", "mnasnet2_0")
REFERENCE = [
    f"reference/{m}/{s}/{n}" for m in ("captq", "qdrop") for s in ("w4a4", "w3a3", "w2a4", "w2a2") for n in NETWORKS
]


@pytest.mark.parametrize("name", [*REFERENCE, *(f"reference/brecq/w2a2/{n}" for n in NETWORKS)])
def test_a_reference_recipe_is_its_preset_on_imagenet(name: str) -> None:
    """Beside network, data and bits nothing differs from the preset, but for the order: folders are sorted by class."""
    _, method, setting, network = name.split("/")
    recipe, preset = load_recipe(name), make_recipe({"preset": f"{method}-reference"})
    assert (recipe.setting.lower(), recipe.model.name) == (setting, network)
    found, expected = flat(recipe.model_dump()), flat(preset.model_dump())
    differing = {key for key in found if found[key] != expected.get(key)} - {"calibration.strategy"}
    groups = ("model.", "data.", "quant.weights.bits", "quant.activations.bits", "evaluation.batch_size")
    assert [key for key in differing if not key.startswith(groups)] == []


@pytest.mark.parametrize(("setting", "network"), [(s, n) for s in ("w4a4", "w3a3", "w2a4", "w2a2") for n in NETWORKS])
def test_the_experiments_of_the_papers(setting: str, network: str) -> None:
    """1,024 images of the training folder, 20,000 iterations, CaPTQ's ends, the network's own regularizer."""
    recipe = load_recipe(f"{setting}/{network}")
    assert (recipe.setting.lower(), recipe.model.name, recipe.preset) == (setting, network, "captq")
    assert (recipe.calibration.count, recipe.calibration.strategy) == (1024, "random")
    assert (recipe.reconstruct.iterations, recipe.reconstruct.regularizer) == (20_000, None)
    assert (recipe.quant.boundary, recipe.quant.boundary_bits, recipe.quant.placement) == ("captq", 8, "integer")
    assert (recipe.data.calibration, recipe.data.evaluation) == ("train", "val")
    assert (recipe.data.preprocess.resize, recipe.data.preprocess.crop) == (256, 224)


def test_a_name_stands_for_its_file_unless_there_is_one(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("w2a2/resnet18.yaml") == load_recipe(ROOT / "configs/w2a2/resnet18.yaml")
    write("digits", "seed: 11")
    assert load_recipe("digits").seed == 11
    with pytest.raises(RecipeError, match=r"w9a9/resnet18: cannot be read .* or a name that calibquant recipes lists"):
        load_recipe("w9a9/resnet18")


def test_the_command_lists_and_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(SHIPPED)
    assert main(["recipes", "RESNET18", "w2a2", "captq"]) == 0
    text = capsys.readouterr().out
    (row,) = [row for row in rows if row["name"] == "w2a2/resnet18"]
    assert (row["method"], row["calibration"], row["published"]) == ("captq", 1024, "top-1 55.26 (float 71.01), CaPTQ")
    assert "2 recipes" in text
    assert row["description"] in text
    assert row["published"] in text
    assert main(["recipes", "w2a2/resnet18", "--show"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(load_recipe("w2a2/resnet18").to_yaml())
    assert main(["recipes", "w2a2/resnet18", "--show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == load_recipe("w2a2/resnet18").model_dump(mode="json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18", "w9a9"], "calibquant recipes: no recipe is of 'resnet18 w9a9'; without words it lists all"),
        (["--show"], "calibquant recipes, --show: shows one recipe; give one name"),
        (["w2a2", "w4a4", "--show"], "calibquant recipes, --show: shows one recipe; give one name"),
        (["w2a2/resnet-18", "--show"], "w2a2/resnet-18: cannot be read"),
    ],
)
def test_what_cannot_be_listed_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", *arguments]) == 1
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


def test_a_built_package_brings_its_recipes(tmp_path: Path) -> None:
    """What setup.py builds from a copy of the sources holds every file of configs/."""
    pytest.importorskip("setuptools")
    for name in ("calibquant/__init__.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", "out"], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    built = tmp_path / "out/calibquant/configs"
    assert {p.relative_to(built) for p in built.rglob("*.yaml")} == {
        p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")
    }


def test_an_included_link_to_itself_is_refused(write: Write) -> None:
    path = write("recipe.yaml", "include: [loop.yaml]")
    (path.parent / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(RecipeError, match=r"loop\.yaml: cannot be read \(.*\); correct include in .*recipe\.yaml$"):
        load_recipe(path)
