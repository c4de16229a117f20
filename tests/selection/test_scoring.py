"""What is kept of each image, against a plain forward pass of the network with hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibquant import TensorImages
from calibquant.graph import capture, fold_batch_norm
from calibquant.selection import Pool, labelled_pool, score_pool
from calibquant.selection.scoring import FILTERS, MOST_CHANNELS

IMAGES = torch.rand(20, 3, 9, 9, generator=torch.Generator().manual_seed(1)) * 2 - 1


def network() -> nn.Sequential:
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(3, 70, 3), nn.BatchNorm2d(70), nn.ReLU(), nn.Conv2d(70, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    net.train()(IMAGES)
    return net.eval()


NET = network()
TEACHER = fold_batch_norm(capture(NET, IMAGES[:3]))
LABELS = [-1, *range(4)] * 4


def scored(batch_size: int = 7, seed: int = 0, images: Tensor = IMAGES) -> Pool:
    return score_pool(TensorImages(images, LABELS), range(len(images)), TEACHER, seed=seed, batch_size=batch_size)


POOL = scored()


def inputs_of_layers() -> list[Tensor]:
    """What enters both convolutions and the linear layer."""
    with torch.no_grad():
        inner = NET[2](NET[1](NET[0](IMAGES)))
        return [IMAGES, inner, NET[6](NET[5](NET[4](NET[3](inner))))]


def test_the_layers_and_the_size_of_what_is_kept() -> None:
    assert len(POOL.layers) == 3
    assert POOL.means is not None
    assert POOL.means.shape == (20, 3, FILTERS)
    assert POOL.peaks is not None
    assert POOL.peaks.shape == (20, 3 + MOST_CHANNELS + 4)
    assert POOL.peak_layers is not None
    assert np.bincount(POOL.peak_layers).tolist() == [3, MOST_CHANNELS, 4]


def test_squares_are_linear_in_the_second_moments_of_patches() -> None:
    """r^T G r for the random filters r, with G = E[x x^T] over the patches of each image."""
    random = torch.Generator().manual_seed(0)
    filters = torch.randn((FILTERS, 3, 3, 3), generator=random) / 27**0.5
    patches = F.unfold(IMAGES, 3, stride=2)  # (N, 27, positions): maps of 8 and more are looked at in every other place
    gram = torch.einsum("nap,nbp->nab", patches, patches) / patches.shape[2]
    rows = filters.flatten(1)
    assert POOL.squares is not None
    assert POOL.means is not None
    assert POOL.squares[:, 0] == pytest.approx(torch.einsum("fa,nab,fb->nf", rows, gram, rows).numpy(), rel=1e-4)
    assert POOL.means[:, 0] == pytest.approx((patches.mean(2) @ rows.T).numpy(), abs=1e-5)


def test_peaks_are_the_largest_values_of_channels() -> None:
    image, _, features = inputs_of_layers()
    assert POOL.peaks is not None
    assert POOL.peaks[:, :3] == pytest.approx(image.abs().amax((2, 3)).numpy(), rel=1e-6)
    assert POOL.peaks[:, -4:] == pytest.approx(features.abs().numpy(), rel=1e-4)


def test_classes_losses_and_certainty() -> None:
    with torch.no_grad():
        logits = NET(IMAGES)
    classes = torch.tensor(LABELS)
    classes = torch.where(classes < 0, logits.argmax(1), classes)
    assert POOL.classes.tolist() == classes.tolist()
    shares = logits.softmax(1).sort(1, descending=True).values
    expected = {
        "loss": F.cross_entropy(logits, classes, reduction="none"),
        "margin": shares[:, 0] - shares[:, 1],
        "uncertainty": torch.distributions.Categorical(logits=logits).entropy(),
    }
    for name, value in expected.items():
        assert POOL.values[name] == pytest.approx(value.numpy(), rel=1e-4, abs=1e-6), name


def test_distance_from_what_batch_norm_expects() -> None:
    norm = NET[1]
    with torch.no_grad():
        after = norm(NET[0](IMAGES)).flatten(2)
        sigma = norm.weight.abs() * (norm.running_var / (norm.running_var + norm.eps)).sqrt()
        gap = (after.mean(2) - norm.bias) ** 2 + (after.std(2, correction=0) - sigma) ** 2
        expected = (gap / sigma**2).mean(1)
    assert POOL.values["bn_distance"] == pytest.approx(expected.numpy(), rel=1e-3)


def test_tops_are_the_largest_values_of_all_channels() -> None:
    wanted = torch.stack([x.abs().flatten(1).amax(1) for x in inputs_of_layers()], 1)
    assert POOL.tops == pytest.approx(wanted.numpy(), rel=1e-4)
    assert len(POOL.entering) == 3


def test_every_layer_has_tops_also_where_there_are_too_many_to_be_looked_at() -> None:
    deep = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(20)), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    found = score_pool(TensorImages(IMAGES), range(5), capture(deep, IMAGES[:3]))
    assert (len(found.layers), len(found.entering)) == (16, 20)
    assert found.tops is not None
    with torch.no_grad():
        assert found.tops[:, 7] == pytest.approx(deep[:7](IMAGES[:5]).abs().flatten(1).amax(1).numpy(), rel=1e-5)


def test_reach_ranks_peaks_within_the_pool() -> None:
    assert POOL.peaks is not None
    ranks = (POOL.peaks[:, None] > POOL.peaks[None]).mean(1).mean(1)
    assert POOL.values["reach"] == pytest.approx(ranks, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 20])
def test_the_batch_size_changes_nothing_but_rounding(batch_size: int) -> None:
    other = scored(batch_size)
    assert other.squares == pytest.approx(POOL.squares, rel=1e-3)
    assert other.peaks == pytest.approx(POOL.peaks, rel=1e-5)


def test_another_seed_draws_other_filters() -> None:
    other = scored(seed=1)
    assert np.abs(other.squares - POOL.squares).max() > 0.01
    assert np.array_equal(other.classes, POOL.classes)


def test_a_pool_of_labels_reads_no_image() -> None:
    class Unreadable(TensorImages):
        def image(self, i: int) -> Tensor:
            raise AssertionError("an image was read")

    pool = labelled_pool(Unreadable(IMAGES, LABELS), [4, 0])
    assert (pool.indices.tolist(), pool.classes.tolist()) == ([4, 0], [3, -1])
