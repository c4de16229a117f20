"""The executor's codes equal ONNX Runtime's on whole networks, and the simulation's within a step of each quantizer."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import NETWORKS, folded, quantized
from torch import Tensor, fx, nn

from calibquant.export.executor import Execution, execute
from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import deploy_onnx
from calibquant.export.onnx_files import with_outputs
from calibquant.export.program import Program, names_of
from calibquant.graph import capture, fold_batch_norm
from calibquant.quantization import QuantModel
from calibquant.quantization.quantizers import ActivationQuantizer
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe

MAIN = ["cifar_resnet", "mobilenet_v2", "squeezenet"]
PIECES = ["pools", "spatial_means", "concatenations", "additions", "depthwise_grouped", "multiplications", "paddings"]
SETTINGS = [(8, 8), (4, 4), (2, 2), (3, 3), (5, 6)]


def recipe_of(weights: int, activations: int, residual: int = 8) -> QuantRecipe:
    return QuantRecipe(
        placement="integer",
        residual_bits=residual,
        weights=WeightRecipe(bits=weights, observer="minmax"),
        activations=ActivationRecipe(bits=activations, observer="minmax"),
    )


@cache
def model_of(name: str, weights: int, activations: int) -> QuantModel:
    return quantized(folded(name), recipe_of(weights, activations), NETWORKS[name].example(4, seed=1))


def runtime_values(program: Program, images: Tensor) -> dict[str, np.ndarray]:
    """Every step's value in a default session of ONNX Runtime."""
    names = [step.output for step in program.steps]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    data = with_outputs(deploy_onnx(program, images), names)
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))


def assert_equal(program: Program, done: Execution, values: dict[str, np.ndarray]) -> int:
    """Every value is equal, but for approximate steps, whose codes are within one, and what reads them.

    Returns:
        how many codes were equal.
    """
    loose: set[str] = set()
    equal = 0
    for step in program.steps:
        ours, theirs = done.values[step.output], values[step.output]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), step.output
        if loose & set(names_of(step.inputs)):
            loose.add(step.output)
        elif step.output in done.approximate:
            loose.add(step.output)
            if step.grid is not None:
                assert np.abs(ours.astype(int) - theirs).max() <= 1, step.output
            else:
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        else:
            assert np.array_equal(ours, theirs), (step.op, step.output)
            equal += ours.size if step.grid is not None else 0
    return equal


@pytest.mark.parametrize("bits", SETTINGS, ids=lambda b: f"W{b[0]}A{b[1]}")
@pytest.mark.parametrize("name", [*MAIN, *PIECES])
def test_every_code_equals_onnx_runtimes(name: str, bits: tuple[int, int]) -> None:
    program = make_program(model_of(name, *bits))
    images = NETWORKS[name].example(8, seed=2)
    done = execute(program, images.numpy(), keep=True)
    values = runtime_values(program, images)
    assert assert_equal(program, done, values) > 0
    if name in MAIN:  # all is exact, and so are the logits behind the codes
        assert not done.approximate
        np.testing.assert_allclose(done.output, values[program.output], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {*MAIN, *PIECES}))
def test_other_networks(name: str) -> None:
    program = make_program(model_of(name, 4, 4))
    images = NETWORKS[name].example(2, seed=2)
    assert_equal(program, execute(program, images.numpy(), keep=True), runtime_values(program, images))


def test_values_are_dropped_unless_they_are_kept() -> None:
    program = make_program(model_of("cifar_resnet", 4, 4))
    images = NETWORKS["cifar_resnet"].example(2).numpy()
    kept, dropped = execute(program, images, keep=True), execute(program, [images])
    assert np.array_equal(kept.output, dropped.output)
    assert list(kept.values) == [step.output for step in program.steps]
    assert not dropped.values
    with pytest.raises(ValueError, match="1 inputs, not 2"):
        execute(program, [images, images])


# --- the simulation ---------------------------------------------------------------------------------------------------


class Forced(fx.Interpreter):
    """The simulation in which every quantizer hands on the executor's codes, after its own were compared with them."""

    def __init__(self, model: QuantModel, program: Program, done: Execution) -> None:
        super().__init__(model.simulation)
        self.codes, self.grids = done.values, program.grids
        self.compared = 0

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        if not isinstance(module, ActivationQuantizer):
            return value
        name = next(name for name in (f"{module.name}.codes", module.name) if self.grids.get(name) is not None)
        grid, ours = self.grids[name], self.codes[name]
        assert grid is not None
        theirs = torch.round(value / module.scale).numpy() + int(module.zero_point)
        assert np.abs(theirs - ours).max() <= 1, name
        self.compared += ours.size
        return torch.from_numpy((ours.astype(np.float32) - grid.zero_point) * grid.scale)


def assert_near_simulation(model: QuantModel, program: Program, done: Execution, images: Tensor) -> None:
    forced = Forced(model, program, done)
    with torch.no_grad():
        forced.run(images)
    assert forced.compared > 0


@pytest.mark.parametrize("bits", SETTINGS, ids=lambda b: f"W{b[0]}A{b[1]}")
@pytest.mark.parametrize("name", [*MAIN, *PIECES])
def test_the_simulation_is_within_a_step(name: str, bits: tuple[int, int]) -> None:
    model = model_of(name, *bits)
    images = NETWORKS[name].example(8, seed=3)
    program = make_program(model)
    assert_near_simulation(model, program, execute(program, images.numpy(), keep=True), images)


# --- random networks --------------------------------------------------------------------------------------------------

BLOCKS = ["conv", "depthwise", "grouped", "dilated", "strided", "residual", "concat", "max", "average", "relu6", "pad"]


class RandomNetwork(nn.Module):
    """A stem, blocks of the given kinds, a mean and a linear layer; 4 or 8 channels."""

    def __init__(self, kinds: list[str], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kinds = kinds
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(self.layer(kind) for kind in kinds)
        self.head = nn.Linear(8, 5)

    @staticmethod
    def layer(kind: str) -> nn.Module:
        pair = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)])
        return {
            "conv": nn.Conv2d(8, 8, 3, padding=1),
            "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            "grouped": nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=2),
            "dilated": nn.Conv2d(8, 8, 3, padding=2, dilation=2),
            "strided": nn.Conv2d(8, 8, 2, stride=2, padding=1),
            "residual": nn.Conv2d(8, 8, 3, padding=1),
            "concat": pair,
            "max": nn.MaxPool2d(3, 2, 1),
            "average": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            "relu6": nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU6()),
            "pad": nn.ZeroPad2d((1, 0, 0, 1)),
        }[kind]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            if kind == "residual":
                x = torch.relu(layer(x) + x)
            elif kind == "concat":
                x = torch.cat([torch.relu(layer[0](x)), torch.relu(layer[1](x))], 1)
            elif kind in ("conv", "grouped", "strided"):
                x = torch.relu(layer(x))
            else:
                x = layer(x)
        return self.head(x.mean((2, 3)))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5),
    bits=st.tuples(*[st.integers(2, 8)] * 3),
    seed=st.integers(0, 2**20),
)
def test_random_networks_agree(kinds: list[str], bits: tuple[int, int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 9, 8, generator=generator)
    network = RandomNetwork(kinds, seed).eval()
    model = quantized(fold_batch_norm(capture(network, images)), recipe_of(*bits), images)
    program, images = make_program(model), torch.randn(3, 3, 9, 8, generator=generator) * 1.2
    done = execute(program, images.numpy(), keep=True)
    assert_equal(program, done, runtime_values(program, images))
    assert_near_simulation(model, program, done, images)
