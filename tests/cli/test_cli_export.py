"""calibquant export, inspect, evaluate and bench on ONNX files, from the command line, on the digits."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

import calibquant
from calibquant.cli import main
from calibquant.recipe import make_recipe
from calibquant.studies import bench as study
from calibquant.zoo import build, save_weights

RECIPE = """\
model: {name: digits_resnet, weights: weights.safetensors}
data: {kind: digits, preprocess: {resize: 16, mean: [0.5], std: [0.5]}}
calibration: {count: 16}
evaluation: {count: 40}
quant: {weights: {observer: minmax}, activations: {observer: minmax}}
threads: 1
export: {onnx: false}
"""
RUN = "runs/digits_resnet-w4a4-001"

Command = Callable[..., str]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, weights, a run with its ONNX files, and a run without."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "recipe.yaml").write_text(RECIPE)
        torch.manual_seed(0)
        save_weights(build("digits_resnet"), "weights.safetensors")
        recipe = calibquant.load_recipe("recipe.yaml")
        exported = calibquant.quantize(recipe).folder
        assert main(["export", str(exported), "--json"]) == 0
        tree = recipe.model_dump()
        calibquant.quantize(make_recipe(tree, ["quant.weights.bits=8", "quant.activations.bits=8"]))
    return folder


@pytest.fixture
def command(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """command("export", RUN) -> standard output, in a copy of the site."""
    shutil.copytree(site, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = main(list(arguments))
        output = capsys.readouterr()
        assert (code, output.err) == (0, "")
        return output.out

    return run


def test_export_closes_with_files_parity_and_accumulators(command: Command) -> None:
    text = command("export", RUN)
    result = json.loads(command("export", RUN, "--json"))
    assert [line[:5] for line in text.splitlines() if line.startswith("[")] == ["[1/3]", "[2/3]", "[3/3]"]
    assert [row["file"] for row in result["files"]] == ["float.onnx", "fake_quant.onnx", "deploy.onnx", "parity.json"]
    for row in result["files"]:
        assert row["file"] in text
        assert f"{row['bytes']:,}" in text
        assert row["bytes"] == (Path(RUN) / row["file"]).stat().st_size
    assert "on 16 calibration images" in text
    assert re.search(r"deploy.onnx and the simulation: [\d,]+ of [\d,]+ codes differ", text)
    assert re.search(r"deploy.onnx and the executor: [\d,]+ of [\d,]+ codes differ", text)
    assert re.search(r"\d+ of 10 layers fit int16 accumulators, 10 int32", text)
    assert all(row["step"] in text for row in result["audit"])
    assert text.rstrip().endswith(f"Folder: {RUN}")


def test_export_takes_the_newest_run_and_overrides(command: Command) -> None:
    result = json.loads(command("export", "evaluation.count=8", "--json"))
    assert result["run"] == "runs/digits_resnet-w8a8-001"
    assert (Path(result["run"]) / "deploy.onnx").is_file()


def test_several_formats_go_to_a_folder(command: Command) -> None:
    text = command("export", RUN, "--format", "onnx, amct,record,packed,vectors", "--storage", "int8", "--out", "out")
    assert {p.name for p in Path("out").iterdir()} == {
        "float.onnx", "fake_quant.onnx", "deploy.onnx", "parity.json", "config.json", "record.txt", "record.json",
        "model.safetensors", "graph.json", "vectors",
    }  # fmt: skip
    assert "out/vectors/" in text
    assert Path("out/deploy.onnx").stat().st_size > (Path(RUN) / "deploy.onnx").stat().st_size


def test_inspect_shows_what_is_inside_a_file(command: Command) -> None:
    path = f"{RUN}/deploy.onnx"
    text, result = command("inspect", path), json.loads(command("inspect", path, "--json"))
    model = onnx.load(path)
    assert sum(result["nodes"].values()) == len(model.graph.node)
    assert (result["opset"], result["ir"]) == (model.opset_import[0].version, model.ir_version)
    assert result["bytes"] == Path(path).stat().st_size
    types = {row["type"]: row for row in result["tensors"]}
    assert types["UINT4"]["bytes"] == types["UINT4"]["values"] // 2
    assert sum(row["count"] for row in result["tensors"]) == len(model.graph.initializer)
    assert (result["integer"], result["stays_float"]) == (10, [])
    assert set(result["activation_bits"]) == {"4", "8"}
    assert "Convolutions and products on quantized inputs and weights: 10" in text
    assert f"opset {result['opset']}, IR {result['ir']}, by calibquant" in text
    assert all(op in text for op in result["nodes"])
    plain = json.loads(command("inspect", f"{RUN}/float.onnx", "--json"))
    assert (plain["integer"], len(plain["stays_float"])) == (0, 10)
    assert "Stays float: conv1, layer1_0_conv1" in command("inspect", f"{RUN}/float.onnx")


def test_inspect_a_run_lists_its_onnx_files(command: Command) -> None:
    result = json.loads(command("inspect", RUN, "--json"))
    assert result["onnx"] == {
        name: (Path(RUN) / name).stat().st_size for name in ("deploy.onnx", "fake_quant.onnx", "float.onnx")
    }
    text = command("inspect", RUN)
    assert all(name in text and f"{size:,}" in text for name, size in result["onnx"].items())
    assert json.loads(command("inspect", "--json"))["onnx"] == {}


def test_evaluate_shows_float_simulated_and_deployed_side_by_side(command: Command) -> None:
    path = f"{RUN}/deploy.onnx"
    text, result = command("evaluate", path), json.loads(command("evaluate", path, "--json"))
    header = next(line for line in text.splitlines() if "measure" in line)
    assert re.findall(r"[\w.]+", header) == ["measure", "float", "simulated", "deploy.onnx"]
    for key in ("float", "quantized", "deployed"):
        assert result[key]["count"] == 40
        assert f"{100 * result[key]['top1']:.2f}" in text
    assert "agreement with the simulation %" in text
    assert json.loads(command("evaluate", path, "evaluation.count=8", "--json"))["deployed"]["count"] == 8
    Path("alone").mkdir()
    shutil.copy(path, "alone/net.onnx")
    alone = json.loads(command("evaluate", "alone/net.onnx", "--recipe", "recipe.yaml", "--json"))
    assert alone["deployed"]["top1"] == result["deployed"]["top1"]
    assert "net.onnx" in command("evaluate", "alone/net.onnx", "--recipe", "recipe.yaml")


def test_bench_measures_the_networks_side_by_side(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "_cores", lambda: 2)
    monkeypatch.setattr(study, "SECONDS", 0.001)
    command("export", "runs/digits_resnet-w8a8-001")
    also = ["--also", "runs/digits_resnet-w8a8-001"]
    result = json.loads(command("bench", RUN, *also, "--rounds", "2", "--json"))
    networks = ["float", "W4A4 digits_resnet-w4a4-001", "W8A8 digits_resnet-w8a8-001", study.PEER]
    cases = [(name, threads, batch) for threads in (1, 2) for batch in (1, 8) for name in networks]
    assert [(t["network"], t["threads"], t["batch"]) for t in result["timings"]] == cases
    assert result["notes"] == []
    for timing in result["timings"]:
        assert timing["ratio_low"] <= timing["ratio"] <= timing["ratio_high"]
        assert timing["images_per_second"] == pytest.approx(1e3 * timing["batch"] / timing["milliseconds"])
    assert {t["ratio"] for t in result["timings"] if t["network"] == "float"} == {1.0}
    text = command("bench", RUN, "--rounds", "1")
    assert "medians of 1 rounds" in text
    assert study.PEER in text


FEW = ["--rounds", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "runs/none"], "runs/none: there is no such run folder; list"),
        (["export", RUN, "--format", "onxx"], "--format: 'onxx' is unknown; did you mean 'onnx'?"),
        (["export", RUN, "--format", ","], "--format: names no format; known are onnx, record"),
        (["export", RUN, "--storage", "int4"], "--storage: 'int4' is unknown; did you mean 'int8'?"),
        (["export", RUN, "--input", "3x32"], "--input: '3x32' is no size; give for example 3,224,224"),
        (["export", RUN, "--out", "recipe.yaml/x"], "recipe.yaml: is a file, not a folder; choose"),
        (["export", RUN, "data.kind=folder", "data.root=gone"], "data.preprocess.mean: has length 1 but"),
        (["export", "modle.name=x"], "modle: this key is unknown; did you mean 'model'?"),
        (["inspect", "none.onnx"], "none.onnx: cannot be read (No such file or directory); give the path of an ONNX"),
        (["inspect", "text.onnx"], "text.onnx: is not an ONNX file, or is damaged; give a file that"),
        (["inspect", "empty.onnx"], "empty.onnx: is not an ONNX file, or is damaged; give a file that"),
        (["inspect", "cut.onnx"], "cut.onnx: is not an ONNX file, or is damaged; give a file that"),
        (["evaluate", "none.onnx"], "none.onnx: cannot be read (No such file or directory); give the path of an ONNX"),
        (["evaluate", "text.onnx"], "text.onnx: is not an ONNX file, or is damaged (ONNX Runtime"),
        (["evaluate", "cut.onnx"], "cut.onnx: is not an ONNX file, or is damaged (ONNX Runtime"),
        (["evaluate", "alone/net.onnx"], "alone/recipe.yaml: there is no recipe beside the file; name one with --rec"),
        (["evaluate", "alone/net.onnx", "--recipe", "no.yaml"], "no.yaml: cannot be read (No such file or directory)"),
        (["evaluate", RUN, "--recipe", "recipe.yaml"], "evaluate, --recipe: is for an ONNX file; leave it out"),
        (["evaluate", f"{RUN}/deploy.onnx", "data.kind=null"], "data.kind: this field is required; use cifar10"),
        (["evaluate", f"{RUN}/deploy.onnx", "data.preprocess.resize=20"], "float.onnx: does not run in ONNX Runtime ("),
        (["bench", *FEW], "w8a8-001: holds no float.onnx; make it with calibquant export runs/digits_resnet-w8a8-001"),
        (["bench", RUN, "--also", "runs/none", *FEW], "runs/none: there is no such run folder; list"),
        (
            ["bench", RUN, "--rounds", "0"],
            "Invalid value for '--rounds': Input should be greater than or equal to 1; see",
        ),
    ],
)
def test_a_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.onnx").write_text("# not a network\n" * 20)
    Path("empty.onnx").write_bytes(b"")
    data = (Path(RUN) / "deploy.onnx").read_bytes()
    Path("cut.onnx").write_bytes(data[: len(data) // 2])
    Path("alone").mkdir()
    Path("alone/net.onnx").write_bytes(data)
    fails(arguments, message, capsys)


def test_a_damaged_file_of_a_run_is_one_line(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(RUN, "deploy.onnx")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for arguments in (["evaluate", str(path)], ["export", RUN], ["inspect", RUN], ["bench", RUN]):
        fails(arguments, f"{path}: is damaged (its hash is not the receipt's); restore it or quantize again", capsys)


@pytest.mark.parametrize("package", ["onnxruntime", "onnx"])
def test_a_missing_package_is_one_line(
    package: str, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    commands = [["export", RUN], ["inspect" if package == "onnx" else "evaluate", f"{RUN}/deploy.onnx"]]
    for arguments in commands:
        fails(arguments, f"{package}: is not installed; pip install", capsys)


def test_a_file_that_deviates_is_one_line_and_loses_nothing(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content()
    with monkeypatch.context() as patch:
        patch.setattr("calibquant.pipeline.exporting.fake_quant_onnx", lambda *_: b"nonsense")
        refused(["export", RUN], "fake_quant.onnx: was not written: is not an ONNX file, or is damaged", capsys)
    after = content()
    told = {Path(RUN, name) for name in ("parity.json", "receipt.json")}
    assert after.keys() == before.keys()  # the file of the first export too
    assert {path for path in after if after[path] != before[path]} == told
    parity = json.loads(after[Path(RUN, "parity.json")])
    assert list(parity["faults"]) == ["fake_quant.onnx"]
    command("export", RUN)
    assert content() == before


def content() -> dict[Path, bytes]:
    """Every file of the working directory."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def fails(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line of error that says `message`, and no file has changed."""
    before = content()
    refused(arguments, message, capsys)
    assert content() == before


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert output.err.startswith("error: ")
    assert message in output.err
    assert "Traceback" not in output.out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("export", ["--format", "--storage", "--out", "--input", "--json", "packed", "vectors", "newest run"]),
        ("bench", ["--also", "--rounds", "--json", "newest run"]),
        ("inspect", ["ONNX file"]),
        ("evaluate", ["--recipe", "ONNX file"]),
    ],
)
def test_help_names_every_argument(name: str, words: list[str], command: Command) -> None:
    text = command(name, "--help")
    assert [word for word in words if word not in text] == []
