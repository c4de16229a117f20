"""QuantModel: the teacher when switched off, an independent simulation's equal when on, on integer grids throughout."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, folded, quantized
from torch import Tensor, fx, nn

from calibquant.errors import QuantizationError
from calibquant.graph import capture, fold_batch_norm
from calibquant.graph.ops import OPS
from calibquant.quantization import QuantModel, calibrate_weights, make_plan
from calibquant.recipe import ActivationRecipe, Placement, QuantRecipe, WeightRecipe

Array = np.ndarray
MINMAX = QuantRecipe(weights=WeightRecipe(observer="minmax"), activations=ActivationRecipe(observer="minmax"))


def changed(recipe: QuantRecipe, **fields: object) -> QuantRecipe:
    return recipe.model_copy(update=fields)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("placement", ["integer", "academic"])
@pytest.mark.parametrize("name", NETWORKS)
def test_switched_off_it_is_the_teacher_bit_for_bit(name: str, placement: Placement) -> None:
    graph, case = folded(name), NETWORKS[name]
    model = quantized(graph, changed(MINMAX, placement=placement), case.example(4, seed=1))
    x = case.example(3, seed=2)
    with_quantizers = model(x)
    with model.float_mode():
        assert torch.equal(model(x), graph(x))
    assert torch.equal(model(x), with_quantizers), "the switches are as before"
    assert not torch.equal(with_quantizers, graph(x))


def on_a_grid(value: Tensor, model: QuantModel) -> bool:
    """Whether some activation quantizer of the model has every value among its at most 2^bits levels."""
    for quantizer in model.activation_quantizers.values():
        grid, scale = quantizer.plan.grid, quantizer.scale
        levels = (np.arange(2**grid.bits) - int(quantizer.zero_point)) * scale.double().item()
        near = levels[np.abs(value.double().numpy().reshape(-1, 1) - levels).argmin(1)]
        if np.allclose(near, value.double().numpy().reshape(-1), rtol=1e-5, atol=1e-6 * scale.item()):
            return True
    return False


PARAMETERS = ("network.", "weight_quantizers.", "bias_deltas.", "bias_roundings.")


class Recorder(fx.Interpreter):
    """Runs a simulation and notes which of its integer ops read activations that lie on no grid."""

    def __init__(self, model: QuantModel) -> None:
        super().__init__(model.simulation)
        self.model, self.read, self.floating = model, 0, []

    def run_node(self, n: fx.Node) -> object:
        integer = {op.run for op in OPS.values() if op.integer}
        if n.op == "call_function" and n.target in integer:
            for source in n.all_input_nodes:
                if isinstance(self.env[source], Tensor) and not str(source.target).startswith(PARAMETERS):
                    self.read += 1
                    if not on_a_grid(self.env[source], self.model):
                        self.floating.append((n, source))
        return super().run_node(n)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETWORKS)
def test_integer_placement_leaves_no_float_input_to_an_integer_op(name: str) -> None:
    """Every value that such an op reads is a level of a quantizer, by the numbers themselves."""
    graph, case = folded(name), NETWORKS[name]
    model = quantized(graph, MINMAX, case.example(4, seed=1))
    recorder = Recorder(model)
    with torch.no_grad():
        recorder.run(case.example(2, seed=2))
    assert recorder.read
    for reader, source in recorder.floating:
        # A concatenation that is quantized itself may read floats that nothing else does: its own grid serves them.
        assert reader.target.__name__ == "cat", f"{reader} reads {source}"
        assert reader.name in model.activation_quantizers
        assert all(user.target.__name__ == "cat" for user in source.users)
    assert all(p.symmetric for p in model.plan.weights.values() if p.grid.bits == 8)


# --- an independent simulation ----------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x)))
        x = F.relu(self.b(x) + x)
        return self.fc(F.avg_pool2d(x, 8).flatten(1))


def step_of(low: Array, high: Array, bits: int, symmetric: bool) -> Array:
    """The scale of a range, float32."""
    low, high = np.minimum(low, 0).astype(np.float32), np.maximum(high, 0).astype(np.float32)
    return (
        (np.maximum(-low, high) / np.float32(2**bits - 1) * 2) if symmetric else (high - low) / np.float32(2**bits - 1)
    )


def round_to_grid(x: Array, low: Array, high: Array, bits: int, symmetric: bool, signed: bool) -> Array:
    """Affine quantization by its definition, in float32 as the contract says."""
    steps, lowest = np.float32(2**bits - 1), -(2 ** (bits - 1)) if signed else 0
    low, high = np.minimum(low, 0).astype(np.float32), np.maximum(high, 0).astype(np.float32)
    if symmetric:
        scale, zero = np.maximum(-low, high) / (steps / 2), lowest + 2 ** (bits - 1)
    else:
        scale = (high - low) / steps
        zero = lowest - np.rint(low / scale)
    codes = np.clip(np.rint(x / scale) + zero, lowest, lowest + 2**bits - 1)
    return ((codes - zero) * scale).astype(np.float32)


def ends(x: Array, per_channel: bool) -> tuple[Array, Array]:
    if not per_channel:
        return x.min(), x.max()
    flat = x.reshape(len(x), -1)
    shape = (-1,) + (1,) * (x.ndim - 1)
    return flat.min(1).reshape(shape), flat.max(1).reshape(shape)


@pytest.mark.parametrize("placement", ["integer", "academic"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_equals_a_simulation_written_by_hand(
    bits: int, per_channel: bool, symmetric: bool, placement: Placement
) -> None:
    torch.manual_seed(bits)
    network = Small().eval()
    nn.init.uniform_(network.bn.running_var, 0.5, 2)
    nn.init.normal_(network.bn.weight)
    images, x = torch.randn(16, 3, 8, 8), torch.randn(5, 3, 8, 8)
    graph = fold_batch_norm(capture(network, images[:2]))
    recipe = QuantRecipe(
        placement=placement, boundary="none", residual_bits=8,
        weights=WeightRecipe(
            bits=bits, observer="minmax", symmetric=symmetric,
            granularity="per_channel" if per_channel else "per_tensor",
        ),
        activations=ActivationRecipe(bits=bits, observer="minmax", symmetric=symmetric),
    )  # fmt: skip
    model = quantized(graph, recipe, images)

    integer = placement == "integer"
    std = torch.sqrt(network.bn.running_var + network.bn.eps)
    factor = network.bn.weight.detach() / std
    bias_a = network.bn.bias.detach() - network.bn.weight.detach() * network.bn.running_mean / std
    bias_a = network.bn.weight.detach() * network.a.bias.detach() / std + bias_a
    weights = {
        "a": network.a.weight.detach() * factor.reshape(-1, 1, 1, 1), "b": network.b.weight.detach(),
        "fc": network.fc.weight.detach(),
    }  # fmt: skip
    sym = symmetric or (integer and bits == 8)
    stored = 7 if integer and bits == 8 else bits  # what meets 8 bits reaches to 64, so that no processor saturates
    rounded = {
        k: torch.from_numpy(round_to_grid(w.numpy(), *ends(w.numpy(), per_channel), stored, sym, sym))
        for k, w in weights.items()
    }

    def forward(x: Tensor, w: dict[str, Tensor], ranges: dict[str, tuple[Array, Array]] | None) -> Tensor:
        """With ranges None: the float network, which fills `seen`."""

        def q(name: str, value: Tensor, width: int, wanted: bool = True) -> Tensor:
            seen[name] = ends(value.numpy(), False)
            if ranges is None or not wanted:
                return value
            low, high = ranges[name]
            one_sided = not (symmetric and low < 0)
            return torch.from_numpy(round_to_grid(value.numpy(), low, high, width, not one_sided, False))

        def on_accumulator(bias: Tensor, source: str, width: int, name: str) -> Tensor:
            """In steps of input scale * weight scale / 2^k, k = 4 for weights of 2 bits, 2 for 4, 0 for 8."""
            if ranges is None or not integer:
                return bias
            low, high = ranges[source]
            ranges_of_weight = ends(weights[name].numpy(), per_channel)
            step = step_of(low, high, width, symmetric and low < 0) * step_of(*ranges_of_weight, stored, sym).reshape(
                -1
            )
            step = step / np.float32({2: 16, 4: 4, 8: 1}[bits])
            return torch.from_numpy((np.rint(bias.numpy() / step) * step).astype(np.float32))

        x = q("image", x, max(8, bits), integer)
        x = q("first", F.relu(F.conv2d(x, w["a"], on_accumulator(bias_a, "image", max(8, bits), "a"), padding=1)), bits)
        y = q("branch", F.conv2d(x, w["b"], None, padding=1, groups=2), max(8, bits), integer)
        x = q("sum", F.relu(y + x), bits)
        x = q("pool", F.avg_pool2d(x, 8), max(8, bits), integer).flatten(1)
        return F.linear(x, w["fc"], on_accumulator(network.fc.bias.detach(), "pool", max(8, bits), "fc"))

    seen: dict[str, tuple[Array, Array]] = {}
    forward(images, weights, None)
    want = forward(x, rounded, dict(seen))
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, graph(x), atol=1e-3), "the test would not see quantization"


# --- state ------------------------------------------------------------------------------------------------------------


def small_model(recipe: QuantRecipe = MINMAX) -> tuple[QuantModel, Tensor]:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return quantized(fold_batch_norm(capture(Small().eval(), x)), recipe, x), x


def test_an_uncalibrated_model_says_so() -> None:
    model, x = small_model()
    fresh = QuantModel(model.teacher, model.plan)
    with pytest.raises(QuantizationError, match=r"is not calibrated; call calibrate first"):
        fresh(x)
    calibrate_weights(fresh, MINMAX)
    with pytest.raises(QuantizationError, match="x: is not calibrated") as caught:
        fresh(x)
    assert "\n" not in str(caught.value)


def test_switches_work_by_kind() -> None:
    model, x = small_model()
    both, teacher = model(x), model.teacher(x)
    model.enable(weights=False)
    activations = model(x)
    model.enable(activations=False)
    weights = model(x)
    model.enable(False, False)
    assert torch.equal(model(x), teacher)
    model.enable()
    assert torch.equal(model(x), both)
    assert len({tuple(v.flatten().tolist()) for v in (both, activations, weights, teacher)}) == 4


def test_state_moves_with_the_model() -> None:
    model, x = small_model()
    logits = model(x)
    twin = copy.deepcopy(model)
    twin.to("meta")
    state = [t for q in twin.quantizers for t in q.buffers()] + list(twin.teacher.buffers())
    assert len(state) > 15
    assert {t.device.type for t in state} == {"meta"}
    assert {t.device.type for q in model.quantizers for t in q.buffers()} == {"cpu"}
    assert torch.equal(model(x), logits)
    assert twin(x.to("meta")).shape == logits.shape


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model, x = small_model()
    twin, logits = copy.deepcopy(model), model(x)
    assert torch.equal(twin(x), logits)
    for quantizer in twin.weight_quantizers.values():
        quantizer.scale.mul_(2)
    twin.enable(activations=False)
    assert not torch.equal(twin(x), logits)
    assert torch.equal(model(x), logits)


def test_quantizers_come_in_the_order_of_the_data() -> None:
    model, _ = small_model()
    names = [q.name for q in model.quantizers]
    assert names == ["x", "a.weight", "relu", "b.weight", "b", "relu_1", "avg_pool2d", "fc.weight"]


# --- coverage ---------------------------------------------------------------------------------------------------------


def test_coverage_of_a_small_network_by_hand() -> None:
    x = torch.zeros(2, 3, 8, 8)
    graph = fold_batch_norm(capture(Small().eval(), x))
    rows = {}
    for placement in ("integer", "academic"):
        model = QuantModel(graph, make_plan(graph, QuantRecipe(placement=placement)))  # type: ignore[arg-type]
        rows[placement] = [(r.node, r.op, r.weight_bits, r.input_bits, r.reason) for r in model.coverage()]
    assert rows["integer"] == [
        ("a", "conv2d", 7, (8,), ""), ("b", "conv2d", 4, (4,), ""), ("add", "add", None, (8, 4), ""),
        ("avg_pool2d", "avg_pool2d", None, (8,), ""), ("fc", "linear", 7, (8,), ""),
    ]  # fmt: skip
    why = "not quantized by the academic placement"
    assert rows["academic"] == [
        ("a", "conv2d", 8, (None,), why), ("b", "conv2d", 4, (4,), ""), ("add", "add", None, (None, 4), why),
        ("avg_pool2d", "avg_pool2d", None, (8,), ""), ("fc", "linear", 8, (None,), why),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "count", "reason"),
    [
        ("convnext", "norm", 6, "no integer form"),
        ("attention", "float", 1, "no integer form"),
        ("weight_standardized", "norm", 1, "no integer form"),
        ("positions", "add", 1, "constant operand"),
        ("multiplications", "mul", 1, "constant operand"),
    ],
)
def test_coverage_gives_the_reason_for_floats(name: str, kind: str, count: int, reason: str) -> None:
    model = QuantModel(folded(name), make_plan(folded(name), QuantRecipe()))
    said = Counter(r.kind for r in model.coverage() if reason in r.reason)
    assert said[kind] == count
