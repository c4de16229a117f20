"""Where quantizers stand: networks analysed by hand, both placements, the boundary rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, folded
from torch import Tensor, fx, nn

from calibquant.errors import QuantizationError
from calibquant.graph import capture, fold_batch_norm
from calibquant.numerics.grid import Grid, PerChannel, PerTensor
from calibquant.quantization import QuantModel, QuantPlan, make_plan
from calibquant.quantization.plan import TensorPlan
from calibquant.recipe import ActivationRecipe, Boundary, Placement, QuantRecipe, WeightRecipe
from calibquant.zoo.cifar_resnet import CifarResNet

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three convolutions of equal width, a norm and a Linear, joined by `body`."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.relu = body, nn.ReLU()
        self.a, self.b, self.c = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))
        self.bn, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def residual(n: Any, x: Tensor) -> Tensor:
    x = F.relu(n.a(x))
    x = F.relu(n.c(F.relu(n.b(x))) + x)
    return n.fc(x.mean((2, 3)))


def linear_bottleneck(n: Any, x: Tensor) -> Tensor:
    x = n.a(x)
    x = n.c(F.relu6(n.b(x))) + x
    return n.fc(F.relu(x).mean((2, 3)))


def concatenation(n: Any, x: Tensor) -> Tensor:
    x = F.relu(n.a(x))
    y = torch.cat([F.relu(n.b(x)), F.relu(n.c(x))], 2)
    return n.c(F.max_pool2d(y, 2))


def squeeze_excitation(n: Any, x: Tensor) -> Tensor:
    x = F.relu(n.a(x))
    gate = torch.sigmoid(n.c(F.relu(n.b(x.mean((2, 3), keepdim=True)))))
    return n.fc((x * gate).mean((2, 3)))


def unfolded_norm(n: Any, x: Tensor) -> Tensor:
    x = F.relu(n.a(x))
    return n.b(F.relu(n.bn(x)))


def average_pool(n: Any, x: Tensor) -> Tensor:
    return n.b(F.avg_pool2d(F.relu(n.a(x)), 2))


def preprocessing(n: Any, x: Tensor) -> Tensor:
    x = (F.pad(x, (1, 1, 1, 1)) - 0.5) * 2.0
    return n.b(F.relu(n.a(x)))


def called_twice(n: Any, x: Tensor) -> Tensor:
    return n.c(n.relu(n.b(n.relu(n.b(n.relu(n.a(x)))))))


def identity_chain(n: Any, x: Tensor) -> Tensor:
    return n.c(n.b(n.a(x)))


# body, academic sites, what the integer placement adds; "*": kept wider by the boundary rule qdrop
HAND: list[tuple[Callable[..., Tensor], str, str]] = [
    (residual, "relu relu_1 relu_2*", "x c mean"),
    (linear_bottleneck, "a clamp relu*", "x c mean"),
    (concatenation, "relu cat*", "x"),
    (squeeze_excitation, "relu relu_1 sigmoid mul*", "x c mean mean_1"),
    (unfolded_norm, "relu_1*", "x relu"),
    (average_pool, "relu*", "x avg_pool2d"),
    (preprocessing, "relu*", "mul_scalar"),
    (called_twice, "relu relu_1 relu_2*", "x"),
    (identity_chain, "a b*", "x"),
]


def graph_of(body: Callable[..., Tensor]) -> fx.GraphModule:
    return fold_batch_norm(capture(Net(body).eval(), IMAGE))


def bits_of(plan: QuantPlan) -> dict[str, int]:
    return {name: p.grid.bits for name, p in plan.activations.items()}


@pytest.mark.parametrize(("body", "sites", "added"), HAND)
def test_sites_equal_those_found_by_hand(body: Callable[..., Tensor], sites: str, added: str) -> None:
    graph = graph_of(body)
    recipe = QuantRecipe(residual_bits=6)
    academic = {s.rstrip("*"): 8 if s.endswith("*") else 4 for s in sites.split()}
    assert bits_of(make_plan(graph, recipe.model_copy(update={"placement": "academic"}))) == academic
    plan = make_plan(graph, recipe)
    assert bits_of(plan) == academic | dict.fromkeys(added.split(), 6)
    order = [n.name for n in graph.graph.nodes]
    assert list(plan.activations) == sorted(plan.activations, key=order.index)
    roles = {name: p.role for name, p in plan.activations.items()}
    assert {n for n, role in roles.items() if role == "integer"} == set(added.split())
    assert {n for n, role in roles.items() if role == "boundary"} == {n for n, b in academic.items() if b == 8}


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        # pre-activation: only what a convolution reads after the norm; the running sum stays float
        ("preact_resnet", "layers_0_relu layers_0_relu_1 layers_1_relu layers_1_relu_1 layers_2_relu layers_2_relu_1 "
                          "relu"),
        ("squeezenet", "features_1 features_3_squeeze_activation features_3_cat features_4_squeeze_activation "
                       "features_4_cat"),
        ("lenet", "tanh tanh_1 tanh_2 tanh_3"),
        ("tied_embedding", "gelu"),
        ("bn_before_conv", "bn1 second_0"),
    ],
)  # fmt: skip
def test_academic_sites_of_published_networks(name: str, sites: str) -> None:
    assert list(make_plan(folded(name), QuantRecipe(placement="academic")).activations) == sites.split()


# --- ResNet-20 against the reference ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet20() -> fx.GraphModule:
    return fold_batch_norm(capture(CifarResNet(3).eval(), torch.zeros(2, 3, 32, 32)))


def named_as_in_the_reference(model: QuantModel) -> list[list[str | int]]:
    """QDrop's names of quantizers: a block's sum is `block_post_act`, any other activation its layer's `post_act`."""
    rows: list[list[str | int]] = []
    for quantizer in model.quantizers:
        bits = quantizer.plan.grid.bits
        if quantizer.name.endswith(".weight"):
            layer = quantizer.name.removesuffix(".weight")
            parts = layer.split(".")
            layer = ".".join([*parts[:-1], "body", parts[-1]]) if len(parts) > 1 else layer
            rows.append([f"{layer}.module.weight_fake_quant", bits])
        else:
            node = next(n for n in model.teacher.graph.nodes if n.name == quantizer.name)
            after_sum = node.all_input_nodes[0].target.__name__ == "add"  # type: ignore[union-attr]
            block = str(rows[-1][0]).partition(".body")[0]
            last = str(rows[-1][0]).removesuffix(".module.weight_fake_quant")
            rows.append([f"{block}.block_post_act_fake_quantize" if after_sum else
                         f"{last}.layer_post_act_fake_quantize", bits])  # fmt: skip
    return rows


@pytest.mark.parametrize("bits", [2, 4])
def test_resnet20_has_the_references_quantizers(resnet20: fx.GraphModule, shared_data: Path, bits: int) -> None:
    file = shared_data.parent / "reference" / "qdrop_resnet20_nearest.npz"
    if not file.is_file():
        pytest.skip(f"the reference results are not at {file}")
    with np.load(file) as results:
        expected = json.loads(str(results[f"w{bits}a{bits}/quantizers"]))
    recipe = QuantRecipe(placement="academic", weights=WeightRecipe(bits=bits), activations=ActivationRecipe(bits=bits))
    assert named_as_in_the_reference(QuantModel(resnet20, make_plan(resnet20, recipe))) == expected


@pytest.mark.parametrize(
    ("rule", "weights", "activations"),
    [
        ("qdrop", {"conv1.weight", "linear.weight"}, {"layer3_2_relu_1"}),
        ("captq", {"conv1.weight", "linear.weight"}, {"relu", "layer3_2_relu_1"}),
        ("brecq", {"conv1.weight", "linear.weight"}, {"relu"}),
        ("none", set(), set()),
    ],
)
@pytest.mark.parametrize("bits", [2, 4])
def test_boundary_rules_on_resnet20(
    resnet20: fx.GraphModule, rule: Boundary, weights: set[str], activations: set[str], bits: int
) -> None:
    recipe = QuantRecipe(
        placement="academic", boundary=rule, weights=WeightRecipe(bits=bits), activations=ActivationRecipe(bits=bits)
    )
    plan = make_plan(resnet20, recipe)
    assert len(plan.weights) == 20
    assert len(plan.activations) == 19
    for table, wide in ((plan.weights, weights), (plan.activations, activations)):
        assert {n for n, p in table.items() if p.grid.bits == 8} == wide
        assert {n for n, p in table.items() if p.role == "boundary"} == wide
        assert {p.grid.bits for n, p in table.items() if n not in wide} == {bits}
    assert (plan.boundary, plan.placement) == (rule, "academic")


def test_the_boundary_never_narrows() -> None:
    recipe = QuantRecipe(weights=WeightRecipe(bits=16), activations=ActivationRecipe(bits=16), residual_bits=6)
    plan = make_plan(graph_of(residual), recipe)
    assert {p.grid.bits for p in [*plan.weights.values(), *plan.activations.values()]} == {16}


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "bits", "symmetric", "expected"),
    [
        ("integer", 4, False, (Grid(4), False)),
        ("integer", 4, True, (Grid(4, signed=True), True)),
        ("integer", 8, False, (Grid(7, signed=True), True)),
        ("integer", 7, False, (Grid(7, signed=True), True)),
        ("integer", 6, False, (Grid(6), False)),
        ("integer", 16, False, (Grid(16), False)),
        ("academic", 8, False, (Grid(8), False)),
        ("academic", 8, True, (Grid(8, signed=True), True)),
    ],
)
def test_grids_of_weights(placement: Placement, bits: int, symmetric: bool, expected: tuple[Grid, bool]) -> None:
    """With activations of 8 bits: integer kernels take a weight within ±64 of its zero point on every processor."""
    recipe = QuantRecipe(
        placement=placement, boundary="none", weights=WeightRecipe(bits=bits, symmetric=symmetric),
        activations=ActivationRecipe(bits=8),
    )  # fmt: skip
    plan = make_plan(graph_of(residual), recipe)
    assert list(plan.weights) == ["a.weight", "b.weight", "c.weight", "fc.weight"]
    assert {(p.grid, p.symmetric) for p in plan.weights.values()} == {expected}
    assert {p.granularity for p in plan.weights.values()} == {PerChannel(0)}


def test_reach_follows_the_bits_of_what_a_weight_meets() -> None:
    """8-bit weights at 4-bit activations, in other placements, and where no integer kernel runs, keep 8 bits."""

    def bits(**fields: object) -> set[int]:
        weights = WeightRecipe(bits=8, reach=fields.pop("reach", "auto"))  # type: ignore[arg-type]
        recipe = QuantRecipe(**{"boundary": "none", "weights": weights, **fields})  # type: ignore[arg-type]
        return {p.grid.bits for p in make_plan(graph_of(residual), recipe).weights.values()}

    wide = ActivationRecipe(bits=8)
    assert bits(activations=wide) == {7}
    assert bits(activations=wide, reach="full") == {8}
    assert bits(activations=wide, placement="academic") == {8}
    assert bits(activations=ActivationRecipe(bits=8, dynamic=True)) == {8}
    assert bits(activations=ActivationRecipe(bits=8, granularity="per_channel")) == {8}
    assert bits(activations=ActivationRecipe(bits=4), residual_bits=4) == {8}
    assert bits(activations=ActivationRecipe(bits=7), residual_bits=7) == {8}
    assert bits(activations=ActivationRecipe(bits=16), residual_bits=16) == {8}


def test_other_bits_stay_within_the_reach() -> None:
    recipe = QuantRecipe(boundary="none", activations=ActivationRecipe(bits=8))
    plan = make_plan(graph_of(residual), recipe)
    assert plan.weights["b.weight"].reach == 64
    for bits, expected in ((8, Grid(7, signed=True)), (7, Grid(7, signed=True)), (6, Grid(6)), (16, Grid(16))):
        assert plan.with_bits("b.weight", bits).weights["b.weight"].grid == expected
    assert TensorPlan.from_json(plan.weights["b.weight"].to_json()) == plan.weights["b.weight"]


def test_granularity_and_transposed_convolutions() -> None:
    graph = folded("functional_conv")
    axes = {n: p.granularity for n, p in make_plan(graph, QuantRecipe()).weights.items()}
    assert axes["up"] == PerChannel(1)
    assert {g for n, g in axes.items() if n != "up"} == {PerChannel(0)}
    recipe = QuantRecipe(weights=WeightRecipe(granularity="per_tensor"))
    assert {p.granularity for p in make_plan(graph, recipe).weights.values()} == {PerTensor()}


@pytest.mark.parametrize("body", [called_twice])
def test_a_module_called_twice_has_one_weight_quantizer_and_one_activation_quantizer_a_call(
    body: Callable[..., Tensor],
) -> None:
    graph = graph_of(body)
    model = QuantModel(graph, make_plan(graph, QuantRecipe(placement="academic")))
    assert [q.name for q in model.quantizers].count("b.weight") == 1
    assert len(model.weight_quantizers) == 3
    assert list(model.activation_quantizers) == ["relu", "relu_1", "relu_2"]
    assert len({id(q) for q in model.activation_quantizers.values()}) == 3


@pytest.mark.parametrize(
    ("name", "parameter", "users"),
    [("tied_convs", "a.weight", 2), ("tied_linears", "a.weight", 2), ("tied_embedding", "embedding.weight", 2)],
)
def test_shared_parameters_are_planned_once(name: str, parameter: str, users: int) -> None:
    graph = folded(name)
    assert [len(n.users) for n in graph.graph.nodes if n.target == parameter] == [users]
    plan = make_plan(graph, QuantRecipe())
    assert list(plan.weights).count(parameter) == 1
    if name == "tied_embedding":  # the boundary rules know layers, and a lookup is none; 8 bits that meet 8 are 7
        assert {n: p.grid.bits for n, p in plan.weights.items()} == {"embedding.weight": 7, "hidden.weight": 7}


# --- the plan as a value ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_a_plan_that_survives_json(name: str) -> None:
    for placement in ("integer", "academic"):
        plan = make_plan(folded(name), QuantRecipe(placement=placement))  # type: ignore[arg-type]
        assert plan.weights
        for p in [*plan.weights.values(), *plan.activations.values()]:
            assert type(p).from_json(json.loads(json.dumps(p.to_json()))) == p


@pytest.mark.parametrize(
    ("placement", "name", "bits", "grid", "symmetric"),
    [
        ("academic", "b.weight", 8, Grid(8), False),
        ("integer", "b.weight", 8, Grid(8, signed=True), True),
        ("integer", "b.weight", 3, Grid(3), False),
        ("integer", "a.weight", 2, Grid(2, signed=True), True),
        ("integer", "relu", 8, Grid(8), False),
    ],
)
def test_with_bits(placement: Placement, name: str, bits: int, grid: Grid, symmetric: bool) -> None:
    plan = make_plan(graph_of(residual), QuantRecipe(placement=placement))
    edited = plan.with_bits(name, bits)
    table = {**edited.weights, **edited.activations}
    assert (table[name].grid, table[name].symmetric) == (grid, symmetric)
    before = {**plan.weights, **plan.activations}
    assert {n for n in table if table[n] != before[n]} == {name}
    assert list(edited.weights) == list(plan.weights)
    assert list(edited.activations) == list(plan.activations)


def test_with_bits_of_an_unknown_quantizer_names_the_nearest() -> None:
    with pytest.raises(QuantizationError, match=r"did you mean 'b\.weight'"):
        make_plan(graph_of(residual), QuantRecipe()).with_bits("b.wight", 3)


def test_nothing_to_quantize_is_an_error() -> None:
    network = partial(F.avg_pool2d, kernel_size=2)
    with pytest.raises(QuantizationError, match="no convolution or linear") as caught:
        make_plan(capture(Net(lambda n, x: F.relu(network(x))).eval(), IMAGE), QuantRecipe())
    assert "\n" not in str(caught.value)
