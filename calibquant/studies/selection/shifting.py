"""Candidates that differ from what the network will see: blurred, dark, or without a class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from calibquant.data import ImageSet
from calibquant.errors import unknown

SHARE = 0.5  # of the candidates that are changed
SIGMA = 1 / 16  # of the blur, of the shorter side
DARK = 0.25  # of the brightness that is left


class Shifted(ImageSet):
    """A set of which some images are blurred or darkened; labels, names and hashes stay.

    Args:
        base: the set.
        shift: "blurred" or "dark".
        changed: which images.
        black: what a black pixel is after preprocessing, (C,).
    """

    def __init__(self, base: ImageSet, shift: str, changed: Sequence[int], black: Tensor) -> None:
        super().__init__(base.classes, base.on_error)
        self.base, self.shift, self.changed, self.black = base, shift, frozenset(changed), black
        self.skipped = base.skipped

    def __len__(self) -> int:
        return len(self.base)

    def image(self, i: int) -> Tensor:
        image = self.base.image(i)
        if i not in self.changed:
            return image
        if self.shift not in ("blurred", "dark"):
            raise unknown("shift", self.shift, ("blurred", "dark"))
        return blurred(image) if self.shift == "blurred" else darkened(image, self.black)

    def label(self, i: int) -> int | None:
        return self.base.label(i)

    def name(self, i: int) -> str:
        return self.base.name(i)

    def sha256(self, i: int) -> str:
        return self.base.sha256(i)


def blurred(image: Tensor) -> Tensor:
    """An image after a Gaussian blur of SIGMA times its shorter side, edges repeated; float32 (C, H, W)."""
    sigma = SIGMA * min(image.shape[1:])
    reach = max(1, round(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).expand(len(image), 1, 1, -1)
    padded = F.pad(image[None], (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, weights, groups=len(image))
    return F.conv2d(rows, weights.mT, groups=len(image))[0]


def darkened(image: Tensor, black: Tensor) -> Tensor:
    """An image with DARK of its brightness; float32 (C, H, W)."""
    floor = black[:, None, None]
    return floor + (image - floor) * DARK


def shifted_candidates(
    images: ImageSet, indices: Sequence[int], shift: str, draw: int, black: Tensor
) -> tuple[ImageSet, list[int]]:
    """A set and the candidates of a draw in it, as a shift makes them."""
    if shift == "none":
        return images, list(indices)
    if shift == "missing-class":
        labels = images.labels()
        classes = np.unique(labels[labels >= 0])
        gone = int(classes[draw % len(classes)]) if len(classes) else -1
        return images, [int(i) for i in indices if labels[i] != gone]
    changed = np.random.default_rng([draw, len(indices)]).permutation(len(indices))[: round(SHARE * len(indices))]
    return Shifted(images, shift, [int(indices[i]) for i in changed], black), list(indices)
