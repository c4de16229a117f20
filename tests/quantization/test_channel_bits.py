"""Weights whose channels have bits of their own: which bits, on which codes, and that learning keeps them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from networks import NETWORKS, folded, quantized
from torch import Tensor

from calibquant.errors import RecipeError
from calibquant.graph import capture, fold_batch_norm
from calibquant.numerics.allocation import banner
from calibquant.numerics.grid import Grid, PerChannel
from calibquant.quantization import QuantModel, make_plan
from calibquant.quantization.allocation import allocate_weight, quantize_channels
from calibquant.quantization.learning import SoftRounding
from calibquant.quantization.plan import TensorPlan
from calibquant.recipe import QuantRecipe, ReconstructRecipe, WeightRecipe, make_recipe
from calibquant.reconstruction import reconstruct


def weight_of(channels: int = 6, axis: int = 0, seed: int = 0) -> Tensor:
    """Channels of very different widths."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(channels, 3, 3, 3, generator=random) * torch.logspace(-1.5, 0.5, channels)[:, None, None, None]
    return w.movedim(0, axis).contiguous()


def plan_of(bits: int, symmetric: bool = False, axis: int = 0, allocation: str = "banner") -> TensorPlan:
    return TensorPlan(Grid(bits, signed=symmetric), symmetric, PerChannel(axis), "main", allocation)


def assert_on_own_grids(codes: Tensor, bits: list[int], signed: bool) -> None:
    for row, b in zip(codes, bits, strict=True):
        low = -(2 ** (b - 1)) if signed and b else 0
        assert int(row.min()) >= low
        assert int(row.max()) <= low + 2**b - 1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("observer", ["minmax", "mse", "mse-shrink", "percentile"])
def test_channels_round_as_if_each_were_alone(observer: str, symmetric: bool, axis: int) -> None:
    """Min-max by the formulas in numpy; for every observer codes lie on their channel's grid."""
    bits = np.array([0, 1, 2, 3, 4, 8])
    w, recipe = weight_of(axis=axis), WeightRecipe(observer=observer)  # type: ignore[arg-type]
    q = quantize_channels(w, recipe, plan_of(3, symmetric, axis), "academic", bits)
    assert q.grid == Grid(8, signed=symmetric)
    assert q.channel_bits is not None
    assert q.channel_bits.tolist() == bits.tolist()
    codes = q.codes.movedim(axis, 0).to(torch.int64)
    assert_on_own_grids(codes, bits.tolist(), symmetric)
    values = q.dequantize().movedim(axis, 0).numpy()
    assert (float(q.scale[0]), int(q.zero_point[0])) == (1.0, 0)
    assert not values[0].any()
    if observer != "minmax":
        return
    for row, value, b in zip(w.movedim(axis, 0).numpy()[1:], values[1:], bits.tolist()[1:], strict=True):
        low, high = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
        if symmetric:
            scale, zero, first = np.float32(max(-low, high) / ((2**b - 1) / 2)), 0, -(2 ** (b - 1))
        else:
            scale = np.float32((high - low) / (2**b - 1))
            zero, first = np.rint(-low / scale), 0
        expected = (np.clip(np.rint(row / scale) + zero, first, first + 2**b - 1) - zero) * scale
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_channels_of_8_bits_are_symmetric_where_integer_kernels_run() -> None:
    w, bits = weight_of(), np.array([8, 0, 2, 7, 8, 4])
    q = quantize_channels(w, WeightRecipe(observer="minmax"), plan_of(4), "integer", bits)
    assert q.zero_point[[0, 4]].tolist() == [128, 128]
    centered = q.codes.to(torch.int64) - q.zero_point[:, None, None, None]
    assert int(centered.min()) >= -128
    assert int(centered.max()) <= 127
    plain = quantize_channels(w, WeightRecipe(observer="minmax"), plan_of(4), "academic", bits)
    assert plain.zero_point[0] != 128
    assert torch.equal(plain.codes[[2, 3, 5]], q.codes[[2, 3, 5]])


def test_banner_takes_standard_deviations() -> None:
    w = weight_of(16)
    q = allocate_weight(w, WeightRecipe(observer="minmax"), plan_of(3), "academic")
    spread = w.reshape(16, -1).double().numpy().std(axis=1)
    assert q.channel_bits is not None
    assert q.channel_bits.tolist() == banner(spread, 3).tolist()


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_optimal_is_no_worse_than_equal_bits_or_any_exchange(observer: str) -> None:
    """On the weight's real error, with exactly the same bits in all."""
    w, recipe = weight_of(), WeightRecipe(observer=observer)  # type: ignore[arg-type]
    best = allocate_weight(w, recipe, plan_of(3, allocation="optimal"), "integer")
    assert best.channel_bits is not None
    bits = best.channel_bits.numpy()
    assert bits.sum() == 3 * 6

    def error(b: np.ndarray) -> float:
        return float((quantize_channels(w, recipe, plan_of(3), "integer", b).dequantize() - w).double().square().sum())

    least = error(bits)
    assert least < 0.7 * error(np.full(6, 3))
    for i in range(6):
        for j in range(6):
            other = bits.copy()
            other[i] += 1
            other[j] -= 1
            if i != j and other.min() >= 0 and other.max() <= 8:
                assert error(other) >= least * (1 - 1e-9)


# --- in a network -----------------------------------------------------------------------------------------------------


def shared(allocation: str = "banner", **fields: object) -> QuantRecipe:
    weights = {"bits": 3, "observer": "minmax", "allocation": allocation, **fields}
    return QuantRecipe.model_validate({"weights": weights, "activations": {"observer": "minmax"}})


def test_only_main_weights_share_bits_and_coverage_says_so() -> None:
    graph, recipe = folded("cifar_resnet"), shared("optimal")
    plan = make_plan(graph, recipe)
    roles = {name: (p.role, p.allocation) for name, p in plan.weights.items()}
    assert set(roles.values()) == {("main", "optimal"), ("boundary", "none")}
    planned = QuantModel(graph, plan).coverage()
    assert {row.note for row in planned} == {"", "weight bits by optimal"}
    model = quantized(graph, recipe, NETWORKS["cifar_resnet"].example(4, seed=1))
    for row in model.coverage():
        weight = next((n for n in roles if n.removesuffix(".weight").replace(".", "_") == row.node), None)
        if weight is None or roles[weight][0] != "main":
            assert row.note == ""
            continue
        own = model.weight_quantizers[weight].channel_bits
        assert own is not None
        assert row.weight_bits == 3  # exactly, by `optimal`
        assert row.note == f"weight bits {int(own.min())} to {int(own.max())} by optimal"
    with torch.no_grad(), model.float_mode():
        x = NETWORKS["cifar_resnet"].example(3)
        assert torch.equal(model(x), graph(x))


def test_rows_of_an_embedding_share_nothing_and_edited_bits_are_the_average() -> None:
    graph = folded("tied_embedding")
    plan = make_plan(graph, shared().model_copy(update={"boundary": "none"}))
    lookups = [p for p in plan.weights.values() if p.allocation == "none"]
    assert lookups
    graph = folded("cifar_resnet")
    plan = make_plan(graph, shared())
    name = next(n for n, p in plan.weights.items() if p.role == "main")
    assert (plan.with_bits(name, 5).weights[name].grid.bits, plan.with_bits(name, 5).weights[name].allocation) == (
        5, "banner",
    )  # fmt: skip
    assert plan.with_bits(name, 16).weights[name].allocation == "none"


@pytest.mark.parametrize("symmetric", [False, True])
def test_soft_rounding_keeps_each_channel_on_its_grid(symmetric: bool) -> None:
    """Pushed far up and far down, a code stays within the channel's own limits and at most one step from nearest."""
    w, bits = weight_of(), np.array([0, 1, 2, 3, 4, 8])
    start = quantize_channels(w, WeightRecipe(observer="minmax"), plan_of(3, symmetric), "integer", bits)
    soft = SoftRounding(w, start)
    for push in (-9.0, 9.0):
        soft.alpha.data.fill_(push)
        codes = soft.hard().codes
        assert codes.dtype == start.codes.dtype
        assert_on_own_grids(codes.to(torch.int64), bits.tolist(), symmetric)
        assert not soft()[0].detach().any(), "a channel without bits stays 0"
        assert int((codes.to(torch.int64) - start.codes.to(torch.int64)).abs().max()) == 1


@pytest.mark.parametrize("method", ["adaround", "qdrop"])
def test_reconstruction_keeps_the_bits_of_channels(method: str) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(8 * 16, 4),
    ).eval()  # fmt: skip
    graph = fold_batch_norm(capture(net, torch.zeros(2, 3, 8, 8)))
    x = torch.randn(32, 3, 8, 8)
    model = quantized(graph, shared().model_copy(update={"boundary": "none"}), x)
    before = {name: copy.deepcopy(q.get()) for name, q in model.weight_quantizers.items()}
    recipe = ReconstructRecipe(method=method, iterations=30, rounding_lr=0.1, batch_size=8, never_worse=False)  # type: ignore[arg-type]
    list(reconstruct(model, x, recipe, 0, torch.device("cpu")))
    moved = 0
    for name, quantizer in model.weight_quantizers.items():
        q, old = quantizer.get(), before[name]
        assert q.channel_bits is not None
        assert torch.equal(q.channel_bits, old.channel_bits)  # type: ignore[arg-type]
        assert_on_own_grids(q.codes.to(torch.int64), q.channel_bits.tolist(), False)
        moved += int((q.codes != old.codes).sum())
    assert moved


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": {"allocation": "banner", "granularity": "per_tensor"}}, "weights.allocation: shares bits among"),
        ({"weights": {"allocation": "optimal", "bits": 16}}, "weights.allocation: gives a channel 8 bits at most"),
        ({"activations": {"allocation": "banner"}}, "activations.allocation: shares bits among channels; set"),
        ({"activations": {"granularity": "per_channel", "dynamic": True}}, "dynamic: takes one range for a tensor"),
        (
            {"activations": {"granularity": "per_channel", "allocation": "banner", "observer": "mse-batch"}},
            "mse-batch searches each batch for one number of bits; use the observer mse",
        ),
    ],
)
def test_what_cannot_be_together(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe({"quant": fields})
