"""Exporting a run: every file is checked before it is left, and the run stays whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import calibquant
from calibquant.errors import CalibQuantError, DataError, ModelError, RecipeError, RunFolderError
from calibquant.export.file_names import DEPLOY, FAKE_QUANT, FLOAT
from calibquant.export.session import open_session
from calibquant.pipeline import exporting
from calibquant.pipeline.deployed import evaluate_onnx
from calibquant.pipeline.exporting import PARITY, export_run
from calibquant.recipe import make_recipe
from calibquant.runfolder import newest_run, open_run
from calibquant.zoo import build, load_weights, save_weights

FIELDS: dict[str, Any] = {
    "model": {"name": "digits_resnet"},
    "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}},
    "calibration": {"count": 24},
    "evaluation": {"count": 40},
    "quant": {"weights": {"observer": "minmax"}, "activations": {"observer": "minmax"}},
    "threads": 1,
    "export": {"onnx": False},
}
FILES = {FLOAT, FAKE_QUANT, DEPLOY, PARITY}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    torch.manual_seed(0)
    save_weights(build("digits_resnet"), path)
    return path


@pytest.fixture(scope="module")
def made(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by what is special about them."""
    own = {
        "plain": [], "w2a2": ["quant.weights.bits=2", "quant.activations.bits=2"],
        "part": ["model.submodule=layer2"], "academic": ["quant.placement=academic"],
        "dynamic": ["quant.activations.dynamic=true"],
    }  # fmt: skip
    root = tmp_path_factory.mktemp("made")
    return {
        name: calibquant.quantize(
            make_recipe(FIELDS, [f"model.weights={weights}", f"runs={root / name}", *overrides])
        ).folder
        for name, overrides in own.items()
    }


@pytest.fixture
def run(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the plain run."""
    return copy(made["plain"], tmp_path)


def copy(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "runs" / run.name))


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_onnx_files_join_the_run(run: Path) -> None:
    before = content(run)
    result = export_run(run)
    after = content(run)
    assert set(after) - set(before) == FILES
    assert {n: after[n] for n in before if n != "receipt.json"} == {n: before[n] for n in before if n != "receipt.json"}
    listed = open_run(run).read_json("receipt.json")
    assert set(listed["files"]) >= FILES
    old = json.loads(before["receipt.json"])
    assert {k: v for k, v in listed.items() if k != "files"} == {k: v for k, v in old.items() if k != "files"}
    assert {row["file"]: row["bytes"] for row in result["files"]} == {name: len(after[name]) for name in FILES}
    stored = json.loads(after[PARITY])
    assert (stored["of"], stored["input"], stored["storage"]) == ("calibration images", [[1, 16, 16]], "packed")
    assert stored["files"] == json.loads(json.dumps(result["parity"]["files"]))
    assert result["parity"]["images"] == 24
    assert result["left_out"] == {}
    assert len(result["audit"]) > 0


def test_exporting_again_gives_the_same_bytes_and_touches_nothing(run: Path, tmp_path: Path) -> None:
    export_run(run)
    inode = (run / DEPLOY).stat().st_ino
    export_run(run)
    assert (run / DEPLOY).stat().st_ino == inode
    export_run(run, out=tmp_path / "new/out")
    for name in FILES:
        assert (tmp_path / "new/out" / name).read_bytes() == (run / name).read_bytes()


def test_storage_as_int8_is_larger_and_computes_the_same(run: Path, tmp_path: Path) -> None:
    export_run(run)
    export_run(run, storage="int8", out=tmp_path / "out")
    packed, plain = (run / DEPLOY).read_bytes(), (tmp_path / "out" / DEPLOY).read_bytes()
    assert len(packed) < 0.7 * len(plain)
    images = np.random.default_rng(0).random((3, 1, 16, 16), np.float32)
    assert np.array_equal(*(open_session("f", data, 1).run(images)[0] for data in (packed, plain)))


def test_the_float_file_is_the_network_that_was_quantized(run: Path, weights: Path) -> None:
    export_run(run)
    network = build("digits_resnet").eval()
    load_weights(network, weights)
    images = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        want = network(images).numpy()
    got = open_session(FLOAT, (run / FLOAT).read_bytes(), 1).run(images.numpy())[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("academic", "the academic placement leaves inputs"), ("dynamic", "dynamic activation ranges are not stored")],
)
def test_a_run_without_an_integer_network_says_why(
    name: str, reason: str, made: dict[str, Path], tmp_path: Path
) -> None:
    run = copy(made[name], tmp_path)
    result = export_run(run)
    assert set(content(run)) >= {FLOAT, FAKE_QUANT, PARITY}
    assert DEPLOY not in content(run)
    assert result["left_out"][DEPLOY].startswith(reason)
    assert json.loads((run / PARITY).read_text())["left_out"] == result["left_out"]
    assert result["audit"] is None


def test_a_part_is_exported_and_evaluated_in_its_network(made: dict[str, Path], tmp_path: Path) -> None:
    run = copy(made["part"], tmp_path)
    result = export_run(run)
    assert result["left_out"] == {}
    assert json.loads((run / PARITY).read_text())["input"] == [[16, 16, 16]]
    assert {file["decisions"] for file in result["parity"]["files"]} == {None}
    scores = evaluate_onnx(run / DEPLOY)
    assert scores["agreement_with_simulation"] > 0.9
    assert scores["quantized"]["top1"] == json.loads((run / "metrics.json").read_text())["quantized"]["top1"]


def test_weights_that_are_gone_or_others_leave_the_float_file_out(run: Path, weights: Path, tmp_path: Path) -> None:
    gone = export_run(run, overrides=[f"model.weights={tmp_path / 'gone.safetensors'}"])
    assert "gone.safetensors: there is no such file" in gone["left_out"][FLOAT]
    save_weights(build("digits_resnet"), tmp_path / "other.safetensors")
    other = export_run(run, overrides=[f"model.weights={tmp_path / 'other.safetensors'}"])
    assert other["left_out"] == {FLOAT: "the recipe's network is not the one that was quantized"}
    assert {row["file"] for row in other["files"]} == {FAKE_QUANT, DEPLOY, PARITY}


def live_run(folder: Path) -> Path:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 12 * 12, 3))
    images = calibquant.TensorImages(torch.rand(16, 3, 14, 14))
    recipe = {"runs": str(folder / "runs"), "calibration": {"count": 16}, "threads": 1, "export": {"onnx": False}}
    return calibquant.quantize(recipe, network, images).folder


def test_a_live_run_is_compared_on_random_images(tmp_path: Path) -> None:
    run = live_run(tmp_path)
    with pytest.raises(RunFolderError, match=r"no image size was found that its network takes; give .* --input 3,224"):
        export_run(run)
    result = export_run(run, shape=(3, 14, 14))
    assert result["of"] == "random images"
    assert result["left_out"][FLOAT].startswith("the run was made of a live network")
    again = export_run(run)
    assert again["parity"] == result["parity"], "the first export tells the size"
    export_run(run, ["vectors"])


def test_changed_or_missing_images_are_an_error(run: Path) -> None:
    manifest = (run / "manifest.csv").read_text().splitlines()
    for digest, name, message in (("0" * 64, None, "has changed"), (None, "digits#99999", "is not there")):
        row = manifest[1].split(",")
        row[0], row[1] = name or row[0], digest or row[1]
        open_run(run).add({"manifest.csv": "\n".join([manifest[0], ",".join(row), *manifest[2:], ""]).encode()})
        with pytest.raises(DataError, match=f"digits#.*: this calibration image {message}"):
            export_run(run)


def test_a_file_that_deviates_leaves_the_run_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(run)
    monkeypatch.setattr(exporting, "deploy_onnx", lambda *_: b"nonsense")
    with pytest.raises(RunFolderError, match=r"deploy.onnx: .*is not an ONNX file"):
        export_run(run)
    assert content(run) == before


def test_stored_forms_amct_and_vectors_go_to_a_folder(run: Path, tmp_path: Path) -> None:
    before = content(run)
    result = export_run(run, ["record", "packed", "amct", "vectors"], out=tmp_path / "out")
    assert set(content(tmp_path / "out")) == {
        "record.json", "record.txt", "model.safetensors", "graph.json", "config.json",
    }  # fmt: skip
    assert (tmp_path / "out/record.txt").read_bytes() == before["record.txt"]
    assert (tmp_path / "out/vectors/index.json").is_file()
    assert result["vectors"] == str(tmp_path / "out/vectors")
    assert content(run) == before
    export_run(run, ["vectors", "amct"])
    export_run(run, ["vectors", "amct"])
    assert (run / "vectors/index.json").is_file()
    assert "config.json" in open_run(run).read_json("receipt.json")["files"]


def test_the_amct_config_has_a_layer_for_each_record(run: Path) -> None:
    export_run(run, ["amct"])
    config = json.loads((run / "config.json").read_text())
    keys = [line.split('"')[1] for line in (run / "record.txt").read_text().splitlines() if "key:" in line]
    head = {"version": 1, "batch_num": 1, "activation_offset": True, "do_fusion": True, "skip_fusion_layers": []}
    assert list(config) == [*head, *keys]
    assert {key: config[key] for key in head} == head
    layer = config["layer1.0.conv1"]
    assert layer["quant_enable"] is True
    assert layer["activation_quant_params"]["num_bits"] == 4
    assert layer["activation_quant_params"]["act_algo"] == "ifmr"
    assert layer["weight_quant_params"] == {"num_bits": 4, "wts_algo": "arq_quantize", "channel_wise": True}
    assert config["fc"]["weight_quant_params"]["num_bits"] == 8


def test_layers_on_float_inputs_are_not_enabled_for_amct(made: dict[str, Path], tmp_path: Path) -> None:
    run = copy(made["academic"], tmp_path)
    export_run(run, ["amct"])
    config = json.loads((run / "config.json").read_text())
    assert config["conv1"] == {"quant_enable": False}
    assert config["layer1.0.conv1"]["quant_enable"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": ["onxx"]}, "calibquant export, --format: 'onxx' is unknown; did you mean 'onnx'"),
        ({"formats": []}, "calibquant export, --format: names no format; known are onnx, record"),
        ({"storage": "int4"}, "calibquant export, --storage: 'int4' is unknown; did you mean 'int8'"),
        ({"overrides": ["data.kind=folder", "data.root=/nowhere"]}, "data"),
    ],
)
def test_a_bad_argument_is_one_line(arguments: dict[str, Any], message: str, run: Path) -> None:
    before = content(run)
    with pytest.raises(CalibQuantError, match=message) as error:
        export_run(run, **arguments)
    assert "\n" not in str(error.value)
    assert content(run) == before


# --- evaluating a file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "w2a2"])
def test_a_file_in_a_run_is_measured_beside_float_and_simulation(
    name: str, made: dict[str, Path], tmp_path: Path
) -> None:
    run = copy(made[name], tmp_path)
    export_run(run)
    metrics = json.loads((run / "metrics.json").read_text())
    result = evaluate_onnx(run / DEPLOY)
    assert set(result) == {
        "file", "recipe", "run", "setting", "float", "quantized", "deployed", "agreement_with_simulation", "skipped",
    }  # fmt: skip
    assert result["quantized"]["top1"] == metrics["quantized"]["top1"]
    assert result["float"]["loss"] == pytest.approx(metrics["float"]["loss"], rel=1e-4)
    assert result["deployed"]["agreement"] is not None
    assert result["agreement_with_simulation"] >= 0.95
    fake = evaluate_onnx(run / FAKE_QUANT)
    assert fake["deployed"]["loss"] == pytest.approx(metrics["quantized"]["loss"], rel=1e-3)
    (run / FLOAT).unlink()
    listed = json.loads((run / "receipt.json").read_text())
    del listed["files"][FLOAT]
    (run / "receipt.json").write_text(json.dumps(listed))
    assert evaluate_onnx(run / DEPLOY)["float"]["top1"] == result["float"]["top1"], "from the recipe's network"


def test_a_file_elsewhere_needs_a_recipe(run: Path, tmp_path: Path) -> None:
    export_run(run)
    file = tmp_path / "elsewhere.onnx"
    shutil.copy(run / DEPLOY, file)
    with pytest.raises(RecipeError, match=r"recipe.yaml: there is no recipe beside the file; name one with --recipe"):
        evaluate_onnx(file)
    result = evaluate_onnx(file, run / "recipe.yaml", ["evaluation.count=8"])
    assert (set(result), result["deployed"]["count"]) == ({"file", "recipe", "deployed", "skipped"}, 8)
    shutil.copy(run / "recipe.yaml", tmp_path / "recipe.yaml")
    assert evaluate_onnx(file)["deployed"]["count"] == 40


def test_images_of_another_size_are_one_line(run: Path) -> None:
    export_run(run)
    with pytest.raises(ModelError, match=r"\.onnx: does not run in ONNX Runtime \(.*; give images of the size"):
        evaluate_onnx(run / DEPLOY, None, ["data.preprocess.resize=20"])


def test_exporting_makes_no_run_newer(made: dict[str, Path], tmp_path: Path) -> None:
    older = copy(made["plain"], tmp_path)
    newer = copy(made["w2a2"], tmp_path)
    export_run(older)
    assert newest_run(tmp_path / "runs") == newer
