"""Sets whose images are stored encoded, as files or inside archives, and decoded when they are asked for."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from calibquant.data.imageset import ImageSet, OnError
from calibquant.data.preprocess import decode, preprocess, within_memory
from calibquant.recipe import Preprocess


class Strings:
    """Immutable strings, packed: a million file names take what their bytes take, also when sent to a process.

    Example:
        >>> names = Strings(["a.png", "b/c.png"])
        >>> len(names), names[1]
        (2, 'b/c.png')
    """

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"string {i} of {len(self)}")
        return self._bytes[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogateescape")


class EncodedImages(ImageSet):
    """Encoded images under their names, with labels where known.

    Args:
        names: what a person calls each image.
        labels: class indices, None where unknown.
        settings: preprocessing.
        classes, on_error: as for `ImageSet`.
    """

    def __init__(
        self,
        names: Strings,
        labels: Sequence[int | None],
        settings: Preprocess,
        classes: list[str] | None,
        on_error: OnError,
    ) -> None:
        super().__init__(classes, on_error)
        self._names, self._settings = names, settings
        self._labels = np.array([-1 if label is None else label for label in labels], dtype=np.int64)

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The encoded image `i`.

        Raises:
            DataError: it cannot be read (UnreadableImageError), or is not the one that was listed.
        """

    @abstractmethod
    def where(self, i: int) -> str:
        """What errors call image `i`: enough to find it."""

    def __len__(self) -> int:
        return len(self._names)

    def image(self, i: int) -> Tensor:
        with within_memory(self.where(i)):
            return preprocess(self.decoded(i), self._settings, self.where(i))

    def decoded(self, i: int) -> Image.Image:
        """Image `i` before preprocessing, mode RGB."""
        with within_memory(self.where(i)):
            return decode(self.read(i), self._settings.color, self.where(i))

    def label(self, i: int) -> int | None:
        label = int(self._labels[i])
        return None if label < 0 else label

    def name(self, i: int) -> str:
        return self._names[i]

    def sha256(self, i: int) -> str:
        return hashlib.sha256(self.read(i)).hexdigest()

    def labels(self) -> npt.NDArray[np.int64]:
        return self._labels.copy()
