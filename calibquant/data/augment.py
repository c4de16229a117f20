"""Random changes of training images. What happens to an image depends on (seed, epoch, its index) and nothing else, so
that neither the order of the images nor the number of workers matters.

Sources: random crops of padded images and flips as in He et al. (CVPR 2016, section 4.2); random-resized crops as in
Szegedy et al. (CVPR 2015, section 6) with the bounds of torchvision; cutout of DeVries and Taylor (arXiv:1708.04552).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from calibquant.data.imageset import ImageSet, Subset
from calibquant.data.preprocess import check_preprocess, normalize, resize, to_tensor
from calibquant.errors import DataError
from calibquant.recipe import AugmentRecipe, Preprocess

BITS = 31  # of a draw d; the choice of one among n is (n d) >> BITS
TOP, LEFT, FLIP, HOLE_ROW, HOLE_COLUMN = range(5)  # what the columns of the draws decide
ATTEMPTS = 10  # at a random-resized crop that fits into the image
_SHIFTS, _CROPS = 1, 2  # streams of their own


def epoch_draws(count: int, seed: int, epoch: int) -> Tensor:
    """The random numbers of an epoch: int64 in 0 … 2³¹ - 1, shape (count, 5), a row for each image of the set."""
    return torch.from_numpy(np.random.default_rng([_SHIFTS, seed, epoch]).integers(0, 1 << BITS, (count, 5)))


def augment(images: Tensor, draws: Tensor, settings: AugmentRecipe, preprocess: Preprocess) -> Tensor:
    """A batch of preprocessed images after padding and cropping, flip and cutout, as far as the settings ask for them.

    Args:
        images: floating point, shape (N, C, H, W).
        draws: rows of `epoch_draws`, one for each image, on the images' device.
        settings: the recipe's `data.augment`.
        preprocess: tells what a black pixel is.

    Returns:
        the shape and dtype of `images`.

    Raises:
        DataError: black pixels are asked for, and the preprocessing is for another number of channels.
    """
    if settings.pad:
        images = _shift(images, draws, settings.pad, black_of(preprocess, images.shape[1]))
    if settings.flip:
        images = torch.where((draws[:, FLIP] >> (BITS - 1) == 0)[:, None, None, None], images.flip(-1), images)
    if settings.cutout:
        images = _cut(images, draws, settings.cutout)
    return images


def black_of(settings: Preprocess, channels: int) -> Tensor:
    """What a black pixel is after preprocessing: (0 - mean) / std, float32, shape (channels,).

    Raises:
        DataError: mean or std is for another number of channels.
    """
    check_preprocess(settings, channels)
    return normalize(np.zeros((channels, 1, 1), np.uint8), settings).flatten()


def _shift(images: Tensor, draws: Tensor, pad: int, black: Tensor) -> Tensor:
    """For each image a random one of the (2 pad + 1)² places of a crop of its size in the padded image."""
    n, _, height, width = images.shape
    padded = black.to(images)[None, :, None, None].expand(n, -1, height + 2 * pad, width + 2 * pad).clone()
    padded[:, :, pad : pad + height, pad : pad + width] = images
    top, left = ((draws[:, column] * (2 * pad + 1)) >> BITS for column in (TOP, LEFT))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, places, places, H, W)
    return windows[torch.arange(n, device=images.device), :, top, left]


def _cut(images: Tensor, draws: Tensor, side: int) -> Tensor:
    """A square of zeros (the mean) around a random pixel; at the border a part of it lies outside."""
    inside = []
    for column, length in ((HOLE_ROW, images.shape[2]), (HOLE_COLUMN, images.shape[3])):
        first = ((draws[:, column] * length) >> BITS) - side // 2
        offset = torch.arange(length, device=images.device)[None] - first[:, None]
        inside.append((offset >= 0) & (offset < side))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(hole, 0.0)


def crop_box(
    width: int, height: int, settings: AugmentRecipe, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) in an image: its share of the area uniform, its ratio log-uniform.

    After ten boxes that do not fit: the largest central one whose ratio is allowed.
    """
    scale = settings.scale or (1.0, 1.0)
    low, high = (math.log(ratio) for ratio in settings.ratio)
    for _ in range(ATTEMPTS):
        area = width * height * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(generator.integers(0, room + 1)) for room in (width - w, height - h))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * settings.ratio[1])))
    h = min(height, max(1, round(width / settings.ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class Augmented(Subset):
    """All images of a set as one epoch changes them; names, labels and hashes are those of the set.

    Args:
        base: the set.
        settings: the recipe's `data.augment`.
        preprocess: the settings that the set was opened with.
        seed, epoch: of the draws.

    Raises:
        DataError: random-resized crops are asked for, and the preprocessing names no crop as their size.

    Example:
        >>> from calibquant.data import TensorImages
        >>> images = TensorImages(torch.rand(4, 3, 8, 8))
        >>> Augmented(images, AugmentRecipe(flip=True), Preprocess(), seed=7, epoch=0).image(0).shape
        torch.Size([3, 8, 8])
    """

    def __init__(self, base: ImageSet, settings: AugmentRecipe, preprocess: Preprocess, seed: int, epoch: int) -> None:
        super().__init__(base, range(len(base)))
        if settings.scale is not None and preprocess.crop is None:
            raise DataError("data.augment.scale", "random-resized crops need their size", "set data.preprocess.crop")
        self._settings, self._preprocess, self._seed, self._epoch = settings, preprocess, seed, epoch
        self._draws = epoch_draws(len(base), seed, epoch)

    def image(self, i: int) -> Tensor:
        image = super().image(i) if self._settings.scale is None else self._random_crop(i)
        return augment(image[None], self._draws[i : i + 1], self._settings, self._preprocess)[0]

    def _random_crop(self, i: int) -> Tensor:
        image, size = self.decoded(i), self._preprocess.crop
        height, width = (size, size) if isinstance(size, int) else size or image.size[::-1]
        generator = np.random.default_rng([_CROPS, self._seed, self._epoch, i])
        crop = image.crop(crop_box(*image.size, self._settings, generator))
        return to_tensor(resize(crop, (height, width), self._preprocess.interpolation), self._preprocess)
