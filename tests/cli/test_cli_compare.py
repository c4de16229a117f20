"""calibquant compare from the command line, on the digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibquant.cli import main
from calibquant.zoo import build, save_weights

RECIPE = """\
model: {name: digits_resnet, weights: weights.safetensors}
data: {kind: digits, preprocess: {resize: 16, mean: [0.5], std: [0.5]}}
calibration: {count: 16}
evaluation: {count: 40}
quant: {weights: {observer: minmax}, activations: {observer: minmax}}
threads: 1
"""


@pytest.fixture(autouse=True)
def _site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a recipe and weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    Path("recipe.yaml").write_text(RECIPE)
    save_weights(build("digits_resnet"), "weights.safetensors")


def test_it_closes_with_the_table_and_json_is_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "recipe.yaml", "seed=5", "--methods", "nearest, captq", "--bits", "w8a8", "--seeds", "2"]
    arguments += ["reconstruct.iterations=2"]
    assert main([*arguments, "--json"]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert output.err == ""
    assert result == json.loads(Path("runs/compare/compare.json").read_text())
    assert (result["seeds"], list(result["methods"])) == ([5, 6], ["nearest", "captq"])
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("[")] == [
        "[1/4] nearest W8A8 seed 5", "[2/4] captq W8A8 seed 5", "[3/4] nearest W8A8 seed 6", "[4/4] captq W8A8 seed 6",
    ]  # fmt: skip
    assert "boundary qdrop (nearest), captq (captq)" in text
    row = result["table"][0]["top1"]
    assert f"{100 * row['mean']:.2f} ± {100 * row['sd']:.2f} (2)" in text
    assert text.rstrip().endswith("Tests and costs: runs/compare/compare.md")


GOOD = ["--methods", "nearest,qdrop", "--bits", "w4a4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.yaml"], "compare, methods: none is given; give at least one of methods"),
        (["recipe.yaml", "--methods", "nearest"], "compare, bits: none is given; give at least one of bits"),
        (GOOD, "Missing argument 'recipe'; see calibquant --help"),
        (["nowhere.yaml", *GOOD], "nowhere.yaml: cannot be read (No such file or directory); give the path of a"),
        (["recipe.yaml", "--methods", "qdorp", "--bits", "w4a4"], "methods: 'qdorp' is unknown; did you mean 'qdrop'?"),
        (["recipe.yaml", "--preset", "aciq"], "preset: 'aciq' is unknown; known are aciq-ablation"),
        (["recipe.yaml", "--methods", ",", "--bits", "w4a4"], "methods: none is given; give at least one of methods"),
        (["recipe.yaml", "--methods", "nearest", "--bits", "w9a9"], "bits: 'w9a9' asks for 9 bits, which no grid has"),
        (["recipe.yaml", *GOOD, "--seeds", "three"], "compare, seeds: 'three' is no number; give how many, or a list"),
        (["recipe.yaml", *GOOD, "--seeds", "1,x"], "compare, seeds: '1,x' is no number; give how many, or a list"),
        (["recipe.yaml", *GOOD, "--seeds", "3,3"], "compare, seeds: '3' is given twice; give each once"),
        (["recipe.yaml", *GOOD, "--seeds", "0"], "compare, seeds: 0 is no number of seeds; give 1 to 100"),
        (["recipe.yaml", *GOOD, "--baseline", "brecq"], "baseline: 'brecq' is not compared; known are nearest, qdrop"),
        (["recipe.yaml", *GOOD, "--jobs", "0"], "compare, jobs: 0 cells at a time is no number of cells; use 1"),
        (["recipe.yaml", "preset=int8", *GOOD], "override 'preset=int8': --methods sets this field; leave the"),
        (["recipe.yaml", "data.kind=null", *GOOD], "recipe, data.kind: this field is required; use cifar10, digits"),
        (["recipe.yaml", "reconstruct.method=qdrop", *GOOD],
         "recipe.yaml, reconstruct.method: hides what the method 'nearest' does; leave reconstruct.method out of"),
        (["recipe.yaml", *GOOD, "--out", "recipe.yaml/x"], "recipe.yaml: is a file, not a folder; choose"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in Path().iterdir())
    assert main(["compare", *arguments]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("error: ")
    assert message in line
    assert sorted(path.name for path in Path().iterdir()) == before


def test_help_names_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    words = ["recipe", "overrides", "--methods", "--bits", "--seeds", "--baseline", "--out", "--jobs", "--json"]
    assert [word for word in words if word not in text] == []
