"""The loss with mixup and smoothing against cross-entropy with soft labels; the average against a loop."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import kstest
from torch import nn

from calibquant.training.average import update_average
from calibquant.training.losses import classification_loss, mixed, mixing


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_is_cross_entropy_with_mixed_soft_labels(smoothing: float) -> None:
    random = np.random.default_rng(3)
    logits, labels = random.normal(size=(11, 5)) * 3, random.integers(0, 5, 11)
    share, partners = mixing(11, 0.4, random)
    soft = (1 - smoothing) * np.eye(5) + smoothing / 5
    targets = share * soft[labels] + (1 - share) * soft[labels[partners.numpy()]]
    want = -(targets * log_softmax(logits, axis=1)).sum(axis=1).mean()
    got = classification_loss(
        torch.tensor(logits, dtype=torch.float32), torch.from_numpy(labels), smoothing, share, partners
    )
    assert float(got) == pytest.approx(want, rel=1e-6)


def test_images_are_mixed_with_the_same_share_and_partners() -> None:
    images = torch.randn(6, 3, 4, 4)
    share, partners = mixing(6, 1.0, np.random.default_rng(1))
    want = np.stack([
        share * images[i].double().numpy() + (1 - share) * images[int(partners[i])].double().numpy() for i in range(6)
    ])  # fmt: skip
    np.testing.assert_allclose(mixed(images, share, partners).numpy(), want, atol=1e-6)
    assert sorted(partners.tolist()) == list(range(6))


def test_the_share_is_beta_distributed() -> None:
    random = np.random.default_rng(4)
    shares = [mixing(2, 0.3, random)[0] for _ in range(3000)]
    assert kstest(shares, "beta", args=(0.3, 0.3)).pvalue > 1e-3


def test_the_average_is_what_a_loop_over_numbers_gives() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    average, decay = copy.deepcopy(network), 0.6
    want = {key: value.double().numpy().copy() for key, value in network.state_dict().items()}
    for step in range(8):
        network.train()(torch.randn(4, 1, 5, 5) + step)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        update_average(average, network, decay, step)
        keep = min(decay, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            want[key] = keep * want[key] + (1 - keep) * value.double().numpy()
    for key, value in average.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert int(value) == 8
        else:
            np.testing.assert_allclose(value.numpy(), want[key], rtol=1e-5, atol=1e-6)
