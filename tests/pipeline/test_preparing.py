"""The check of the folded network: rounding that a network amplifies passes, a wrong fold does not."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from calibquant import TensorImages
from calibquant.errors import CaptureError
from calibquant.graph.capture import TOLERANCE, relative_difference
from calibquant.pipeline import preparing
from calibquant.recipe import make_recipe

RECIPE = make_recipe({"calibration": {"count": 4}})
IMAGES = TensorImages(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def cancelling() -> nn.Module:
    """BatchNorm subtracts a mean far above the deviation, so that float32 loses digits before and after folding."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    with torch.no_grad():
        assert conv.bias is not None
        conv.bias.fill_(300.0)
        norm.running_mean.fill_(300.0)  # type: ignore[union-attr]
        norm.running_var.fill_(0.01)  # type: ignore[union-attr]
    return nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


def test_rounding_that_the_network_amplifies_is_no_wrong_fold() -> None:
    network = cancelling()
    prepared = preparing.prepare(RECIPE, network, IMAGES)
    x = torch.stack([IMAGES.image(i) for i in range(3)])
    with torch.no_grad():
        assert relative_difference(network(x), prepared.teacher(x)) > TOLERANCE


def test_a_wrong_fold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = preparing.fold_batch_norm

    def wrong(graph: fx.GraphModule) -> fx.GraphModule:
        folded = fold(graph)
        with torch.no_grad():
            for tensor in (*folded.parameters(), *folded.buffers()):
                tensor.mul_(1.001)
        return folded

    monkeypatch.setattr(preparing, "fold_batch_norm", wrong)
    with pytest.raises(CaptureError, match=r"BatchNorm folding: changes the network by \d"):
        preparing.prepare(RECIPE, cancelling(), IMAGES)
