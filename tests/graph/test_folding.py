"""BatchNorm folding against convolutions and norms computed by numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import calls, captured, difference, folded
from torch import Tensor, fx, nn

from calibquant.graph import capture, fold_batch_norm

Array = np.ndarray


def randomized(network: nn.Module) -> nn.Module:
    """Seeded random weights and norms that are far from the identity."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator) + 0.2 if "var" in name else None
            tensor.copy_(torch.randn(tensor.shape, generator=generator) if values is None else values)
    return network.eval()


def numpy_conv(x: Array, weight: Array, groups: int, padding: int) -> Array:
    """A stride-1 convolution from its definition, one output channel and one tap at a time."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    count, (outputs, width, kh, kw) = len(x), weight.shape
    result = np.zeros((count, outputs, x.shape[2] - kh + 1, x.shape[3] - kw + 1))
    for o in range(outputs):
        first = o // (outputs // groups) * width
        for c in range(width):
            for i in range(kh):
                for j in range(kw):
                    part = x[:, first + c, i : i + result.shape[2], j : j + result.shape[3]]
                    result[:, o] += weight[o, c, i, j] * part
    return result


def numpy_conv_transpose(x: Array, weight: Array, groups: int, stride: int) -> Array:
    """A transposed convolution from its definition: every input value adds a scaled kernel to the output."""
    inputs, width, kh, kw = weight.shape
    count, _, height, breadth = x.shape
    result = np.zeros((count, width * groups, (height - 1) * stride + kh, (breadth - 1) * stride + kw))
    for c in range(inputs):
        for o in range(width):
            target = c // (inputs // groups) * width + o
            for i in range(height):
                for j in range(breadth):
                    block = x[:, c, i, j][:, None, None] * weight[c, o]
                    result[:, target, i * stride : i * stride + kh, j * stride : j * stride + kw] += block
    return result


def numpy_norm(x: Array, norm: nn.Module) -> Array:
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, var = (getattr(norm, n).double().numpy().reshape(shape) for n in ("running_mean", "running_var"))
    y = (x - mean) / np.sqrt(var + norm.eps)
    if norm.weight is None:
        return y
    return y * norm.weight.detach().double().numpy().reshape(shape) + norm.bias.detach().double().numpy().reshape(shape)


def numpy_layer(x: Array, layer: nn.Module) -> Array:
    weight = layer.weight.detach().double().numpy()
    if isinstance(layer, nn.Linear):
        y = x @ weight.T
    elif isinstance(layer, nn.ConvTranspose2d):
        y = numpy_conv_transpose(x, weight, layer.groups, layer.stride[0])
    else:
        y = numpy_conv(x, weight, layer.groups, layer.padding[0])
    if layer.bias is not None:
        y = y + layer.bias.detach().double().numpy().reshape((1, -1) + (1,) * (y.ndim - 2))
    return y


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), (4, 5, 7)),
        (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (4, 5, 7)),
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, eps=0.1), (4, 5, 7)),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8), (4, 5, 5)),
        (nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4, affine=False), (4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (4, 3, 3)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False), nn.BatchNorm2d(6), (4, 3, 3)),
        (nn.ConvTranspose2d(6, 6, 3, groups=3), nn.BatchNorm2d(6, affine=False), (6, 3, 3)),
        (nn.Linear(9, 5), nn.BatchNorm1d(5), (9,)),
        (nn.Linear(9, 5, bias=False), nn.BatchNorm1d(5, affine=False), (9,)),
    ],
)
def test_folding_equals_layer_and_norm_in_float64(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    network = randomized(nn.Sequential(layer, norm))
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    graph = fold_batch_norm(capture(network, x))
    assert len(calls(graph)) == 1
    want = torch.from_numpy(numpy_norm(numpy_layer(x.double().numpy(), layer), norm))
    assert difference(want, graph(x).double()) < 1e-5


class Branch(nn.Module):
    """A convolution whose output is read by a norm and by something else."""

    def __init__(self, both_norms: bool) -> None:
        super().__init__()
        self.conv, self.both_norms = nn.Conv2d(3, 4, 3, bias=False), both_norms
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norms[0](y) + (self.norms[1](y) if self.both_norms else F.relu(y))


class Twice(nn.Module):
    """A convolution called twice, each call followed by the norm of that number."""

    def __init__(self, norms: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.order = nn.Conv2d(4, 4, 3, padding=1), norms
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = F.relu(self.norms[number](self.conv(x)) if number >= 0 else self.conv(x))
        return x


@pytest.mark.parametrize(
    ("network", "channels", "left"),
    [
        (Branch(both_norms=False), 3, 1),
        (Branch(both_norms=True), 3, 2),
        (Twice((0, 0)), 4, 0),
        (Twice((0, 1)), 4, 2),
        (Twice((0, -1)), 4, 1),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), 3, 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), 3, 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)), 3, 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), 3, 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout(), nn.BatchNorm2d(4)), 3, 0),
        (nn.Sequential(nn.Flatten(2), nn.Linear(36, 4), nn.BatchNorm1d(3)), 3, 1),  # norm over tokens, not features
    ],
)
def test_norms_that_cannot_be_folded_stay(network: nn.Module, channels: int, left: int) -> None:
    x = torch.randn(2, channels, 6, 6, generator=torch.Generator().manual_seed(1))
    graph = fold_batch_norm(capture(randomized(network), x))
    assert calls(graph).count("batch_norm") == left
    with torch.no_grad():
        assert difference(network(x), graph(x)) < 1e-5


@pytest.mark.parametrize(
    ("name", "left"),
    [("resnet50", 0), ("conv_used_twice_before_bn", 1), ("bn_before_conv", 2), ("conv_with_two_bns", 2),
     ("tied_convs", 1), ("bn_called_twice", 0), ("bn_variants", 1), ("preact_resnet", 4), ("linear_batchnorm", 0)],
)  # fmt: skip
def test_norms_left_in_the_test_networks(name: str, left: int) -> None:
    assert calls(folded(name)).count("batch_norm") == left


def test_folding_copies() -> None:
    graph = captured("resnet50")
    before = {name: tensor.clone() for name, tensor in graph.named_buffers()}
    nodes = [str(n) for n in graph.graph.nodes]
    result = fold_batch_norm(graph)
    assert isinstance(result, fx.GraphModule)
    assert [str(n) for n in graph.graph.nodes] == nodes
    after = dict(graph.named_buffers())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert "batch_norm" in calls(graph)
    assert "batch_norm" not in calls(result)
    assert not any("running" in name for name, _ in result.named_buffers()), "the norms' statistics are gone"


def test_a_network_without_norms_is_only_copied() -> None:
    graph = captured("lenet")
    result = fold_batch_norm(graph)
    assert calls(result) == calls(graph)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(result(x), graph(x))
