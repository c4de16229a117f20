"""Corrections of weights and biases: what they promise, by independent computations on small networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NETWORKS, folded, quantized, values_of
from torch import Tensor, fx, nn

from calibquant.export.artifact import artifact_tensors, load_artifact, restore, save_artifact
from calibquant.export.record import record
from calibquant.graph import capture, fold_batch_norm, with_biases
from calibquant.quantization import QuantModel, correct_biases_analytically, correct_weights, make_plan
from calibquant.recipe import QuantRecipe
from calibquant.runfolder import new_run


def recipe(bits: int = 3, placement: str = "academic", **weights: object) -> QuantRecipe:
    return QuantRecipe.model_validate({
        "weights": {"bits": bits, "observer": "minmax", **weights}, "placement": placement,
        "activations": {"bits": 8, "observer": "minmax"}, "boundary": "none",
    })  # fmt: skip


def teacher(padding: int = 1) -> fx.GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=padding, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=padding, groups=3),
        nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, stride=2, bias=False), nn.Flatten(), nn.Linear(4 * 17 * 17, 5),
    )  # fmt: skip
    return with_biases(capture(net, torch.rand(2, 3, 8, 8)))


IMAGES = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def rows(weight: Tensor, axis: int) -> np.ndarray:
    return np.moveaxis(weight.double().numpy(), axis, 0).reshape(weight.shape[axis], -1)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_the_variance_of_weights_is_put_back_and_the_codes_stay(granularity: str) -> None:
    model = quantized(teacher(), recipe(2, granularity=granularity), IMAGES)
    codes = {name: q.get().codes for name, q in model.weight_quantizers.items()}
    correct_weights(model, "mean-variance", [IMAGES])
    for name, quantizer in model.weight_quantizers.items():
        axis = 1 if name.startswith("4") or name.startswith("_4") else 0
        want, got = rows(model.teacher.get_buffer(name), axis), rows(quantizer.get().dequantize(), axis)
        assert torch.equal(quantizer.get().codes, codes[name])
        if granularity == "per_channel":
            assert np.allclose(want.std(1), got.std(1), rtol=1e-5)
        else:
            assert np.sqrt((want.std(1) ** 2).mean()) == pytest.approx(np.sqrt((got.std(1) ** 2).mean()), rel=1e-5)


@pytest.mark.parametrize("method", ["mean", "mean-variance"])
def test_the_mean_of_weights_is_put_back_on_average_over_the_inputs(method: str) -> None:
    """Each layer's mean output equals that of the layer whose weights have the mean put back in float."""
    model = quantized(teacher(), recipe(2), IMAGES)
    rounded = {name: q.get().dequantize() for name, q in model.weight_quantizers.items()}
    found = correct_weights(model, method, IMAGES.split(7))  # type: ignore[arg-type]
    assert [row.reason for row in found] == [""] * 4
    seen = values_of(model.teacher, IMAGES)
    for node in [n for n in model.teacher.graph.nodes if n.name in model.bias_deltas]:
        name, x = str(node.args[1].target), seen[node.args[0].name]
        axis, weight = (1 if "conv_transpose" in node.target.__name__ else 0), model.teacher.get_buffer(name)
        shape = [-1 if i == axis else 1 for i in range(weight.dim())]
        now = model.weight_quantizers[name].get().dequantize()
        if method == "mean":
            assert torch.equal(now, rounded[name])
        mu = rows(weight, axis).mean(1) - rows(now, axis).mean(1)
        ideal = now + torch.from_numpy(mu).float().reshape(shape)
        bias = model.teacher.get_buffer(str(node.args[2].target))
        with torch.no_grad():
            want = node.target(x, ideal, bias, **node.kwargs)
            got = node.target(x, now, bias + model.bias_deltas[node.name].delta, **node.kwargs)
        dims = [d for d in range(want.dim()) if d != 1]
        assert torch.allclose(want.mean(dims), got.mean(dims), atol=2e-5 * float(want.abs().max()))


def test_where_all_inputs_have_one_mean_the_output_has_the_float_networks() -> None:
    """sum over taps of (Wq - W) E[x] vanishes with the mean error if E[x] is the same for all taps."""
    torch.manual_seed(0)
    graph = capture(nn.Conv2d(4, 5, 3), torch.rand(2, 4, 6, 6))
    images = torch.rand(64, 4, 6, 6) + 1
    images = images - images.mean(0, keepdim=True) + 1.5
    model = quantized(graph, recipe(2), images)
    model.enable(activations=False)
    with torch.no_grad():
        before = (model(images) - graph(images)).mean((0, 2, 3)).abs().max()
        correct_weights(model, "mean", [images])
        after = (model(images) - graph(images)).mean((0, 2, 3)).abs().max()
    assert float(after) < 1e-5
    assert float(before) > 1e-2


class Known(nn.Module):
    """Its BatchNorm tells the truth about normal images, so that the second layer's input has a known mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6()
        self.second = nn.Conv2d(8, 6, 3, bias=False)
        self.norm.running_mean.copy_(self.conv.bias.detach())  # type: ignore[union-attr]
        self.norm.running_var.copy_(self.conv.weight.detach().square().sum((1, 2, 3)))
        nn.init.uniform_(self.norm.weight, 0.5, 3)
        nn.init.uniform_(self.norm.bias, -2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.norm(self.conv(x))))


def test_the_analytic_correction_is_exact_on_normal_inputs() -> None:
    torch.manual_seed(0)
    graph = with_biases(fold_batch_norm(capture(Known().eval(), torch.randn(2, 3, 6, 6))))
    images = torch.randn(6000, 3, 6, 6)
    model = quantized(graph, recipe(2), images[:50])
    model.enable(activations=False)
    model.weight_quantizers["conv.weight"].enabled = False  # the second layer alone
    with torch.no_grad():
        before = (model(images) - graph(images)).mean((0, 2, 3)).abs().max()
        found = correct_biases_analytically(model)
        after = (model(images) - graph(images)).mean((0, 2, 3)).abs().max()
    assert [(row.node, bool(row.reason)) for row in found] == [("conv", True), ("second", False)]
    assert "its input is the network's" in found[0].reason
    assert float(after) < 0.02 * float(before)
    assert float(before) > 0.05


def test_products_without_a_bias_are_told() -> None:
    model = quantized(capture(nn.Conv2d(3, 2, 1, bias=False), IMAGES[:2]), recipe(), IMAGES)
    assert [row.reason for row in correct_biases_analytically(model)] == ["it has no bias"]
    assert [row.reason for row in correct_weights(model, "mean", [IMAGES])] == ["it has no bias"]


def corrected(name: str, placement: str = "integer") -> tuple[QuantModel, Tensor]:
    """A network with every correction; deltas are large, so that one that is lost would show."""
    x = NETWORKS[name].example(6, seed=1)
    model = quantized(with_biases(folded(name)), recipe(4, placement), x)
    correct_weights(model, "mean-variance", [x])
    correct_biases_analytically(model)
    for delta in model.bias_deltas.values():
        assert delta.delta is not None
        delta.add(0.1 * torch.ones_like(delta.delta))
    return model, x


@pytest.mark.parametrize("name", ["mobilenet_v2", "cifar_resnet", "unet"])
def test_switched_off_the_float_network_comes_back_exactly(name: str) -> None:
    model, x = corrected(name)
    with torch.no_grad():
        assert not torch.allclose(model(x), model.teacher(x))
        with model.float_mode():
            assert torch.equal(model(x), model.teacher(x))
            assert torch.equal(model(x), folded(name)(x))


@pytest.mark.parametrize("name", ["mobilenet_v2", "unet"])
def test_a_saved_network_has_its_corrections(name: str, tmp_path: Path) -> None:
    model, x = corrected(name)
    with new_run(tmp_path, "run") as folder:
        save_artifact(model, folder)
        loaded = load_artifact(folder)
        folder.seal({})
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert {row["node"] for row in record(loaded) if "bias_delta" in row} == set(model.bias_deltas)
    stored = artifact_tensors(model)
    fresh = QuantModel(model.teacher, model.plan)
    restore(fresh, stored)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    first = next(iter(model.bias_deltas))
    with pytest.raises(ValueError, match=rf"bias_deltas.{first} has the shape \(1,\)"):
        restore(fresh, stored | {f"bias_deltas.{first}": torch.zeros(1)})


def test_a_part_of_a_network_is_corrected_as_the_whole() -> None:
    model, x = corrected("cifar_resnet")
    nodes = [n.name for n in model.teacher.graph.nodes if n.op == "call_function"]
    part = model.part(nodes, [nodes[-1]])
    whole = values_of(model.simulation, x)
    entry = next(n.name for n in part.teacher.graph.nodes if n.op == "placeholder")
    with torch.no_grad():
        assert torch.equal(part(whole[entry]), model(x))
    first = next(iter(model.bias_deltas))
    behind = model.part(nodes[nodes.index(first) + 1 :], [nodes[-1]])
    assert first in [n.name for n in behind.teacher.graph.nodes], "its input has the name of a product"
    assert set(behind.simulated_biases()) == set(model.bias_deltas) - {first}


def test_the_plan_needs_a_quantized_weight() -> None:
    graph = teacher()
    model = QuantModel(graph, make_plan(graph, recipe()))
    assert set(model.bias_deltas) == {n.name for n in graph.graph.nodes if len(n.args) > 2}
