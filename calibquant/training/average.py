"""An exponential moving average of a network's weights (Polyak and Juditsky, 1992; Tan and Le, ICML 2019)."""

from __future__ import annotations

import torch
from torch import nn


def update_average(average: nn.Module, network: nn.Module, decay: float, updates: int) -> None:
    """average := d * average + (1 - d) * network, for parameters and BatchNorm statistics alike, in place.

    d = min(decay, (1 + updates) / (10 + updates)), so that the random start is soon forgotten. Integer buffers
    (BatchNorm's counters) are copied.

    Args:
        average: a copy of the network.
        network: after an optimizer's step.
        decay: 0 to below 1.
        updates: how many there were before.
    """
    keep = min(decay, (1 + updates) / (10 + updates))
    with torch.no_grad():
        for old, new in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
            if old.is_floating_point():
                old.lerp_(new, 1 - keep)
            else:
                old.copy_(new)
