"""Images changed at random, so that a few hundred of them teach a whole network; the float network labels them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ZOOM = 0.3  # images are magnified by exp(-ZOOM) to exp(ZOOM)
TURN = math.radians(15)  # and turned by up to this angle,
SHIFT = 0.15  # and shifted by up to this share of a side
CONTRAST, COLOR = 0.3, 0.3  # how far values are stretched, and channels shifted in standard deviations of all values
PATCH = (0.25, 0.75)  # sides of a patch from another image, as shares of this one's
MOVE = 0.125  # versions of an image are shifted by up to this share of a side
PATCHED = 0.5  # share of the images that get one


def versions(images: Tensor, count: int, seed: int) -> Tensor:
    """Each image in several versions: as it is, and mirrored or not and shifted, the border reflected.

    What units learn from is computed once and kept, so their images cannot change in every step.

    Args:
        images: float32, (N, C, H, W).
        count: of versions; 1 returns the images.
        seed: of the changes.

    Returns:
        (count * N, C, H, W), version after version.
    """
    if count == 1:
        return images
    random = torch.Generator().manual_seed(seed)
    height, width = images.shape[2:]
    down, right = (int(side * MOVE) for side in (height, width))
    shown = images.repeat(count, 1, 1, 1)
    n = len(shown) - len(images)
    tops, lefts = (torch.randint(0, 2 * most + 1, (n,), generator=random).tolist() for most in (down, right))
    mirrored = (torch.rand(n, generator=random) < 0.5).tolist()
    for image, top, left, mirror in zip(shown[len(images) :], tops, lefts, mirrored, strict=True):
        padded = F.pad(image[None], (right, right, down, down), mode="reflect")[0]
        new = padded[:, top : top + height, left : left + width]
        image.copy_(new.flip(2) if mirror else new)
    return shown


def augmented(images: Tensor) -> Tensor:
    """Images warped, recolored and patched at random, of torch's random stream.

    Args:
        images: float32, (N, C, H, W).
    """
    return patched(recolored(warped(images, random_warps(len(images)))))


def random_warps(n: int) -> Tensor:
    """Maps from places in the new image to places in the old one, float32 (n, 2, 3): mirrored or not, zoomed, turned,
    shifted; in coordinates from -1 to 1.
    """
    zoom, turn = torch.exp(_between(n, ZOOM)), _between(n, TURN)
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    shift = torch.stack([_between(n, 2 * SHIFT), _between(n, 2 * SHIFT)])
    across, down = zoom * turn.cos(), zoom * turn.sin()
    rows = [torch.stack([mirror * across, -down, shift[0]], 1), torch.stack([mirror * down, across, shift[1]], 1)]
    return torch.stack(rows, 1)


def warped(images: Tensor, warps: Tensor) -> Tensor:
    """Each image seen through its map, bilinear, the border reflected; (N, C, H, W)."""
    grid = F.affine_grid(warps.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def recolored(images: Tensor) -> Tensor:
    """Each image's values stretched, and its channels shifted."""
    n, channels = images.shape[:2]
    stretch, shift = 1 + _between(n, CONTRAST), _between(n * channels, COLOR).view(n, channels) * float(images.std())
    return images * stretch.view(n, 1, 1, 1).to(images.device) + shift[:, :, None, None].to(images.device)


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


def _between(n: int, most: float) -> Tensor:
    """Numbers from -most to most, float32 (n,)."""
    return torch.empty(n).uniform_(-most, most)
