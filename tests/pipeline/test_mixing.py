"""Mixed precision as a stage: what a run records, the same bytes from named bits, resume, the search for a drop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calibquant import pipeline
from calibquant.cli import main
from calibquant.data import batches, open_images
from calibquant.errors import CalibQuantError, RunFolderError
from calibquant.pipeline import mixing
from calibquant.recipe import DataRecipe
from calibquant.reconstruction import network as reconstruction
from calibquant.studies.compare import compare
from calibquant.studies.digits import FIELDS
from calibquant.zoo import build, save_weights

FILES = ("model.safetensors", "graph.json", "record.json", "manifest.csv")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Digits with random weights, and BatchNorm statistics of the images, so that classes differ."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network, images = build("digits_resnet"), open_images(DataRecipe(**FIELDS["data"]), "calibration")
    with torch.no_grad():
        for batch in batches(images, 100):
            network.train()(batch.images)
    save_weights(network, tmp_path / "digits.safetensors")
    return FIELDS | {
        "model": {"name": "digits_resnet", "weights": "digits.safetensors"},
        "calibration": {"count": 72, "batch_size": 36},
        "evaluation": {"count": 20},
        "export": {"onnx": False},
    }


def with_mixed(recipe: dict[str, Any], quant: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return recipe | {"quant": {"activations": {"bits": 8}, "mixed": {"images": 16, **fields}, **(quant or {})}}


def weight_bits(run: Path) -> dict[str, int]:
    return {n: p["bits"] for n, p in json.loads((run / "graph.json").read_text())["weights"].items()}


@pytest.mark.parametrize("sensitivity", ["logits", "interactions", "loss", "agreement", "gradient", "fisher"])
def test_a_run_keeps_its_budget_and_tells_what_it_chose(recipe: dict[str, Any], sensitivity: str) -> None:
    run = pipeline.quantize(with_mixed(recipe, limit=3, sensitivity=sensitivity))
    mixed = run.metrics["mixed"]
    assert mixed["used"] <= 3
    assert run.metrics["setting"] == "WmixA8"
    assert run.folder.name == "digits_resnet-wmixa8-001"
    found = weight_bits(run.folder)
    assert {name: found[name] for name in mixed["bits"]} == {n: min(b, 7) for n, b in mixed["bits"].items()}
    assert sorted(set(found) - set(mixed["bits"])) == ["conv1.weight", "fc.weight"]  # the boundary rule's
    assert set(mixed["costs"]) == set(mixed["bits"])
    estimated = sum(mixed["costs"][name][str(bits)] for name, bits in mixed["bits"].items())
    assert mixed["harm"]["estimated"] == pytest.approx(estimated)
    assert (mixed["harm"]["with_interactions"] is None) == (sensitivity != "interactions")


def test_naming_the_chosen_bits_gives_the_same_network(recipe: dict[str, Any]) -> None:
    run = pipeline.quantize(with_mixed(recipe, limit=3.5))
    named = recipe | {"quant": {"activations": {"bits": 8}, "bits": run.metrics["mixed"]["bits"]}}
    again = pipeline.quantize(named)
    for name in FILES:
        assert (run.folder / name).read_bytes() == (again.folder / name).read_bytes()
    assert again.metrics["mixed"] is None


def test_what_the_recipe_names_is_left_alone(recipe: dict[str, Any]) -> None:
    run = pipeline.quantize(with_mixed(recipe, {"bits": {"layer1.0.conv1.weight": 5, "x": 4}}, limit=2.5))
    assert "layer1.0.conv1.weight" not in run.metrics["mixed"]["bits"]
    assert weight_bits(run.folder)["layer1.0.conv1.weight"] == 5
    assert run.model.plan.activations["x"].grid.bits == 4


def test_weights_and_activations_under_bit_operations(recipe: dict[str, Any]) -> None:
    tree = with_mixed(recipe, budget="bops", tensors="both", limit=1e12)
    wide = pipeline.quantize(tree).metrics["mixed"]
    assert set(wide["bits"].values()) <= {2, 3, 4, 8}
    tree["quant"]["mixed"]["limit"] = wide["used"] / 2
    run = pipeline.quantize(tree)
    assert run.metrics["mixed"]["used"] <= wide["used"] / 2
    assert run.metrics["setting"] == "WmixAmix"
    activations = {n: p.grid.bits for n, p in run.model.plan.activations.items()}
    assert any(name in activations for name in run.metrics["mixed"]["bits"])


@pytest.mark.parametrize("fields", [{"limit": 3}, {"limit": 3, "sensitivity": "gradient"}, {"max_drop": 0.4}])
def test_a_part_of_a_network(recipe: dict[str, Any], fields: dict[str, Any]) -> None:
    """The harm is that of the whole network's logits; bit operations are those of the part."""
    whole = recipe["model"]
    mixed = pipeline.quantize(with_mixed(recipe, **fields) | {"model": whole | {"submodule": "layer2"}}).metrics[
        "mixed"
    ]
    assert set(mixed["bits"]) == {"0.conv2.weight"}
    assert mixed["harm"]["loss"] > 0
    counted = with_mixed(recipe, {"boundary": "none"}, budget="bops", limit=1e12)
    run = pipeline.quantize(counted | {"model": whole | {"submodule": "layer2"}})
    assert run.metrics["mixed"]["used"] > 0


def test_an_interrupted_run_goes_on_with_the_bits_it_had(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = with_mixed(recipe, limit=3) | {"reconstruct": {"method": "qdrop", "iterations": 3, "rounding_lr": 0.05}}
    whole = pipeline.quantize(tree)
    learn, calls = reconstruction.learn_unit, iter([True, False])

    def once(*args: Any, **kwargs: Any) -> Any:
        if not next(calls):
            raise KeyboardInterrupt
        return learn(*args, **kwargs)

    monkeypatch.setattr(reconstruction, "learn_unit", once)
    with pytest.raises(RunFolderError, match="was interrupted") as caught:
        pipeline.quantize(tree)
    monkeypatch.setattr(reconstruction, "learn_unit", learn)
    monkeypatch.setattr(mixing, "measure_trade", None)  # it would fail if it were asked again
    run = pipeline.resume(Path(caught.value.where))
    for name in FILES:
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert run.metrics["mixed"] == whole.metrics["mixed"]
    assert not list(run.folder.glob("checkpoint*"))


def test_the_least_budget_within_a_drop(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate below the one found fails, of those that were tried; the found one passes."""
    mixed = pipeline.quantize(with_mixed(recipe, max_drop=0.3)).metrics["mixed"]
    tried = mixed["search"]["tried"]
    assert mixed["search"]["images"] == 56
    found = next(t for t in tried if t["limit"] == mixed["limit"])
    assert found["agreement"] >= 0.7
    assert all(t["agreement"] < 0.7 for t in tried if t["limit"] < mixed["limit"])
    assert len(tried) <= 8


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"max_drop": 0.1, "images": 60},
            "quant.mixed.images: leaves 12 of 72 calibration images to judge the drop on",
        ),
        ({"max_drop": 0, "choices": [2, 3]}, "max_drop: even the most bits .* agree in 0.* of 56 images only; allow"),
        ({"limit": 1.9}, "budget: no choice of bits is within .*; raise the limit"),
    ],
)
def test_what_cannot_be_met_says_so(recipe: dict[str, Any], fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(CalibQuantError, match=expected):
        pipeline.quantize(with_mixed(recipe, **fields))


def test_dry_run_and_compare(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    Path("recipe.yaml").write_text(yaml.safe_dump(with_mixed(recipe, {"bits": {"layer2.0.conv1.weight": 6}}, limit=3)))
    assert main(["quantize", "recipe.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "quant.mixed chooses them" in out
    with pytest.raises(CalibQuantError, match=r"quant\.mixed: the settings compared give the bits; leave"):
        compare("recipe.yaml", ["nearest"], ["w4a4"], seeds=1)
