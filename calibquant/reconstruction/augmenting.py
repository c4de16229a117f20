"""Images changed at random, so that a few hundred of them teach a whole network; the float network labels them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SHIFT = 8  # images are shifted by up to this part of a side
PATCH = (0.25, 0.75)  # sides of a patch from another image, as shares of this one's
PATCHED = 0.5  # share of the images that get one


def augmented(images: Tensor) -> Tensor:
    """Images mirrored, shifted and patched at random, of torch's random stream.

    Args:
        images: float32, (N, C, H, W).
    """
    return patched(flipped_and_shifted(images))


def flipped_and_shifted(images: Tensor) -> Tensor:
    """Each image mirrored or not, and shifted by up to an eighth of its sides, the border reflected; (N, C, H, W)."""
    n, _, height, width = images.shape
    mirrored = torch.rand(n) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1).to(images.device), images.flip(3), images)
    down, right = height // SHIFT, width // SHIFT
    padded = F.pad(images, (right, right, down, down), mode="reflect")
    tops, lefts = torch.randint(2 * down + 1, (n,)).tolist(), torch.randint(2 * right + 1, (n,)).tolist()
    crops = [padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(zip(tops, lefts, strict=True))]
    return torch.stack(crops)


def patched(images: Tensor) -> Tensor:
    """Half of the images with a rectangle out of another image, as in CutMix (Yun et al., ICCV 2019)."""
    n, _, height, width = images.shape
    covered = _span(n, height)[:, :, None] & _span(n, width)[:, None, :] & (torch.rand(n, 1, 1) < PATCHED)
    return torch.where(covered[:, None].to(images.device), images[torch.randperm(n).to(images.device)], images)


def _span(n: int, side: int) -> Tensor:
    """For each image the positions along a side that a patch covers, bool (n, side)."""
    length = (side * torch.empty(n).uniform_(*PATCH)).round().clamp(min=1)
    start = ((side + 1 - length) * torch.rand(n)).floor()
    at = torch.arange(side)
    return (at >= start[:, None]) & (at < (start + length)[:, None])
