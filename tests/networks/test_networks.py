"""The test networks themselves: they run, are deterministic, and the dispatcher's counts equal counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from . import NETWORKS, UNTRACEABLE, count_compute


def test_there_are_enough_networks() -> None:
    assert sum(case.published for case in NETWORKS.values()) >= 14
    assert sum(not case.published for case in NETWORKS.values()) >= 16


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETWORKS)
def test_network_runs_and_depends_on_its_input(name: str) -> None:
    case = NETWORKS[name]
    network = case.build()
    x = case.example(batch=3)
    assert x.shape == (3, *case.input_shape)
    kept = x.clone()
    before = torch.get_rng_state()
    with torch.no_grad():
        y = network(x)
        again = case.build()(kept.clone())
        single = network(kept[:1].clone())
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(y, Tensor)
    assert not network.training
    assert bool(torch.isfinite(y).all())
    assert torch.equal(y, again)
    assert torch.equal(x, kept), "the network changes its input"
    torch.testing.assert_close(single, y[:1], rtol=1e-4, atol=1e-4)
    assert float((y[0] - y[1]).abs().max()) > 1e-3
    assert float(y.abs().max()) < 1e4


@pytest.mark.parametrize("name", NETWORKS)
def test_batchnorm_is_far_from_the_identity(name: str) -> None:
    norms = [m for m in NETWORKS[name].build().modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert float(norm.running_mean.abs().max()) > 0.05
        assert float((norm.running_var - 1).abs().max()) > 0.05


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_untraceable_networks_run(name: str) -> None:
    case = UNTRACEABLE[name]
    with torch.no_grad():
        case.build()(case.example())


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        # the stem, four first blocks of 4 convolutions, and one more block of 3 in stages 1 and 3
        ("resnet50", {"convolution": 1 + 4 * 4 + 2 * 3, "matmul": 1, "add": 6, "pool": 2}),
        ("googlenet", {"convolution": 1 + 2 * 6, "matmul": 1, "add": 0, "pool": 1 + 1 + 1 + 2}),
        ("cifar_resnet", {"convolution": 1 + 6 * 2, "matmul": 1, "add": 6, "pool": 1}),
        # qkv, q @ k, @ v, proj, fc; the biases of Linears on maps do not count as additions; the mean over tokens
        ("attention", {"convolution": 1, "matmul": 5, "add": 1, "pool": 1}),
        # the standardization's subtractions are on weights and do not count
        ("weight_standardized", {"convolution": 3, "matmul": 1, "add": 0, "pool": 1}),
        # the sum of features and positions, the mean over patches
        ("positions", {"convolution": 1, "matmul": 1, "add": 1, "pool": 1}),
        # middle runs second(x), y.add_(x), x += y, x + z * 0.5, then second again
        ("inplace_reused", {"convolution": 3, "matmul": 1, "add": 3, "pool": 1}),
        # sum() of three tensors adds two of them to 0 + x, and 0 is a number
        ("additions", {"convolution": 3, "matmul": 1, "add": 3 + 1 + 1 + 2, "pool": 1}),
        ("unet", {"convolution": 5 * 2 + 2 + 1, "matmul": 0, "add": 0, "pool": 2}),
    ],
)
def test_dispatch_counts_equal_counts_by_hand(name: str, counts: dict[str, int]) -> None:
    case = NETWORKS[name]
    assert count_compute(case.build(), case.example()) == counts
