"""Activations on levels beyond uniform: found on a histogram, looked up, learned, stored and exported exactly."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import calibquant
from calibquant import TensorImages
from calibquant.errors import CalibQuantError, QuantizationError
from calibquant.export.artifact import artifact_tensors, restore
from calibquant.export.executor import execute
from calibquant.export.lowering import make_program
from calibquant.export.program import TABLE
from calibquant.numerics.affine import affine_from_range
from calibquant.numerics.grid import Grid
from calibquant.numerics.levels import nearest_levels, unsigned_levels
from calibquant.quantization.observers import LevelObserver, make_observer
from calibquant.quantization.plan import LevelPlan, TensorPlan
from calibquant.quantization.quantizers import ActivationQuantizer
from calibquant.recipe import ActivationRecipe, make_recipe

GRIDS = [("power-of-two", 2), ("power-of-two", 3), ("apot", 2), ("apot", 3), ("apot", 4), ("apot", 5), ("codebook", 2),
         ("codebook", 3), ("codebook", 5)]  # fmt: skip
IMAGES = TensorImages(torch.randn(72, 3, 10, 10, generator=torch.Generator().manual_seed(3)))


def plan_of(kind: str, bits: int) -> TensorPlan:
    return TensorPlan(Grid(8), kind != "codebook", levels=LevelPlan(kind, 2**bits))


def values_of(signed: bool, seed: int = 0) -> Tensor:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(seed)) * 3
    return x if signed else x.clamp(min=0)


def quantizer_of(kind: str, bits: int, x: Tensor) -> ActivationQuantizer:
    plan = plan_of(kind, bits)
    observer = make_observer(ActivationRecipe(), plan)
    assert isinstance(observer, LevelObserver)
    for part in x.split(1000):
        observer.update(part)
    quantizer = ActivationQuantizer("x", plan)
    low, high, levels = observer.leveled()
    quantizer.set_range(low, high, levels=levels)
    return quantizer


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("kind", "bits"), GRIDS)
def test_a_value_becomes_the_nearest_level_of_its_code(kind: str, bits: int, signed: bool) -> None:
    x = values_of(signed)
    quantizer = quantizer_of(kind, bits, x)
    levels, (scale, zero_point) = quantizer.levels.double().numpy(), quantizer.get()  # type: ignore[union-attr]
    assert len(levels) <= 2**bits
    codes = np.clip(np.rint(x.numpy() / scale.numpy()) + int(zero_point), 0, 255)
    distance = np.abs(codes[:, None] - levels)
    chosen = levels[distance.argmin(1)]  # argmin takes the lower one of two
    expected = (chosen - int(zero_point)) * scale.double().numpy()
    assert np.allclose(quantizer(x).double().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("draw", ["normal", "uniform", "Laplace", "an outlier"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("kind", "bits"), [g for g in GRIDS if g[0] != "codebook"])
def test_given_levels_have_the_best_scale(kind: str, bits: int, signed: bool, draw: str) -> None:
    """Against a dense search with both roundings, up to 4 times the scale that clips nothing."""
    random = np.random.default_rng(bits)
    draws = {"normal": random.standard_normal, "uniform": lambda n: random.uniform(-3, 3, n), "Laplace": random.laplace,
             "an outlier": lambda n: np.append(random.standard_normal(n - 1), 30.0)}  # fmt: skip
    x = torch.from_numpy(draws[draw](size=2000) if draw == "Laplace" else draws[draw](2000)).float()
    x = x if signed else x.abs()
    levels, zero = torch.tensor(unsigned_levels(kind, bits, signed), dtype=torch.uint8), 128 if signed else 0
    table = nearest_levels(levels).double()

    def error(scale: float) -> float:
        codes = (torch.round(x.double() / scale) + zero).clamp(0, 255).long()
        return float(((table[codes] - zero) * scale - x.double()).square().sum())

    top = float(x.abs().max()) / (int(levels[-1]) - zero)
    best = min(error(top * share) for share in np.geomspace(0.02, 4, 600))
    found = float((quantizer_of(kind, bits, x)(x) - x).double().square().sum())
    assert found < 1.02 * best


def test_a_codebook_is_the_best_of_all_subsets() -> None:
    """Brute force over the codes that occur, for values that lie on few of them."""
    generator = torch.Generator().manual_seed(5)
    x = torch.tensor([0.0, 1.0, 2.0, 7.0, 9.0, 25.5])[torch.randint(0, 6, (500,), generator=generator)]
    x = torch.cat([x, torch.tensor([25.5, 0.0])])
    observer = LevelObserver(LevelPlan("codebook", 4))
    observer.update(x)
    low, high, levels = observer.leveled()
    scale, zero = affine_from_range(low, high, Grid(8), False)
    codes = torch.round(x / scale).numpy() + int(zero)
    occurring, counts = np.unique(codes, return_counts=True)

    def error(chosen: Any) -> float:
        return float((np.abs(occurring[:, None] - np.array(chosen, dtype=float)).min(1) ** 2 * counts).sum())

    clusters = [np.split(np.arange(6), cut) for cut in combinations(range(1, 6), 3)]
    means = [[np.rint(np.average(occurring[c], weights=counts[c])) for c in split] for split in clusters]
    assert error(levels.double().numpy()) == pytest.approx(min(error(choice) for choice in means), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_codebook_is_closer_than_uniform_levels(bits: int) -> None:
    x = values_of(signed=False)
    uniform = ActivationQuantizer("x", TensorPlan(Grid(bits), False))
    observer = make_observer(ActivationRecipe(bits=bits), uniform.plan)
    observer.update(x)
    uniform.set_range(*observer.range())
    errors = [float((q(x) - x).square().sum()) for q in (uniform, quantizer_of("codebook", bits, x))]
    assert errors[1] < 0.97 * errors[0]


def test_merging_gives_the_same_levels() -> None:
    x = values_of(signed=True)
    for kind, bits in GRIDS:
        one, a, b = (LevelObserver(LevelPlan(kind, 2**bits)) for _ in range(3))
        one.update(x)
        a.update(x[3000:])
        b.update(x[:3000])
        a.merge(b)
        assert all(torch.equal(p, q) for p, q in zip(one.leveled(), a.leveled(), strict=True))


def test_constant_values() -> None:
    for kind, bits in GRIDS:
        for value in (0.0, 2.0, -3.0):
            x = torch.full((10,), value)
            assert torch.allclose(quantizer_of(kind, bits, x)(x), x, rtol=0.01)


@pytest.mark.parametrize("signed", [False, True])
def test_levels_learn_their_scale_as_lsq_does(signed: bool) -> None:
    """Against the chain of ops with straight-through roundings, whose gradients autograd finds."""
    x = values_of(signed)[:500]
    quantizer = quantizer_of("apot", 3, x * 0.6)  # so that some values are clipped
    levels = quantizer.levels
    assert levels is not None
    stored, zero_point = quantizer.get()
    learned = quantizer.start_learning()
    a = x.clone().requires_grad_()
    (quantizer(a) * torch.linspace(-1, 1, 500)).sum().backward()

    b, scale = x.clone().requires_grad_(), stored.clone().requires_grad_()
    whole = b / scale + (torch.round(b / scale) - b / scale).detach()
    steps = (whole + zero_point).clamp(int(levels[0]), int(levels[-1]))
    rounded = nearest_levels(levels)[steps.detach().round().long()].float()
    value = (steps + (rounded - steps).detach() - zero_point) * scale
    (value * torch.linspace(-1, 1, 500)).sum().backward()
    assert torch.allclose(a.grad, b.grad)  # type: ignore[arg-type]
    assert float(learned.grad) == pytest.approx(float(scale.grad) * (500 * (len(levels) - 1)) ** -0.5, rel=1e-3)  # type: ignore[arg-type]


def test_what_would_move_levels_is_refused() -> None:
    quantizer = quantizer_of("codebook", 2, values_of(signed=False))
    for kind in ("pact", "ulq"):
        with pytest.raises(QuantizationError, match=f"x: has levels of its own, which finetune.activations={kind}"):
            quantizer.start_learning_ends(kind)
    with pytest.raises(QuantizationError, match=r"finetune.activations=lsq\+ would move; use lsq or fixed"):
        quantizer.start_learning_zero_point()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": "apot", "bits": 8}, "activations.bits: apot has no grid of 8 bits for activations; use 2 to 5"),
        (
            {"grid": "codebook", "dynamic": True},
            "activations.dynamic: does not go with the grid codebook, .*; use false",
        ),
        ({"grid": "codebook", "observer": "kl"}, "activations.observer: does not go with the grid .*; use mse"),
        ({"grid": "codebook", "symmetric": True}, "activations.symmetric: does not go with .*; use false"),
        ({"grid": "apot", "granularity": "per_channel"}, "activations.granularity: does .*; use per_tensor"),
        ({"grid": "ternary"}, "quant.activations.grid"),
    ],
)
def test_what_does_not_go_together_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibQuantError, match=message):
        make_recipe({"quant": {"activations": fields}})
    mixed = {"tensors": "both", "budget": "bops", "limit": 1e6}
    with pytest.raises(CalibQuantError, match=r"mixed.tensors: chooses bits of uniform activations, not of apot"):
        make_recipe({"quant": {"activations": {"grid": "apot"}, "mixed": mixed}})


class Net(nn.Module):
    """A residual sum, a concatenation, pools, a grouped convolution and both kinds of limits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 6, 3, padding=1)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = x + self.c(self.b(x).relu())
        x = self.pool(torch.cat([x, nn.functional.relu6(self.b(x))], 1))
        return self.fc(self.d(x).relu().mean((2, 3)))


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize(("kind", "bits"), [("power-of-two", 3), ("apot", 4), ("codebook", 2)])
def test_runs_are_loaded_to_the_bit_and_exported_exactly(
    kind: str, bits: int, learning: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    method = {"method": "qdrop", "iterations": 3, "network": {"iterations": 2}} if learning else {"method": "none"}
    quant = {"boundary": "none", "activations": {"bits": bits, "grid": kind}}
    run = calibquant.quantize(
        make_recipe({"quant": quant, "calibration": {"count": 72}, "threads": 1, "reconstruct": method}),
        Net().eval(), IMAGES,
    )  # fmt: skip
    x = torch.randn(3, 3, 10, 10)
    loaded = calibquant.load(run.folder)
    with torch.no_grad():
        assert torch.equal(loaded(x), run.model(x))
    assert loaded.plan == run.model.plan
    leveled = [q for q in run.model.activation_quantizers.values() if q.levels is not None]
    assert len(leveled) == 5
    parity = json.loads((run.folder / "parity.json").read_text())
    assert parity["left_out"] == {}
    assert all(row["differing"] == 0 for part in ("simulation", "executor") for row in parity[part])
    inputs = [row["input"] for row in json.loads((run.folder / "record.json").read_text())]
    assert [row.get("stored_bits") for row in inputs] == [None, bits, bits, bits, bits, None]
    program = make_program(run.model)
    values = execute(program, x.numpy(), keep=True).values
    assert sum(step.op == TABLE for step in program.steps) == 6  # the concatenation's two inputs are on its levels
    for quantizer in leveled:
        assert set(np.unique(values[quantizer.name]).tolist()) <= set(quantizer.levels.tolist())  # type: ignore[union-attr]


def test_the_boundary_and_named_activations_stay_uniform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quant = {"activations": {"bits": 2, "grid": "codebook"}, "bits": {"add": 6}}
    recipe = make_recipe({"quant": quant, "calibration": {"count": 72}, "export": {"onnx": False}})
    model = calibquant.quantize(recipe, Net().eval(), IMAGES).model
    kinds = {name: None if q.levels is None else len(q.levels) for name, q in model.activation_quantizers.items()}
    assert kinds["add"] is None
    assert kinds["relu"] == 4
    assert [model.activation_quantizers[n].plan.role for n in kinds if kinds[n] is None] == [
        "integer", "integer", "bits", "boundary", "integer",
    ]  # fmt: skip


def test_damaged_levels_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quant = {"boundary": "none", "activations": {"bits": 2, "grid": "codebook"}}
    recipe = make_recipe({"quant": quant, "calibration": {"count": 72}, "export": {"onnx": False}})
    run = calibquant.quantize(recipe, Net().eval(), IMAGES)
    model = calibquant.load(run.folder)
    model.activation_quantizers["relu"].levels = torch.tensor([4, 3], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"relu.levels are not up to 4 codes"):
        restore(calibquant.load(run.folder), artifact_tensors(model))
