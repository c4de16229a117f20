"""Training images, epoch after epoch: in memory where they fit, else decoded ahead by the loader's threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibquant import parallel
from calibquant.data import Augmented, ImageSet, batches
from calibquant.data.augment import augment, epoch_draws
from calibquant.errors import DataError
from calibquant.recipe import AugmentRecipe, Preprocess

IN_MEMORY = 2 * 2**30  # bytes of preprocessed images
_ORDER, _HOLDOUT = 3, 4  # streams of their own; those of data.augment are 1 and 2


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled images to train on.

    Args:
        images: the set.
        augment: random changes of the images.
        preprocess: the settings that the set was opened with.
        batch_size: images a step.
        seed: of order and changes.
        device: where batches are wanted.
        stored: all images and labels on the device, or None where they are decoded anew in each epoch.
    """

    images: ImageSet
    augment: AugmentRecipe
    preprocess: Preprocess
    batch_size: int
    seed: int
    device: torch.device
    stored: tuple[Tensor, Tensor] | None

    @property
    def steps(self) -> int:
        """Batches in an epoch; images beyond the last full batch are left out, others in each epoch."""
        return steps_per_epoch(len(self.images), self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: images (N, C, H, W) float32 and labels (N,) int64.

        Of several processes each gets its share of every batch.

        Raises:
            DataError: an image cannot be read.
        """
        order = np.random.default_rng([_ORDER, self.seed, epoch]).permutation(len(self.images))
        mine = parallel.share(self.batch_size)
        order = order[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)[:, mine].ravel()
        if self.stored is None:
            changed = Augmented(self.images, self.augment, self.preprocess, self.seed, epoch)
            for batch in batches(changed, len(mine), order.tolist()):
                yield batch.images.to(self.device), batch.labels.to(self.device)
            return
        images, labels = self.stored
        draws = epoch_draws(len(images), self.seed, epoch).to(self.device)
        for chosen in torch.from_numpy(order).to(self.device).split(len(mine)):
            yield augment(images[chosen], draws[chosen], self.augment, self.preprocess), labels[chosen]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches of so many images, at least one."""
    return max(1, images // batch_size)


def open_source(
    images: ImageSet,
    augment: AugmentRecipe,
    preprocess: Preprocess,
    batch_size: int,
    seed: int,
    device: torch.device,
    labelled: bool = True,
) -> Source:
    """A source of the images; they are decoded once and kept if they fit into 2 GiB and need no random-resized crop.

    Args:
        images, augment, preprocess, batch_size, seed, device: as in `Source`.
        labelled: whether each image must have a label.

    Raises:
        DataError: there are fewer than two images, one has no label, or one cannot be read.
    """
    check_training_images(images, labelled)
    stored, example = None, next(batches(images, 1)).images
    if kept_bytes(len(images), example, augment):
        images, stored = _decode(images, example, device)
    return Source(images, augment, preprocess, min(batch_size, len(images)), seed, device, stored)


def check_training_images(images: ImageSet, labelled: bool = True) -> None:
    """Check that images can be trained on. No image is read.

    Raises:
        DataError: there are fewer than two images, or one has no label although each must have one.
    """
    if len(images) < 2:
        raise DataError("training images", f"are {len(images)}", "give at least 2")
    unknown = np.flatnonzero(images.labels() < 0)
    if labelled and unknown.size:
        raise DataError(
            images.name(int(unknown[0])), "has no label", "train on images in class folders, or with labels"
        )


def kept_bytes(count: int, example: Tensor, augment: AugmentRecipe) -> int:
    """Bytes of so many images like the first of `example` where they are kept in memory; 0 where they are not."""
    size = count * example[0].nbytes
    return size if augment.scale is None and size <= IN_MEMORY else 0


def _decode(images: ImageSet, example: Tensor, device: torch.device) -> tuple[ImageSet, tuple[Tensor, Tensor]]:
    """All images of a set with their labels, and the set without what cannot be read, where that is skipped."""
    stored, kept = torch.empty(len(images), *example.shape[1:]), list[int]()
    for batch in batches(images, 1000):
        if batch.images.shape[1:] != example.shape[1:]:
            problem = f"is of size {tuple(batch.images.shape[2:])}, others of {tuple(example.shape[2:])}"
            raise DataError(images.name(batch.indices[0]), problem, "set data.preprocess.resize and crop")
        stored[len(kept) : len(kept) + len(batch.indices)] = batch.images
        kept.extend(batch.indices)
    images = images.subset(kept)
    return images, (stored[: len(kept)].to(device), torch.from_numpy(images.labels()).to(device))


def hold_out(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """A set without a random share of it, and that share in a set of its own; None for a share of 0."""
    count = round(share * len(images))
    if not count:
        return images, None
    order = np.random.default_rng([_HOLDOUT, seed]).permutation(len(images))
    return images.subset(sorted(order[count:].tolist())), images.subset(sorted(order[:count].tolist()))
