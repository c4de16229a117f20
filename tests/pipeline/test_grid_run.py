"""Runs on every grid: saved and loaded to the bit, exported exactly, learned and Gram-rounded."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from torch import nn

import calibquant
from calibquant import TensorImages
from calibquant.export.artifact import load_artifact, save_artifact
from calibquant.graph import capture
from calibquant.numerics.grid import Grid
from calibquant.numerics.packing import pack, unpack
from calibquant.quantization import QuantModel, calibrate_weights, make_plan
from calibquant.recipe import QuantRecipe, make_recipe
from calibquant.runfolder import RunFolder

SECOND = {"clustering": "second-order"}
GRIDS: list[tuple[str, int, dict[str, Any]]] = [
    ("power-of-two", 4, {}), ("apot", 4, {}), ("apot", 6, {}), ("codebook", 1, {}), ("codebook", 2, {}),
    ("codebook", 3, {"codebook": "per_channel", **SECOND}), ("codebook", 4, {"levels": 11}), ("codebook", 6, {}),
    ("nuq", 8, {}), ("nuq", 8, {"levels": 16, **SECOND}), ("ternary", 2, {}), ("binary", 1, {}), ("binary", 2, {}),
]  # fmt: skip
IMAGES = TensorImages(torch.randn(72, 3, 10, 10, generator=torch.Generator().manual_seed(3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 9, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(9, 5),
    ).eval()  # fmt: skip


def recipe_of(grid: str, bits: int, extra: dict[str, Any], **fields: Any) -> calibquant.Recipe:
    weights = {"grid": grid, "bits": bits, **extra, **fields.pop("weights", {})}
    quant = {"boundary": "none", "weights": weights, "activations": {"bits": 8}}
    return make_recipe({"quant": quant, "calibration": {"count": 72}, "threads": 1, **fields})


@pytest.mark.parametrize(("grid", "bits", "extra"), GRIDS)
@pytest.mark.parametrize("learning", [False, True])
def test_runs_are_loaded_to_the_bit_and_exported_exactly(
    grid: str, bits: int, extra: dict[str, Any], learning: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    method = {"method": "qdrop", "iterations": 4, "rounding_lr": 0.05, "network": {"iterations": 2}}
    recipe = recipe_of(grid, bits, extra, reconstruct=method if learning else {"method": "none"})
    run = calibquant.quantize(recipe, network(), IMAGES)
    x = torch.randn(3, 3, 10, 10)
    loaded = calibquant.load(run.folder)
    with torch.no_grad():
        assert torch.equal(loaded(x), run.model(x))
    parity = json.loads((run.folder / "parity.json").read_text())
    assert parity["left_out"] == {}
    assert (run.folder / "deploy.onnx").is_file()
    count = recipe.quant.weights.level_count
    for name, quantizer in run.model.weight_quantizers.items():
        value = quantizer.get()
        if value.levels is None:
            assert (grid, "3" in name) == ("nuq", True)  # the grouped convolution
            continue
        rows = value.codes.movedim(value.granularity.axis, 0).flatten(1)  # type: ignore[union-attr]
        most = max(len(row.unique()) for row in rows) if extra.get("codebook") else len(value.codes.unique())
        assert most <= count
    if grid != "nuq":
        assert run.metrics["size"]["weight_bits"] == max(1, (count - 1).bit_length())
    rows = json.loads((run.folder / "record.json").read_text())
    assert any(row["weight"].get("stored_bits") == max(1, (count - 1).bit_length()) for row in rows)


def test_few_levels_compress_and_entropy_is_scipys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {}
    for grid, extra in (("uniform", {"symmetric": True}), ("nuq", {"levels": 16})):
        recipe = recipe_of(grid, 8, extra, reconstruct={"method": "none"})
        run = calibquant.quantize(recipe, network(), IMAGES)
        sizes[grid] = run.metrics["size"]
        codes = [q.get().codes.flatten().numpy() for q in run.model.weight_quantizers.values()]
        bits = [entropy(np.unique(c, return_counts=True)[1], base=2) * len(c) for c in codes]
        assert sizes[grid]["code_entropy"] == pytest.approx(sum(bits) / sum(map(len, codes)), rel=1e-9)
        assert sizes[grid]["compressed_codes"] == sum(len(zlib.compress(c.tobytes(), 9)) for c in codes)
    assert sizes["nuq"]["compressed_codes"] < 0.8 * sizes["uniform"]["compressed_codes"]
    assert sizes["nuq"]["code_entropy"] < 5


@pytest.mark.parametrize("grid", ["apot", "codebook", "binary"])
def test_gram_rounding_chooses_among_the_levels_and_helps(
    grid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bits = {"apot": 3, "codebook": 2, "binary": 2}[grid]
    errors = {}
    for rounding in ("nearest", "gram"):
        recipe = recipe_of(grid, bits, {}, weights={"rounding": rounding}, reconstruct={"method": "none"})
        run = calibquant.quantize(recipe, network(), IMAGES)
        last = run.metrics["feature_errors"][-1]
        errors[rounding] = last["nearest"] if last["reconstructed"] is None else last["reconstructed"]
        for quantizer in run.model.weight_quantizers.values():
            value = quantizer.get()
            assert value.levels is not None
            assert set(value.codes.unique().tolist()) <= set(value.levels.tolist())
    assert errors["gram"] < errors["nearest"]


def test_the_boundary_stays_uniform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe({
        "quant": {"boundary": "qdrop", "weights": {"grid": "codebook", "bits": 2}}, "calibration": {"count": 72},
        "export": {"onnx": False},
    })  # fmt: skip
    run = calibquant.quantize(recipe, network(), IMAGES)
    plans = [p.levels for p in run.model.plan.weights.values()]
    assert [plan is None for plan in plans] == [True, False, False, False, True]
    assert calibquant.load(run.folder).plan == run.model.plan


SHAPES = st.tuples(st.integers(1, 10), st.integers(1, 4), st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 1)]))


@given(SHAPES, st.sampled_from([2, 4, 8, 16]), st.booleans(), st.integers(0, 2**16))
@settings(max_examples=80, deadline=None)
def test_packed_codes_of_odd_shapes_come_back(shape: Any, bits: int, signed: bool, seed: int) -> None:
    grid, size = Grid(bits, signed), (shape[0], shape[1], *shape[2])
    codes = torch.randint(grid.qmin, grid.qmax + 1, size, generator=torch.Generator().manual_seed(seed)).to(grid.dtype)
    packed = pack(codes, grid)
    assert packed.numel() == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack(packed, size, grid), codes)


SAVED = [*(("uniform", bits) for bits in (2, 4, 8, 16)), *((grid, bits) for grid, bits, extra in GRIDS if not extra)]


@given(SHAPES, st.sampled_from(SAVED), st.booleans(), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_saved_networks_of_odd_shapes_come_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, shape: Any, grid: tuple[str, int], per_tensor: bool, seed: int
) -> None:
    """3 x 3 and other kernels, a single channel, ten classes."""
    torch.manual_seed(seed)
    outputs, inputs, kernel = shape
    net = nn.Sequential(nn.Conv2d(inputs, outputs, kernel), nn.Flatten(), nn.Linear(outputs, 10)).eval()
    x = torch.randn(2, inputs, *kernel)
    graph = capture(net, x)
    granularity = "per_tensor" if per_tensor else "per_channel"
    weights = {"grid": grid[0], "bits": grid[1], "granularity": granularity}
    recipe = QuantRecipe.model_validate({"boundary": "none", "placement": "academic", "weights": weights,
                                         "activations": {"dynamic": True}})  # fmt: skip
    model = QuantModel(graph, make_plan(graph, recipe), dynamic=True)
    calibrate_weights(model, recipe)
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    save_artifact(model, folder)
    loaded = load_artifact(folder)
    for name, quantizer in model.weight_quantizers.items():
        a, b = quantizer.get(), loaded.weight_quantizers[name].get()
        assert all(torch.equal(x, y) for x, y in ((a.codes, b.codes), (a.scale, b.scale), (a.zero_point, b.zero_point)))
        assert (a.levels is None) == (b.levels is None)
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))
