"""What every set of images offers, and the sets that need no files: a tensor's images and a choice of another set's."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import PurePath
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from calibquant.errors import DataError

OnError = Literal["fail", "skip"]


class UnreadableImageError(DataError):
    """An image file is missing, empty, truncated or corrupt. `on_error: skip` leaves such images out."""


class ImageSet(ABC):
    """A fixed sequence of images, preprocessed when they are asked for.

    Attributes:
        classes: names of the classes in label order, or None when unknown.
        on_error: what `batches` does with an unreadable image.
        workers: processes in which `batches` decodes; 0 for threads of this one. The same images come either way.
        skipped: names of the images that `batches` found unreadable and left out.
        remarks: what was found while opening that changes the set, such as files that are left out; one sentence each.
            `open_images` logs them.
    """

    def __init__(self, classes: list[str] | None = None, on_error: OnError = "fail") -> None:
        self.classes = classes
        self.on_error: OnError = on_error
        self.workers = 0
        self.skipped: set[str] = set()
        self.remarks: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def image(self, i: int) -> Tensor:
        """Image `i` after preprocessing: float32, shape (C, H, W).

        Raises:
            DataError: it cannot be read (UnreadableImageError) or does not fit the preprocessing.
        """

    @abstractmethod
    def label(self, i: int) -> int | None:
        """Class index of image `i`, or None when unknown."""

    @abstractmethod
    def name(self, i: int) -> str:
        """What a person calls image `i`: its path relative to the root, or `file#record`."""

    @abstractmethod
    def sha256(self, i: int) -> str:
        """Hex digest of the file's bytes, or of the record's raw pixel bytes."""

    def decoded(self, i: int) -> Image.Image:
        """Image `i` before preprocessing, mode RGB or L; random-resized crops are taken of it.

        Raises:
            DataError: it cannot be read, or the set holds preprocessed images only.
        """
        problem = "is preprocessed already, so that no random-resized crop can be taken"
        raise DataError(self.name(i), problem, "leave data.augment.scale out, or give image files")

    def labels(self) -> npt.NDArray[np.int64]:
        """Labels of all images, shape (len,), -1 where unknown. No image is read."""
        found = (self.label(i) for i in range(len(self)))
        return np.array([-1 if label is None else label for label in found], dtype=np.int64)

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The images at `indices`, in that order.

        Raises:
            DataError: an index is outside the set.
        """
        return Subset(self, indices)


class Subset(ImageSet):
    """A choice of the images of another set, in a given order; made by `ImageSet.subset`."""

    def __init__(self, base: ImageSet, indices: Sequence[int]) -> None:
        super().__init__(base.classes, base.on_error)
        self.base, self.indices = base, check_indices(indices, len(base))
        self.workers = base.workers
        self.remarks = base.remarks
        self.skipped = base.skipped  # shared, so that a file is reported once however often it is drawn

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, i: int) -> Tensor:
        return self.base.image(self.indices[i])

    def label(self, i: int) -> int | None:
        return self.base.label(self.indices[i])

    def name(self, i: int) -> str:
        return self.base.name(self.indices[i])

    def sha256(self, i: int) -> str:
        return self.base.sha256(self.indices[i])

    def decoded(self, i: int) -> Image.Image:
        return self.base.decoded(self.indices[i])

    def labels(self) -> npt.NDArray[np.int64]:
        return self.base.labels()[np.asarray(self.indices, dtype=np.intp)]


class TensorImages(ImageSet):
    """Images that are already preprocessed and in memory.

    Args:
        images: floating point, shape (N, C, H, W).
        labels: N class indices, -1 where unknown; None when no label is known.

    Raises:
        DataError: the shape or type of images or labels is another, or labels are too few, too many or below -1.

    Example:
        >>> images = TensorImages(torch.zeros(4, 3, 8, 8), labels=[0, 1, 2, -1])
        >>> len(images), images.label(2), images.label(3)
        (4, 2, None)
    """

    def __init__(self, images: Tensor, labels: Sequence[int] | Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(images, Tensor):
            raise DataError("images", f"are of type {type(images).__name__}, not a tensor", _as_tensor(images))
        if images.is_meta or images.layout != torch.strided:
            what = "on the meta device" if images.is_meta else f"stored as {str(images.layout).removeprefix('torch.')}"
            raise DataError("images", f"are {what}", "pass a dense tensor of values")
        if images.ndim != 4 or not images.is_floating_point():
            got = f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"
            raise DataError("images", f"are {got}", "pass preprocessed floating point images of shape (N, C, H, W)")
        self._images = images.detach().to("cpu", torch.float32)
        self._labels = np.full(len(images), -1) if labels is None else _class_indices(labels, len(images))

    def __len__(self) -> int:
        return len(self._images)

    def image(self, i: int) -> Tensor:
        return self._images[i]

    def label(self, i: int) -> int | None:
        label = int(self._labels[i])
        return None if label < 0 else label

    def name(self, i: int) -> str:
        return f"tensor#{i}"

    def sha256(self, i: int) -> str:
        return hashlib.sha256(self._images[i].contiguous().numpy().tobytes()).hexdigest()

    def labels(self) -> npt.NDArray[np.int64]:
        return self._labels.astype(np.int64)


def _class_indices(labels: Sequence[int] | Tensor, count: int) -> npt.NDArray[np.int64]:
    """Labels that a user passed, shape (count,)."""
    given = labels.detach().cpu() if isinstance(labels, Tensor) else labels
    try:
        values = np.asarray(given)
        indices = values.astype(np.int64)
        whole = bool((indices == values).all())
    except (TypeError, ValueError, OverflowError):
        raise DataError("labels", "are no numbers", "pass one class index for each image, from 0") from None
    if indices.ndim != 1 or not whole:
        what = "are no whole numbers" if indices.ndim == 1 else f"have shape {indices.shape}"
        raise DataError("labels", what, "pass one class index for each image, from 0")
    if len(indices) != count:
        raise DataError("labels", f"are {len(indices)} for {count} images", "pass one label for each image")
    if (indices < -1).any():
        raise DataError("labels", f"hold {indices.min()}", "use class indices from 0, or -1 for unknown")
    return indices


def _as_tensor(images: object) -> str:
    """How to make the one tensor that `TensorImages` takes."""
    if isinstance(images, np.ndarray):
        return "pass torch.from_numpy(images)"
    if isinstance(images, (list, tuple)) and images and all(isinstance(image, Tensor) for image in images):
        return "pass torch.stack(images)"
    return "pass all images in one tensor of shape (N, C, H, W)"


def check_images(images: object, where: str) -> None:
    """Check that images that a user passed are an ImageSet.

    Raises:
        DataError: they are something else; says what to pass.
    """
    if isinstance(images, ImageSet):
        return
    if isinstance(images, Tensor):
        mend = "pass calibquant.TensorImages(images)"
    elif isinstance(images, np.ndarray):
        mend = "pass calibquant.TensorImages(torch.from_numpy(images))"
    elif isinstance(images, (str, PurePath)):
        mend = "leave them out and name them in the recipe's section data"
    else:
        mend = "pass calibquant.TensorImages(images, labels) with all images in one tensor of shape (N, C, H, W)"
    raise DataError(where, f"are of type {type(images).__name__}, not a set of images", mend)


def check_indices(indices: Sequence[int], count: int) -> tuple[int, ...]:
    """`indices` as a tuple of ints, each checked to be in 0..count-1.

    Raises:
        DataError: one is not.
    """
    numbers = np.asarray(indices, dtype=np.int64).reshape(-1)
    outside = numbers[(numbers < 0) | (numbers >= count)]
    if outside.size:
        raise DataError("indices", f"{outside[0]} is outside 0..{count - 1}", f"the set has {count} images")
    return tuple(numbers.tolist())


def check_labels(images: ImageSet, num_classes: int) -> None:
    """Check that every known label is a class of the network. No image is read.

    Raises:
        DataError: names the first image whose label is outside 0..num_classes-1.
    """
    labels = images.labels()
    wrong = np.flatnonzero(labels >= num_classes)
    if wrong.size:
        i = int(wrong[0])
        mend = "correct the label, or use a network with as many classes as the data"
        raise DataError(images.name(i), f"label {labels[i]} is outside 0..{num_classes - 1}", mend)
