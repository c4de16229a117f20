"""Functions of one quantized tensor become tables: right for every code, on every processor."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import quantized
from onnx_cases import run
from torch import Tensor, nn

from calibquant.export.executor import execute
from calibquant.export.functions import Function, function_of, identity_of
from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import deploy_onnx
from calibquant.export.onnx_files import with_outputs
from calibquant.export.program import TABLE, ActivationGrid, Program
from calibquant.graph import capture, fold_batch_norm
from calibquant.quantization import QuantModel
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe

# The function as a network writes it, and what it is of float64 values.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + torch.exp(-x))),
    "tanh": (torch.tanh, torch.tanh),
    "silu": (F.silu, lambda x: x / (1 + torch.exp(-x))),
    "hardswish": (F.hardswish, lambda x: x * (x + 3).clamp(0, 6) / 6),
    "hardsigmoid": (F.hardsigmoid, lambda x: (x + 3).clamp(0, 6) / 6),
    "gelu": (F.gelu, lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "elu": (lambda x: F.elu(x, 0.7), lambda x: torch.where(x > 0, x, 0.7 * torch.expm1(x))),
    "softplus": (F.softplus, lambda x: torch.log1p(torch.exp(x))),
    "softplus with beta": (
        lambda x: F.softplus(x, 3, 2), lambda x: torch.where(3 * x > 2, x, torch.log1p((3 * x).exp()) / 3),
    ),
    "mish": (F.mish, lambda x: x * torch.tanh(torch.log1p(torch.exp(x)))),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), lambda x: torch.where(x > 0, x, 0.1 * x)),
    "scaled": (lambda x: 0.3 * x - 1, lambda x: 0.3 * x - 1),
    "scalar tensors": (lambda x: x * torch.tensor(0.75) + torch.tensor([0.5]), lambda x: x * 0.75 + 0.5),
    "doubled": (lambda x: x + x, lambda x: 2 * x),
    "square": (lambda x: x * x, lambda x: x * x),
}  # fmt: skip


class Between(nn.Module):
    """A convolution, a function, a convolution, and a head."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.function, self.second = nn.Conv2d(3, 4, 3), function, nn.Conv2d(channels, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.function(4 * self.first(x))).mean((2, 3)))


def images() -> Tensor:
    return torch.randn(4, 3, 8, 7, generator=torch.Generator().manual_seed(2))


def model_of(
    function: Callable[[Tensor], Tensor], channels: int = 4, bits: int = 8, **activations: object
) -> QuantModel:
    recipe = QuantRecipe(
        weights=WeightRecipe(bits=8, observer="minmax"),
        activations=ActivationRecipe(**{"bits": bits, "observer": "minmax", **activations}),  # type: ignore[arg-type]
    )
    return quantized(fold_batch_norm(capture(Between(function, channels).eval(), images()[:1])), recipe, images())


def assert_exact(program: Program, x: Tensor) -> None:
    """Every code is the runtime's, and no step is approximate."""
    coded = [step.output for step in program.steps if step.grid is not None]
    done, got = execute(program, x.numpy(), keep=True), run(with_outputs(deploy_onnx(program, x), coded), x)
    assert not done.approximate
    for name in coded:
        np.testing.assert_array_equal(done.values[name], got[name], name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_code_gives_the_function_s_value(name: str) -> None:
    function, value = FUNCTIONS[name]
    program = make_program(model_of(lambda x: function(x)))
    steps = [step for step in program.steps if step.op == TABLE]
    source, grid = program.grids[steps[-1].inputs[0]], steps[-1].grid
    assert source is not None
    assert grid is not None
    codes = torch.arange(source.low, source.high + 1)
    # 4 * conv has a grid of its own or belongs to the function: the last table's input says which
    factor = 1 if steps[-1].inputs[0].startswith("mul") else 4
    x = (codes.double() - source.zero_point) * float(source.scale) * factor
    want = (torch.round(value(x) / float(grid.scale)) + grid.zero_point).clamp(grid.low, grid.high)
    assert steps[-1].table is not None
    np.testing.assert_array_equal(steps[-1].table[codes.numpy()], want.numpy())
    assert {step.op for step in program.steps} == {"quantize", TABLE, "conv2d", "mean", "linear"}
    assert_exact(program, images() * 1.5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(x),
        lambda x: x * F.relu6(x + 3) / 6,
        lambda x: x * torch.tanh(F.softplus(x)),
        lambda x: F.max_pool2d(F.silu(F.hardswish(x)), 2),
        lambda x: x + F.relu(x),
    ],
    ids=["silu", "hardswish", "mish", "chain", "residual"],
)
def test_a_chain_of_one_tensor_is_one_table(function: Callable[[Tensor], Tensor], bits: int, symmetric: bool) -> None:
    """With the roundings between: the simulation in float64 gives the same codes."""
    model = model_of(function, bits=bits, symmetric=symmetric)
    program = make_program(model)
    ops = [step.op for step in program.steps if step.op != "max_pool2d"]
    assert ops == ["quantize", "conv2d", TABLE, "conv2d", "mean", "linear"]
    assert_exact(program, images())
    table = next(step for step in program.steps if step.op == TABLE)
    seen: list[Tensor] = []
    handle = model.activation_quantizers[table.output].register_forward_hook(lambda _m, _i, y: seen.append(y))
    with torch.no_grad():
        model.double()(images().double())
    handle.remove()
    codes = execute(program, images().numpy(), keep=True).values[table.output]
    assert table.grid is not None
    want = torch.round(seen[0] / float(table.grid.scale)) + table.grid.zero_point
    np.testing.assert_array_equal(codes, want.numpy())


def test_a_value_that_others_read_is_made_too() -> None:
    def function(x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return torch.cat([x * gate, F.max_pool2d(gate, 3, 1, 1)], 1)

    program = make_program(model_of(function, channels=8))
    assert sum(step.op == TABLE for step in program.steps) == 2
    assert_exact(program, images())


def test_concatenations_give_functions_their_grids() -> None:
    """A function without a grid of its own is looked up on that of each concatenation."""

    def function(x: Tensor) -> Tensor:
        y = F.silu(x)
        return torch.cat([torch.cat([y, x], 1), torch.cat([y, F.relu(x), y], 1) * 2], 1)

    assert_exact(make_program(model_of(function, channels=20)), images())


def test_levels_and_functions_are_one_table() -> None:
    model = model_of(F.silu, bits=4, grid="apot", observer="mse")
    program = make_program(model)
    (table,) = (step for step in program.steps if step.op == TABLE)
    assert table.grid is not None
    assert table.grid.levels is not None
    assert set(table.table.tolist()) <= set(table.grid.levels)  # type: ignore[union-attr]
    assert_exact(program, images())


def test_what_is_no_function_of_codes_stays_as_it_is() -> None:
    gain = torch.linspace(0.5, 2, 4).reshape(4, 1, 1)
    kept = {
        "of two tensors": (lambda x: x * F.max_pool2d(x, 3, 1, 1), "mul"),
        "of each channel": (lambda x: x * gain, "mul"),
        "slopes of channels": (nn.PReLU(4), "prelu"),
        "of a float tensor": (lambda x: F.silu(F.layer_norm(x, x.shape[1:])), "silu"),
    }
    for name, (function, op) in kept.items():
        program = make_program(model_of(function))
        assert op in [step.op for step in program.steps], name


def test_codes_without_a_finite_value_are_no_table() -> None:
    grid = ActivationGrid(np.float32(0.5), 3, 3, 0, 7)
    network = capture(_Reciprocal(), torch.ones(1, 2))
    node = next(n for n in network.graph.nodes if n.op == "call_function")
    assert function_of(node, lambda _: identity_of("x", grid)) is None
    positive = ActivationGrid(np.float32(0.5), 3, 3, 4, 7)
    found = function_of(node, lambda _: identity_of("x", positive))
    assert isinstance(found, Function)
    assert found.values.unique().tolist() == [1.0]


class _Reciprocal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return operator.truediv(x, x)
