"""Biases on the accumulator's scale: how fine, where, and that they fit int32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import NETWORKS, folded, quantized, values_of
from torch import Tensor, nn

from calibquant.export.lowering import make_program
from calibquant.graph import capture, fold_batch_norm
from calibquant.numerics.affine import QTensor
from calibquant.numerics.grid import Grid, PerChannel
from calibquant.quantization import QuantModel, fit_biases
from calibquant.quantization.biases import INT32, BiasRounding, bias_step, kernel_shift
from calibquant.quantization.plan import TensorPlan
from calibquant.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe


@pytest.mark.parametrize(("bits", "shift"), [(2, 4), (3, 3), (4, 2), (5, 1), (6, 0), (7, 0), (8, 0), (16, 0)])
def test_the_shift_is_the_largest_that_keeps_two_products_within_int16(bits: int, shift: int) -> None:
    """With any zero point a centered code has at most 2^bits - 1 steps; activations have at most 255."""
    assert kernel_shift(bits) == shift
    most = 2**bits - 1
    if shift:
        assert 2 * 255 * most * 2**shift <= 2**15 - 1 < 2 * 255 * most * 2 ** (shift + 1)


def network(name: str = "cifar_resnet", weights: int = 4, placement: str = "integer") -> tuple[QuantModel, Tensor]:
    x = NETWORKS[name].example(6, seed=1)
    recipe = QuantRecipe.model_validate(
        {"weights": {"bits": weights}, "activations": {"observer": "minmax"}, "placement": placement}
    )
    return quantized(folded(name), recipe, x), x


@pytest.mark.parametrize("weights", [2, 4, 5, 8])
@pytest.mark.parametrize("name", ["cifar_resnet", "squeezenet", "linear_batchnorm"])
def test_biases_are_whole_steps_of_the_accumulator(name: str, weights: int) -> None:
    """In numpy: at most half a step from the float bias, for every product with a bias."""
    model, x = network(name, weights)
    biases = model.biases()
    assert biases
    for node, (source, quantizer, bias) in biases.items():
        rounded = model.simulation.get_submodule(f"bias_roundings.{node}")(bias)
        bits = quantizer.plan.grid.bits
        step = float(source.get()[0]) * quantizer.get().scale.double().numpy() / 2 ** max(0, 6 - bits)
        steps = rounded.double().numpy() / step
        assert np.abs(steps - np.rint(steps)).max() < 1e-3
        assert (np.abs(rounded.double().numpy() - bias.double().numpy()) <= step * (0.5 + 1e-6)).all()
    with model.float_mode(), torch.no_grad():
        assert torch.equal(model(x), model.teacher(x)), "switched off, nothing is rounded"


def test_only_the_integer_placement_rounds_biases() -> None:
    model, _ = network(placement="academic")
    assert model.biases() == {}


def test_a_part_rounds_as_the_whole_does_though_its_input_is_quantized_outside() -> None:
    model, x = network(weights=2)
    nodes = [n.name for n in model.teacher.graph.nodes if n.op == "call_function"]
    cut = nodes.index("layer1_1_relu_1") + 1 if "layer1_1_relu_1" in nodes else len(nodes) // 2
    whole = values_of(model.simulation, x)
    part = model.part(nodes[cut:], [nodes[-1]])
    (entry, *others) = [n.name for n in part.teacher.graph.nodes if n.op == "placeholder"]
    assert not others
    with torch.no_grad():
        assert torch.equal(part(whole[entry]), whole[nodes[-1]])


def test_rounding_follows_a_scale_that_is_learned_without_giving_it_a_gradient() -> None:
    model, _ = network(weights=2)
    (node, (source, _, bias)) = next(item for item in model.biases().items() if item[1][0].name != "x")
    rounding = model.simulation.get_submodule(f"bias_roundings.{node}")
    before = rounding(bias)
    learned = source.start_learning()
    with torch.no_grad():
        learned.mul_(3.7)
    assert not torch.equal(rounding(bias), before)
    assert not rounding(bias).requires_grad
    source.stop_learning()


class Tiny(nn.Module):
    """A channel of nearly zero weights with a bias: on its tiny scale the bias does not fit int32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 3, 3), nn.Linear(3, 2)
        with torch.no_grad():
            self.conv.weight[1] = 1e-12 * torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
            self.conv.bias.copy_(torch.tensor([0.1, 50.0, -0.2]))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("weights", [2, 4, 8])
def test_a_scale_is_raised_until_the_worst_sum_fits_int32(weights: int, granularity: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = fold_batch_norm(capture(Tiny().eval(), torch.zeros(1, 2, 6, 6)))
    x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    recipe = QuantRecipe(
        weights=WeightRecipe(bits=weights, granularity=granularity, observer="minmax"),  # type: ignore[arg-type]
        activations=ActivationRecipe(bits=4), boundary="none",
    )  # fmt: skip
    model = quantized(graph, recipe, x)
    before = {name: q.get() for name, q in model.weight_quantizers.items()}
    raised = fit_biases(model.biases())
    assert raised == ({"conv": 1} if granularity == "per_channel" else {})
    now = model.weight_quantizers["conv.weight"].get()
    if granularity == "per_channel":
        assert torch.equal(now.scale[[0, 2]], before["conv.weight"].scale[[0, 2]])
        assert torch.equal(now.codes[[0, 2]], before["conv.weight"].codes[[0, 2]])
        assert now.scale[1] > before["conv.weight"].scale[1]
    assert fit_biases(model.biases()) == {}, "once is enough"
    for step in make_program(model).steps:
        if step.bias is not None and step.weight is not None:
            grid = {s.output: s.grid for s in make_program(model).steps}[step.inputs[0]]
            assert grid is not None
            reach = max(grid.high - grid.zero_point, grid.zero_point - grid.low)
            worst = np.abs(step.weight.centered.astype(np.int64)).reshape(len(step.bias), -1).sum(1) * reach
            assert (worst + np.abs(step.bias.astype(np.int64)) <= INT32).all()
    with torch.no_grad():
        want, got = graph(x), model(x)
    assert torch.isfinite(got).all()
    assert float((want - got).abs().max()) < 0.3 * float(want.abs().max())


def test_a_network_not_fitted_yet_is_fitted_by_its_program_and_the_notes_say_so() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = fold_batch_norm(capture(Tiny().eval(), torch.zeros(1, 2, 6, 6)))
    x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    model = quantized(graph, QuantRecipe(weights=WeightRecipe(observer="minmax"), boundary="none"), x)
    program = make_program(model)
    assert any("1 channels were raised" in note for note in program.notes)
    fit_biases(model.biases())
    assert not any("raised" in note for note in make_program(model).notes)


def test_a_network_in_float64_has_the_same_bias_codes() -> None:
    """Quotients near a tie are decided in float32, as the integer program decides them."""
    source = ActivationQuantizer("x", TensorPlan(Grid(8), False))
    source.scale, source.zero_point = torch.tensor(0.013), torch.tensor(0, dtype=torch.int32)
    weight = WeightQuantizer("w", TensorPlan(Grid(8, signed=True), True, PerChannel(0)))
    scale = torch.linspace(0.001, 0.02, 4096)
    codes = torch.ones(4096, 1, dtype=torch.int8)
    weight.set(QTensor(codes, scale, torch.zeros(4096, dtype=torch.int32), weight.plan.grid, PerChannel(0)))
    rounding = BiasRounding(source, weight)
    step = bias_step(source.scale, weight.get())
    bias = (torch.arange(4096) + 0.5) * step  # as near to ties as float32 can be
    want = torch.round(bias / step)
    source.double(), weight.double()
    got = rounding(bias.double()) / bias_step(source.scale, weight.get())
    torch.testing.assert_close(got, want.double(), rtol=1e-12, atol=0)
