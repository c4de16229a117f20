"""What BatchNorm tells about means, against Monte Carlo on networks whose statistics are true."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calibquant.graph import capture, fold_batch_norm, with_biases
from calibquant.graph.expectations import expected_product, expected_values, normal_of
from calibquant.graph.nodes import weight_of


class Branches(nn.Module):
    """1 × 1 convolutions of normal inputs: what they give is exactly normal, and its BatchNorms are given the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)
        self.relu6, self.silu, self.pool = nn.ReLU6(), nn.SiLU(), nn.AdaptiveAvgPool2d(1)
        self.mix, self.fc = nn.Conv2d(12, 5, 1, groups=1), nn.Linear(5 * 4, 3)
        for conv, norm in ((self.a, self.na), (self.b, self.nb)):
            weight = conv.weight.detach().flatten(1)
            norm.running_var.copy_(weight.square().sum(1))
            norm.running_mean.copy_(torch.zeros(6) if conv.bias is None else conv.bias.detach())
        nn.init.uniform_(self.na.weight, -2, 2)
        nn.init.uniform_(self.na.bias, -2, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.relu6(self.na(self.a(x))), self.silu(self.nb(self.b(x)))
        both = torch.cat([a + b, b], 1)
        return self.fc(torch.flatten(nn.functional.avg_pool2d(self.mix(both), 2), 1))


def test_means_follow_through_the_graph_as_monte_carlo_has_them() -> None:
    torch.manual_seed(0)
    network = Branches().eval()
    graph = fold_batch_norm(capture(network, torch.randn(2, 4, 4, 4)))
    known = expected_values(graph)
    with torch.no_grad():
        x = torch.randn(8_000, 4, 4, 4)
        a, b = network.relu6(network.na(network.a(x))), network.silu(network.nb(network.b(x)))
        mixed = network.mix(torch.cat([a + b, b], 1))
        want = {"relu6": a, "silu": b, "add": a + b, "cat": torch.cat([a + b, b], 1), "mix": mixed, "fc": network(x)}
    for name, values in want.items():
        mean = values.double().movedim(1, 0).flatten(1).mean(1)
        assert torch.allclose(known[name].mean, mean, atol=0.02 * (1 + float(mean.abs().max()))), name
    assert "x" not in known, "nothing is known of the image"


def test_after_a_sum_a_rectifier_has_no_known_mean() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1)
            self.c = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x) + self.c(x)))

    known = expected_values(fold_batch_norm(capture(Residual(), torch.rand(2, 3, 4, 4))))
    assert {"a_0", "c_0", "add"} <= set(known)
    assert not {"relu", "b"} & set(known)


def test_folding_keeps_what_the_norm_says_and_a_channel_without_variance_has_no_spread() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    net[1].running_var.copy_(torch.tensor([0.0, 4.0]))
    net[1].weight.data.copy_(torch.tensor([1.0, -3.0]))
    net[1].bias.data.copy_(torch.tensor([0.5, -0.5]))
    (call,) = [n for n in fold_batch_norm(capture(net, torch.rand(2, 3, 4, 4))).graph.nodes if weight_of(n)]
    normal = normal_of(call)
    assert normal is not None
    assert torch.allclose(normal.mean, torch.tensor([0.5, -0.5]))
    assert torch.allclose(normal.std, torch.tensor([0.0, 3.0]), atol=1e-4)


def test_a_grouped_product_of_means_is_the_sum_over_taps() -> None:
    from calibquant.graph.expectations import Expected

    graph = capture(nn.Conv2d(4, 6, 3, groups=2), torch.rand(2, 4, 5, 5))
    (node,) = [n for n in graph.graph.nodes if weight_of(n)]
    mean, weight = torch.rand(4, dtype=torch.float64), torch.randn(6, 2, 3, 3)
    found = expected_product(node, weight, Expected(mean))
    constant = mean.float().reshape(1, 4, 1, 1).expand(1, 4, 3, 3)
    want = nn.functional.conv2d(constant, weight, groups=2).flatten()
    assert found is not None
    assert torch.allclose(found.float(), want, atol=1e-5)
    assert expected_product(node, weight, Expected(torch.rand(3, dtype=torch.float64))) is None


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, bias=False), nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)])
def test_every_product_can_get_a_bias_and_computes_the_same(layer: nn.Module) -> None:
    graph, x = capture(layer, torch.rand(2, 4, 5, 5)), torch.randn(3, 4, 5, 5)
    edited = with_biases(graph)
    (node,) = [n for n in edited.graph.nodes if weight_of(n)]
    assert edited.get_buffer(str(node.args[2].target)).tolist() == [0.0] * 6  # type: ignore[union-attr]
    assert torch.equal(edited(x), graph(x))
    assert [n.name for n in with_biases(edited).graph.nodes] == [n.name for n in edited.graph.nodes]
