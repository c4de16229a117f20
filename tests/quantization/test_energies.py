"""Energies of weights are the mean squares of the inputs they meet, counted position by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibquant.errors import CalibQuantError, QuantizationError
from calibquant.graph import capture
from calibquant.numerics.affine import aligned
from calibquant.numerics.grid import Grid, PerChannel
from calibquant.quantization import QuantModel, calibrate_weights, make_plan, weight_energies
from calibquant.quantization.leveling import leveled_weight
from calibquant.quantization.plan import LevelPlan, TensorPlan
from calibquant.recipe import QuantRecipe, make_recipe

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(3, 4, 3), (5, 3, 6, 7)),
    "strided": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), bias=False), (5, 3, 6, 7)),
    "dilated": (nn.Conv2d(2, 4, 2, dilation=2, padding=1), (5, 2, 6, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, stride=2), (5, 4, 7, 7)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (5, 3, 4, 4)),
    "one-dimensional": (nn.Conv1d(3, 4, 3, padding=1), (5, 3, 9)),
    "linear": (nn.Linear(6, 4), (5, 6)),
    "tokens": (nn.Linear(6, 4), (5, 3, 6)),
}


def recipe_of(**weights: Any) -> QuantRecipe:
    given = {"grid": "codebook", "bits": 2, "clustering": "second-order", **weights}
    return QuantRecipe.model_validate({"boundary": "none", "weights": given})


def model_of(layer: nn.Module, x: Tensor, recipe: QuantRecipe) -> QuantModel:
    graph = capture(layer.eval(), x)
    return QuantModel(graph, make_plan(graph, recipe))


@pytest.mark.parametrize("kind", LAYERS)
def test_energy_is_the_output_error_of_one_weight(kind: str) -> None:
    """Brute force: each weight alone is moved by 1, which changes the outputs by the inputs that it meets."""
    layer, shape = LAYERS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (energy,) = weight_energies(model_of(layer, x, recipe_of()), recipe_of(), [x[:2], x[2:]]).values()
    weight = next(p for name, p in layer.named_parameters() if name == "weight")
    with torch.no_grad():
        before, brute = layer(x), torch.zeros_like(weight)
        for place in range(weight.numel()):
            weight.view(-1)[place] += 1
            brute.view(-1)[place] = (layer(x) - before).square().sum()
            weight.view(-1)[place] -= 1
    assert torch.allclose(energy, brute / brute.mean(), rtol=1e-3)


def test_an_embedding_counts_how_often_a_row_is_read() -> None:
    layer, x = nn.Embedding(6, 3), torch.tensor([[0, 1], [1, 5], [1, 1]])
    (energy,) = weight_energies(model_of(layer, x, recipe_of()), recipe_of(), [x]).values()
    counts = torch.tensor([1.0, 4, 0, 0, 0, 1])
    assert torch.allclose(energy, (counts / counts.mean()).clamp(min=1e-4)[:, None].expand(6, 3))


def test_a_weight_read_twice_has_both_energies() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    net, x = Twice(), torch.randn(8, 4)
    (energy,) = weight_energies(model_of(net, x, recipe_of()), recipe_of(), [x]).values()
    inputs = x.square().sum(0) + torch.relu(net.fc(x)).detach().square().sum(0)
    assert torch.allclose(energy, (inputs / inputs.mean()).expand(4, 4), rtol=1e-4)


@pytest.mark.parametrize(("kind", "own"), [("codebook", False), ("codebook", True), ("nuq", False)])
def test_levels_serve_the_weights_that_matter(own: bool, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 64, generator=generator)
    energy = torch.rand(8, 64, generator=generator).pow(6) + 1e-3
    levels = LevelPlan(kind, 4, own)
    plan = TensorPlan(Grid(8, signed=True), True, PerChannel(0), levels=levels)

    def error(value: Any) -> float:
        return float((energy * (value.dequantize() - weight) ** 2).sum())

    plain, weighted = (leveled_weight(weight, plan, levels, given) for given in (None, energy))
    assert error(weighted) < 0.9 * error(plain)
    ones = leveled_weight(weight, plan, levels, torch.full_like(energy, 3.0))
    assert torch.equal(ones.codes, plain.codes)
    scaled = weight / aligned(weighted.scale, weight, PerChannel(0))
    table = weighted.levels if own else weighted.levels.expand(8, -1)  # type: ignore[union-attr]
    nearest = (scaled[..., None] - table[:, None]).abs().amin(-1)
    assert torch.allclose((scaled - weighted.codes).abs(), nearest, atol=1e-4)


def test_calibration_needs_them_only_where_asked_for() -> None:
    x = torch.randn(4, 6)
    model = model_of(nn.Linear(6, 4), x, recipe_of())
    with pytest.raises(ValueError, match="second-order clustering needs the weights' energies"):
        calibrate_weights(model, recipe_of())
    calibrate_weights(model, recipe_of(), energies=weight_energies(model, recipe_of(), [x]))
    assert weight_energies(model, recipe_of(clustering="plain"), []) == {}
    with pytest.raises(QuantizationError, match="got no images"):
        weight_energies(model, recipe_of(), [])
    with pytest.raises(
        CalibQuantError, match=r"weights.clustering: apot finds no levels; use the grid codebook or nuq"
    ):
        make_recipe({"quant": {"weights": {"grid": "apot", "clustering": "second-order"}}})
