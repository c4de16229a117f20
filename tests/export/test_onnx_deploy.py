"""deploy.onnx computes the integer program on the integer kernels of ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import NETWORKS
from onnx_cases import (
    FORMS,
    Apply,
    float_run,
    images_of,
    model_of,
    nodes_of,
    relative,
    result,
    run,
    session_of,
)
from torch import Tensor, nn

from calibquant.export.lowering import make_program, refusal
from calibquant.export.onnx_deploy import Storage, deploy_onnx
from calibquant.export.onnx_files import with_outputs
from calibquant.export.program import TABLE, ActivationGrid, IntegerWeight, Program, Step
from calibquant.graph import capture, fold_batch_norm
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe

BITS = [(8, 8), (4, 8), (4, 4), (2, 4), (2, 2), (3, 3), (5, 6)]


def assert_computes(program: Program, x: Tensor, share: float = 5e-3) -> None:
    """Codes as torch computes them from the program in float64, but for a share of them.

    Where a float32 sum falls on the other side of a tie a code differs by one, and what follows by a little.
    """
    data = deploy_onnx(program, x[:1])
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    coded = [name for name, grid in program.grids.items() if grid is not None]
    want, got = float_run(program, x), run(with_outputs(data, coded), x)
    difference = np.concatenate([np.abs(want[name] - got[name]).ravel() for name in coded])
    assert {got[name].dtype for name in coded} == {np.dtype(np.uint8)}
    assert difference.max() <= 8
    assert (difference > 0).mean() <= share
    output, grid = want[program.output], program.grids[program.output]
    floats = output if grid is None else (output - grid.zero_point) * grid.scale
    logits = got[program.output if grid is None else f"{program.output}.float"]
    assert logits.dtype == np.float32
    assert relative(floats, logits) <= 1e-2
    np.testing.assert_array_equal(result(data, x), logits)  # codes as outputs change nothing


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 4), (2, 3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_the_program(name: str, weights: int, activations: int) -> None:
    model = model_of(name, weights, activations, symmetric=weights == 2)
    assert refusal(model) is None
    assert_computes(make_program(model), images_of(name))


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 4), (2, 3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_its_decisions_are_the_simulation_s(name: str, weights: int, activations: int) -> None:
    """Logits equal but for a code that a float32 sum rounds the other way, which only 8 bits let through."""
    model, x = model_of(name, weights, activations, symmetric=weights == 2), images_of(name)
    with torch.no_grad():
        want = model(x)
    got = result(deploy_onnx(make_program(model), x), x)
    assert relative(want, got) <= 2e-2
    np.testing.assert_array_equal(want.flatten(1).argmax(1), got.reshape(len(x), -1).argmax(1))


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("layer norm, permuted",)])
def test_forms_of_ops_on_codes(form: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Apply(FORMS[form]), nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.randn(3, 3, 9, 15)
    network(x)
    graph = fold_batch_norm(capture(network, x))
    recipe = QuantRecipe(weights=WeightRecipe(bits=4, observer="minmax"), activations=ActivationRecipe(bits=4))
    model = QuantModel(graph, make_plan(graph, recipe))
    calibrate_weights(model, recipe)
    calibrate_activations(model, recipe.activations, [x])
    assert_computes(make_program(model), x)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_integer_step_becomes_an_integer_kernel(name: str, symmetric: bool, tmp_path: Path) -> None:
    program = make_program(model_of(name, 4, 4, symmetric=symmetric))
    session_of(deploy_onnx(program, images_of(name)), tmp_path / "optimized.onnx")
    kernels = Counter(nodes_of((tmp_path / "optimized.onnx").read_bytes()))
    steps = Counter(step.op for step in program.steps if step.integer)
    assert kernels["QLinearConv"] == steps["conv1d"] + steps["conv2d"]
    assert kernels["QLinearAdd"] == steps["add"]
    assert kernels["QGemm"] == steps["linear"]
    looked_up = [step.inputs for step in program.steps if step.op == TABLE]
    assert kernels["GatherElements"] == len(looked_up)
    # the casts of weights are computed at loading, those of one value once
    means = [step.inputs for step in program.steps if step.op == "mean" and program.grids[step.inputs[0]] is not None]
    assert kernels["Cast"] == len(set(looked_up)) + len(set(means)) or name == "weight_standardized"


def test_three_networks_are_all_integer(tmp_path: Path) -> None:
    """What remains in float is the mean of the last features, and quantizing the image."""
    for name in ("cifar_resnet", "mobilenet_v2", "squeezenet"):
        session_of(deploy_onnx(make_program(model_of(name)), images_of(name)), tmp_path / f"{name}.onnx")
        kernels = set(nodes_of((tmp_path / f"{name}.onnx").read_bytes()))
        assert not kernels & {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "MaxPool", "AveragePool"}


@pytest.mark.parametrize("storage", ["packed", "int8"])
@pytest.mark.parametrize(("weights", "activations"), BITS)
def test_all_bits_load_and_agree_in_both_storages(weights: int, activations: int, storage: Storage) -> None:
    for name in ("cifar_resnet", "mobilenet_v2", "squeezenet"):
        program, x = make_program(model_of(name, weights, activations)), images_of(name)
        data = deploy_onnx(program, x, storage)
        np.testing.assert_array_equal(result(data, x), result(deploy_onnx(program, x), x))
        codes = [t.data_type for t in onnx.load_from_string(data).graph.initializer if t.name.endswith("weight.codes")]
        short = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.INT2, onnx.TensorProto.UINT2}
        assert bool(short & set(codes)) == (storage == "packed" and weights <= 4)


@pytest.mark.parametrize("op", ["quantize", "relu", "clamp"])
def test_two_roundings_stay_two(op: str) -> None:
    """ONNX Runtime would make one of QuantizeLinear, DequantizeLinear, QuantizeLinear, DequantizeLinear."""
    attributes = {"low": -5.0, "high": 5.0} if op == "clamp" else {}
    first, second = (
        ActivationGrid(np.float32(scale), zero, 8, 0, 255)
        for scale, zero in ((0.02, 100), (0.05, 0 if op == "relu" else 120))
    )
    steps = (
        Step("quantize", ("x",), "a", grid=first),
        Step(op, ("a",), "b", attributes, grid=second),
        Step("mul_scalar", ("b",), "y", {"value": 1.5}),
    )
    x = torch.randn(8, 999, generator=torch.Generator().manual_seed(0))
    program = Program(("x",), steps, "y", {}, ())
    assert relative(float_run(program, x)["y"], result(deploy_onnx(program, x), x)) <= 1e-6


def test_one_weight_with_two_scales_is_stored_as_two() -> None:
    """Where a bias does not fit int32, the scale of a channel is raised, and only for that step."""
    grid = ActivationGrid(np.float32(0.0517), 3, 4, 0, 15)
    codes = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    ends = np.zeros(4, np.int32), np.full(4, 0.0913, np.float32), 4, True, 0
    weights = [
        IntegerWeight("fc.weight", codes, *ends),
        IntegerWeight("fc.weight", codes, ends[0], ends[1] * np.float32(2), *ends[2:]),
        IntegerWeight("fc.weight", codes[::-1].copy(), *ends),
    ]
    steps = [Step("quantize", ("x",), "a", grid=grid)]
    for name, source, weight in zip("bcd", "abc", weights, strict=True):
        bias = np.arange(4, dtype=np.int32)
        steps.append(Step("linear", (source, None, None), name, {}, grid, weight, bias, integer=True))
    assert_computes(Program(("x",), tuple(steps), "d", {}, ()), torch.randn(8, 4))
