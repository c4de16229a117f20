"""The handwritten digits that come with scikit-learn: 1,797 grey images of 8 × 8, for demos and tests without files."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from calibquant.data.imageset import ImageSet
from calibquant.data.preprocess import preprocess_pixels, to_image
from calibquant.recipe import Preprocess

TRAIN_COUNT = 1200
SPLIT_SEED = 0


class DigitImages(ImageSet):
    """A split of the digits, one channel; names are `digits#17`, counted in scikit-learn's order."""

    def __init__(self, split: str, settings: Preprocess) -> None:
        super().__init__([str(digit) for digit in range(10)])
        pixels, targets = _load()
        order = np.random.default_rng(SPLIT_SEED).permutation(len(pixels))
        self._order = order[TRAIN_COUNT:] if split == "test" else order[:TRAIN_COUNT]
        self._pixels, self._targets, self._settings = pixels, targets, settings

    def __len__(self) -> int:
        return len(self._order)

    def image(self, i: int) -> Tensor:
        return preprocess_pixels(self._pixels[self._order[i]][None], self._settings, self.name(i))

    def decoded(self, i: int) -> Image.Image:
        return to_image(self._pixels[self._order[i]][None])

    def label(self, i: int) -> int:
        return int(self._targets[self._order[i]])

    def name(self, i: int) -> str:
        return f"digits#{self._order[i]}"

    def sha256(self, i: int) -> str:
        return hashlib.sha256(self._pixels[self._order[i]].tobytes()).hexdigest()

    def labels(self) -> npt.NDArray[np.int64]:
        return self._targets[self._order]


@cache
def _load() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels (1797, 8, 8), their grey values 0..16 spread over 0..255, and targets (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)
