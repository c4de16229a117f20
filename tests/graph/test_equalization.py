"""Equalization: the same function, with channels of equal weight ranges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from networks import NETWORKS, difference, folded, values_of
from torch import Tensor, fx, nn

from calibquant.graph import capture, equalize, fold_batch_norm
from calibquant.graph import equalization as module
from calibquant.graph.capture import TOLERANCE
from calibquant.graph.equalization import rescale
from calibquant.graph.nodes import weight_of
from calibquant.graph.pairs import find_pairs


def names(graph: fx.GraphModule) -> list[tuple[str, str]]:
    return [(pair.producer.name, pair.consumer.name) for pair in find_pairs(graph)]


def weights(graph: fx.GraphModule) -> list[Tensor]:
    return [graph.get_buffer(str(weight_of(n).target)) for n in graph.graph.nodes if weight_of(n)]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_stays_the_same_function(name: str) -> None:
    graph, x = folded(name), NETWORKS[name].example(6, seed=1)
    if sum(n.op == "placeholder" for n in graph.graph.nodes) != 1:
        pytest.skip("images enter by one input here")
    before = {name: tensor.clone() for name, tensor in graph.named_buffers()}
    found = equalize(graph, lambda: x.split(3))
    assert not found.undone
    assert found.difference <= TOLERANCE
    with torch.no_grad():
        assert difference(graph(x), found.graph(x)) <= TOLERANCE
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.named_buffers()), "the given graph is kept"


def test_two_layers_meet_at_the_geometric_mean_of_their_ranges() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3)).eval()
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-2, 2, 6).reshape(-1, 1, 1, 1))
        net[0].weight[5] = 0  # a dead channel keeps its scale
    graph = capture(net, torch.rand(2, 3, 12, 12))
    edited, (report,) = rescale(graph, {})
    first, second = (w.numpy() for w in weights(graph))
    want = np.sqrt(np.abs(first).max((1, 2, 3)) * np.abs(second).max((0, 2, 3)))[:5]
    got_first, got_second = (w.numpy() for w in weights(edited))
    assert np.allclose(np.abs(got_first).max((1, 2, 3))[:5], want, rtol=1e-4)
    assert np.allclose(np.abs(got_second).max((0, 2, 3))[:5], want, rtol=1e-4)
    assert np.array_equal(got_second[:, 5], second[:, 5])
    assert (report.channels, report.scaled, report.held) == (6, 5, 0)
    assert report.producer_spread[0] > 5 * report.producer_spread[1]


def test_a_chain_through_a_depthwise_layer_ends_where_both_pairs_agree() -> None:
    """The fixed point by plain loops over channels in numpy."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.LeakyReLU(0.2), nn.Conv2d(5, 5, 3, groups=5, bias=False), nn.PReLU(5),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[2].weight.mul_(torch.logspace(-1, 1, 5).reshape(-1, 1, 1, 1))
    graph = capture(net, torch.rand(2, 3, 8, 8))
    edited, reports = rescale(graph, {})
    assert len(reports) == 2
    a, b, c = (w.double().numpy() for w in weights(graph))
    c = c.reshape(3, 5, 4)
    for i in range(5):
        r = [np.abs(a[i]).max(), np.abs(b[i]).max(), np.abs(c[:, i]).max()]
        for _ in range(2000):
            s = math.sqrt(r[0] / r[1])
            r = [r[0] / s, r[1] * s, r[2]]
            s = math.sqrt(r[1] / r[2])
            r = [r[0], r[1] / s, r[2] * s]
        assert r[0] == pytest.approx(np.prod([np.abs(w).max() for w in (a[i], b[i], c[:, i])]) ** (1 / 3), rel=1e-6)
        got = [w.double().numpy() for w in weights(edited)]
        found = [np.abs(got[0][i]).max(), np.abs(got[1][i]).max(), np.abs(got[2].reshape(3, 5, 4)[:, i]).max()]
        assert found == pytest.approx(r, rel=1e-3)


def relu6_network() -> nn.Sequential:
    """Three channels between two convolutions: one far below 6, one cut at 6, one close below it."""
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU6(), nn.Conv2d(3, 2, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.5, 9.0, 5.5]).reshape(3, 1, 1, 1))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[8.0, 0.1, 0.1], [1.0, 0.2, 0.3]]).reshape(2, 3, 1, 1))
    return net


def test_a_limit_bounds_how_far_a_channel_is_scaled_up_and_holds_one_that_reaches_it() -> None:
    x = torch.linspace(0, 1, 64).reshape(4, 1, 4, 4)
    graph = capture(relu6_network(), x)
    found = equalize(graph, lambda: [x])
    (report,) = found.pairs
    assert (report.scaled, report.held) == (1, 2)
    first = weights(found.graph)[0].flatten()
    assert first.tolist() == pytest.approx([2.0, 9.0, 5.5]), "2 = sqrt(0.5 * 8)"
    weights(graph)[1][0, 0] = 800.0
    first = weights(equalize(graph, lambda: [x]).graph)[0].flatten()
    assert first[0].item() == pytest.approx(6 / 1.25), "not sqrt(0.5 * 800) = 20, which would be cut at 6"
    _, (report,) = rescale(graph, {})
    assert report.scaled == 0, "without ranges what a limit follows is left alone"


def test_a_channel_never_outgrows_its_tensor() -> None:
    """A nearly dead channel with a bias: without the bound its weights would be scaled up by 1000, and its bias too."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 1e-6]).reshape(2, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([0.0, 0.5]))
        net[2].weight.fill_(1.0)
    x = torch.linspace(0, 1, 32).reshape(2, 1, 4, 4)
    found = equalize(capture(net, x), lambda: [x])
    between = values_of(found.graph, x)["_0"]
    assert float(between.max()) <= 1.0 + 1e-6
    assert [pair.scaled for pair in found.pairs] == [1], "only so far as its bias stays below the other's values"


def test_biases_are_absorbed_where_the_rectifier_never_acts() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3)).eval()
    net[1].bias.data.copy_(torch.tensor([9.0, 0.0, 4.0]))
    net[1].running_var.fill_(float(net[0].weight.detach().square().sum(1).mean()))
    x = torch.randn(8, 2, 6, 6)
    found = equalize(fold_batch_norm(capture(net, x)), lambda: [x])
    (report,) = found.pairs
    assert 1 <= report.absorbed <= 2
    assert found.difference <= TOLERANCE
    padded = nn.Sequential(net[0], net[1], net[2], nn.Conv2d(3, 2, 3, padding=1)).eval()
    (report,) = equalize(fold_batch_norm(capture(padded, x)), lambda: [x]).pairs
    assert report.absorbed == 0, "at the border the padded zeros are no shifted values"


def test_what_changes_the_network_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(4, 1, 4, 4)
    graph = capture(relu6_network(), x)
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    found = equalize(graph, lambda: [x])
    assert found.undone
    assert found.graph is graph
    assert found.pairs == ()


def test_pairs_need_a_single_reader_and_functions_that_let_a_scale_pass() -> None:
    x = torch.rand(2, 4, 8, 8)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.c(torch.sigmoid(self.b(torch.relu(y)))) + y

    assert names(capture(Two(), x)) == []
    conv = nn.Conv2d(4, 4, 1)
    assert names(capture(nn.Sequential(conv, nn.ReLU(), conv), x)) == [], "a weight used twice stays"
    assert names(capture(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(8, 2)), x)) == [], "its inputs are columns"
    assert len(names(capture(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 2)), x))) == 1
