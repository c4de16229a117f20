"""The commands from end to end, on the digits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import calibquant
from calibquant import pipeline, zoo
from calibquant.cli import main
from calibquant.data import batches
from calibquant.studies import digits

RECIPE: dict[str, Any] = {
    "model": {"name": "digits_resnet", "weights": "weights.safetensors"},
    "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}},
    "calibration": {"count": 32},
    "evaluation": {"count": 64},
    "threads": 1,
}
METRICS = {
    "setting", "placement", "boundary", "calibration_images", "evaluated_on", "float", "quantized", "size", "coverage",
    "seconds", "rounding", "layers", "reconstruction", "units", "feature_errors", "equalization", "corrections",
    "mixed", "skipped", "deployed", "parity",
}  # fmt: skip
OF_FILES = {"file", "code_entropy", "compressed_codes"}  # sizes that are known once there is a file
SCORES = {"count", "top1", "top1_interval", "top5", "loss", "macro", "agreement", "agreement_interval"}
BYTE_IDENTICAL = ("model.safetensors", "graph.json", "record.json", "record.txt", "manifest.csv", "recipe.yaml")

Command = Callable[..., str]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's network after one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "EPOCHS", 1)
        return digits.train_digits(tmp_path_factory.mktemp("weights") / "weights.safetensors", seed=3)


@pytest.fixture
def command(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """command("quantize", "recipe.yaml") -> standard output, in a folder with a recipe and its weights."""
    (tmp_path / "weights.safetensors").write_bytes(weights.read_bytes())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = main(list(arguments))
        output = capsys.readouterr()
        assert (code, output.err) == (0, "")
        return output.out

    return run


def runs() -> list[str]:
    return sorted(p.name for p in Path("runs").iterdir()) if Path("runs").is_dir() else []


def test_quantize_leaves_a_run_and_closes_with_a_table(command: Command) -> None:
    text = command("quantize", "recipe.yaml")
    assert runs() == ["digits_resnet-w4a4-001"]
    metrics = json.loads(Path("runs/digits_resnet-w4a4-001/metrics.json").read_text())
    steps = [line for line in text.splitlines() if line.startswith("[")]
    assert [line[:5] for line in steps] == [f"[{i}/7]" for i in range(1, 8)]
    assert f"{100 * metrics['quantized']['top1']:.2f}" in text
    assert "64 evaluation images, 32 for calibration; placement integer, boundary qdrop" in text
    assert text.rstrip().endswith("Run folder: runs/digits_resnet-w4a4-001")


def test_quantize_json_is_the_run_and_its_metrics(command: Command) -> None:
    result = json.loads(command("quantize", "recipe.yaml", "--json"))
    assert set(result) == {"run"} | METRICS
    assert set(result["quantized"]) >= SCORES
    assert (result["calibration_images"], result["quantized"]["count"]) == (32, 64)
    assert result == {"run": result["run"]} | json.loads((Path(result["run"]) / "metrics.json").read_text())


def test_overrides_win_and_are_stored(command: Command) -> None:
    result = json.loads(command(
        "quantize", "recipe.yaml", "quant.weights.bits=2", "quant.activations.bits=3", "seed=7", "calibration.count=16",
        "evaluation.count=8", "runs=elsewhere", "--json",
    ))  # fmt: skip
    assert (result["run"], result["setting"]) == ("elsewhere/digits_resnet-w2a3-001", "W2A3")
    assert (result["calibration_images"], result["quantized"]["count"]) == (16, 8)
    assert calibquant.load_recipe(Path(result["run"]) / "recipe.yaml").seed == 7


def test_a_dry_run_shows_the_plan_and_writes_nothing(command: Command) -> None:
    before = sorted(p.name for p in Path().iterdir())
    text = command("quantize", "recipe.yaml", "--dry-run")
    plan = json.loads(command("quantize", "recipe.yaml", "--dry-run", "--json"))
    assert sorted(p.name for p in Path().iterdir()) == before
    expected = {"coverage", "size", "calibration_images", "estimated_seconds", "estimated_peak_bytes", "mixed_tensors",
                "warnings"}  # fmt: skip
    assert set(plan) == expected
    assert plan["calibration_images"] == 32
    assert all(row["node"] in text for row in plan["coverage"])
    assert "32 calibration images; about" in text
    assert f"{plan['size']['packed'] / 1e3:.1f} kB packed" in text
    assert plan["estimated_seconds"] > 0
    assert plan["estimated_peak_bytes"] > plan["size"]["float32"]
    learning = json.loads(
        command(
            "quantize", "recipe.yaml", "--dry-run", "--json", "reconstruct.method=qdrop", "reconstruct.batch_size=512"
        )
    )
    assert learning["estimated_seconds"] > 5 * plan["estimated_seconds"]  # 2,000 steps of 32 images a unit
    assert learning["estimated_peak_bytes"] > plan["estimated_peak_bytes"]
    long = json.loads(command("quantize", "recipe.yaml", "--dry-run", "--json", "finetune.epochs=500"))
    assert long["estimated_seconds"] > 5 * plan["estimated_seconds"]
    assert long["estimated_peak_bytes"] > plan["estimated_peak_bytes"]
    done = json.loads(command("quantize", "recipe.yaml", "--json"))
    assert done["coverage"] == plan["coverage"]
    assert {k: v for k, v in done["size"].items() if k not in OF_FILES} == plan["size"]


def test_quantizing_twice_gives_two_runs_with_the_same_bytes(command: Command) -> None:
    first, second = (Path(json.loads(command("quantize", "recipe.yaml", "--json"))["run"]) for _ in range(2))
    assert runs() == ["digits_resnet-w4a4-001", "digits_resnet-w4a4-002"]
    assert [n for n in BYTE_IDENTICAL if (first / n).read_bytes() != (second / n).read_bytes()] == []


@pytest.mark.parametrize("overrides", [[], ["quant.placement=academic", "quant.weights.bits=2"], ["preset=int8"],
                                       ["quant.activations.dynamic=true"], ["model.submodule=layer2"]])  # fmt: skip
def test_evaluate_gives_what_the_run_measured(overrides: list[str], command: Command) -> None:
    made = json.loads(command("quantize", "recipe.yaml", "--json", *overrides))
    result = json.loads(command("evaluate", made["run"], "--json"))
    assert (result["run"], result["setting"]) == (made["run"], made["setting"])
    measured = {key: value for key, value in made["quantized"].items() if not key.startswith("agreement")}
    assert {key: result["quantized"][key] for key in measured} == measured


@pytest.mark.parametrize("overrides", [{}, {"placement": "academic"}, {"activations": {"dynamic": True}}])
def test_a_loaded_network_gives_the_same_logits_bit_for_bit(
    overrides: dict[str, Any], command: Command
) -> None:  # the command fixture is the folder with the weights
    run = pipeline.quantize({**RECIPE, "quant": overrides})
    images = calibquant.open_images(calibquant.load_recipe(run.folder / "recipe.yaml").data, "evaluation")
    batch = next(batches(images, 50)).images
    with torch.inference_mode():
        assert torch.equal(calibquant.load(run.folder)(batch), run.model(batch))


def test_evaluate_and_inspect_take_the_newest_run_and_name_it(command: Command) -> None:
    command("quantize", "recipe.yaml")
    command("quantize", "recipe.yaml", "quant.weights.bits=8", "quant.activations.bits=8")
    assert json.loads(command("evaluate", "--json"))["run"] == "runs/digits_resnet-w8a8-001"
    assert json.loads(command("evaluate", "evaluation.count=8", "--json"))["quantized"]["count"] == 8
    assert "runs/digits_resnet-w8a8-001" in command("evaluate")
    assert "runs/digits_resnet-w8a8-001: W8A8, placement integer" in command("inspect")


def test_evaluate_a_recipe_measures_its_float_network(command: Command) -> None:
    result = json.loads(command("evaluate", "recipe.yaml", "evaluation.count=40", "--json"))
    assert (set(result), result["model"], result["float"]["count"]) == (
        {"model", "float", "skipped"},
        "digits_resnet",
        40,
    )
    made = json.loads(command("quantize", "recipe.yaml", "--json"))
    again = json.loads(command("evaluate", "recipe.yaml", "--json"))
    assert again["float"]["top1"] == made["float"]["top1"]
    assert f"{100 * made['float']['top1']:.2f}" in command("evaluate", "recipe.yaml")


@pytest.mark.parametrize("target", ["run", "recipe.yaml", "run/deploy.onnx"])
def test_evaluate_by_class(target: str, command: Command) -> None:
    Path(json.loads(command("quantize", "recipe.yaml", "--json"))["run"]).rename("run")
    asked = (target, "--per-class", "--confusion", "out/confusion.csv")
    result = json.loads(command("evaluate", *asked, "--json"))
    scores = result.get("deployed") or result.get("quantized") or result["float"]
    assert sum(row["images"] for row in result["classes"]) == scores["labelled"] == 64
    hits = sum(row["images"] * row["accuracy"] for row in result["classes"] if row["images"])
    assert hits / 64 == pytest.approx(scores["top1"])
    header, *rows = Path("out/confusion.csv").read_text().splitlines()
    assert header.split(",")[1:] == [row.split(",")[0] for row in rows] == [str(i) for i in range(10)]
    assert result["confusion"]["file"] == "out/confusion.csv"
    worst = result["confusion"]["most_confused"][0]
    assert rows[int(worst["label"])].split(",")[1 + int(worst["prediction"])] == str(worst["images"])
    text = command("evaluate", *asked)
    assert all(word in text for word in ("accuracy (recall) %", "Confused most", "matrix: out/confusion.csv"))
    assert set(json.loads(command("evaluate", target, "--json"))) == set(result) - {"classes", "confusion"}


@pytest.mark.parametrize("file", ["", "model.safetensors", "graph.json"])
def test_inspect_shows_bits_bytes_and_ranges(file: str, command: Command) -> None:
    made = json.loads(command("quantize", "recipe.yaml", "--json"))
    target = str(Path(made["run"]) / file)
    text, result = command("inspect", target), json.loads(command("inspect", target, "--json"))
    assert set(result) == {
        "run", "size", "coverage", "record", "layers", "units", "feature_errors", "onnx", "checked", "unlisted",
    }  # fmt: skip
    for key in ("coverage", "layers", "units", "feature_errors"):
        assert result[key] == made[key]
    assert Path(result["run"]) == Path(made["run"])
    assert all(row["after"] in text and f"{100 * row['nearest']:.2f}" in text for row in made["feature_errors"])
    assert result["size"] == {key: value for key, value in made["size"].items() if key not in OF_FILES}
    assert f"{made['size']['file']:,}" in text
    assert all(row["node"] in text for row in made["coverage"])


@pytest.mark.parametrize("with_weights", [True, False])
def test_a_part_of_a_network_is_quantized_and_evaluated(with_weights: bool, command: Command) -> None:
    overrides = ["model.submodule=layer2"] + ([] if with_weights else ["model.weights=null"])
    made = json.loads(command("quantize", "recipe.yaml", "--json", *overrides))
    whole = json.loads(command("quantize", "recipe.yaml", "--json"))
    assert 0 < len(made["coverage"]) < len(whole["coverage"])
    assert made["size"]["float32"] < whole["size"]["float32"]
    result = json.loads(command("evaluate", made["run"], "--json"))
    assert (result["quantized"]["top1"], result["quantized"]["loss"]) == (
        made["quantized"]["top1"],
        made["quantized"]["loss"],
    )


def test_a_quantized_part_is_not_put_into_another_network(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(command("quantize", "recipe.yaml", "--json", "model.submodule=layer2"))
    zoo.save_weights(zoo.build("digits_resnet"), "weights.safetensors")
    assert main(["evaluate", made["run"]]) == 1
    assert "weights.safetensors: is not the file that the run was made with" in capsys.readouterr().err


def test_demo_trains_once_and_quantizes_four_times(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "EPOCHS", 1)
    monkeypatch.setattr(digits, "FIELDS", digits.FIELDS | {"calibration": {"count": 32}, "evaluation": {"count": 64}})
    monkeypatch.setattr(digits, "SHORT", {"iterations": 3})
    results = json.loads(command("demo", "--runs", "demo runs", "--seed", "5", "--json"))
    assert [(result["setting"], result["reconstruction"]) for result in results] == [
        ("W8A8", "none"), ("W4A4", "none"), ("W2A2", "none"), ("W2A2", "qdrop"),
    ]  # fmt: skip
    assert all(set(result) == {"run"} | METRICS for result in results)
    assert len({result["float"]["loss"] for result in results}) == 1
    assert {p.name for p in Path("demo runs").iterdir()} == {"demo-digits.safetensors"} | {
        f"digits_resnet-{run}" for run in ("w8a8-001", "w4a4-001", "w2a2-001", "w2a2-002")
    }
    text = command("demo", "--runs", "demo runs", "--seed", "5")
    for run in ("w8a8-002", "w4a4-002", "w2a2-003", "w2a2-004"):
        assert text.count(f"Run folder: demo runs/digits_resnet-{run}") == 1


def test_debug_shows_the_stack_trace_of_an_error(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "nowhere.yaml"]) == 1
    plain = capsys.readouterr().err
    assert main(["quantize", "nowhere.yaml", "--debug"]) == 1
    debug = capsys.readouterr().err
    assert plain.count("\n") == 1
    assert "Traceback" in debug
    assert debug.endswith(plain)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["demo", "quantize", "evaluate", "inspect", "--debug"]),
        (["--help"], ["demo", "quantize", "evaluate", "inspect", "--debug"]),
        (["demo", "--help"], ["--runs", "--seed", "--json", "2 bits"]),
        (["quantize", "--help"], ["recipe", "overrides", "--dry-run", "--json", "quant.weights.bits=2"]),
        (["evaluate", "--help"], ["target", "overrides", "--json", "newest run", "data.root="]),
        (["inspect", "--help"], ["target", "--json", "newest run"]),
    ],
)
def test_help_names_every_argument(arguments: list[str], expected: list[str], command: Command) -> None:
    text = command(*arguments)
    assert [word for word in expected if word not in text] == []


def test_gram_rounding_shows_its_layers(command: Command) -> None:
    text = command("quantize", "recipe.yaml", "quant.weights.rounding=gram")
    assert "Gram rounding" in text
    assert "conv1.weight" in text
    assert "Gram rounding" in command("inspect")


def test_a_time_decides_the_iterations_and_the_whole_network_is_shown_as_a_unit(command: Command) -> None:
    text = command(
        "quantize", "recipe.yaml", "--time", "10s", "preset=fast", "quant.weights.bits=2", "export.onnx=false"
    )
    (run,) = runs()
    metrics = json.loads(Path(f"runs/{run}/metrics.json").read_text())
    found = metrics["iterations"]
    assert found["unit"] >= 1
    assert 0 <= found["network"] <= 1.2 * found["unit"] + 2  # the preset's 100 and 120, if units need not come first
    whole = f" and {found['network']} of the network" if found["network"] else ""  # a busy machine has no time for it
    assert f"10 s: {found['unit']} iterations a unit{whole}" in " ".join(text.split())
    assert (metrics["units"][-1]["unit"] == "network") == (found["network"] > 0)
    assert yaml.safe_load(Path(f"runs/{run}/recipe.yaml").read_text())["reconstruct"]["time"] == 10
