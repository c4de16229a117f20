"""CIFAR-10 in its two official forms, binary and python."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from calibquant.data.batch_pickle import read_batch
from calibquant.data.imageset import ImageSet
from calibquant.data.preprocess import preprocess_pixels, to_image
from calibquant.errors import DataError
from calibquant.recipe import Preprocess

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
RECORD = 1 + 3 * 32 * 32

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CifarFile:
    """One file: its name, pixels (N, 3072) in the order channel, row, column, and labels (N,)."""

    name: str
    pixels: Pixels
    labels: Labels


class CifarImages(ImageSet):
    """The images of one or more CIFAR-10 files, in file order; names are `data_batch_1.bin#17`."""

    def __init__(self, root: Path, split: str, settings: Preprocess, files: list[CifarFile]) -> None:
        super().__init__(list(CLASSES))
        self._root, self._split, self._settings = root, split, settings
        self.files = files
        self._ends = list(accumulate(len(file.labels) for file in files))
        missing = set(_stems(split)) - {Path(file.name).stem for file in files}
        if missing:
            self.remarks = (f"{root}: missing files of the split {split}: {', '.join(sorted(missing))}",)

    def __reduce__(self) -> tuple[object, ...]:
        """Another process opens the files itself: the arrays that are mapped into memory would be sent whole."""
        return open_cifar10, (self._root, self._split, self._settings)

    def __len__(self) -> int:
        return self._ends[-1]

    def image(self, i: int) -> Tensor:
        file, record = self._locate(i)
        return preprocess_pixels(file.pixels[record].reshape(3, 32, 32), self._settings, self.name(i))

    def decoded(self, i: int) -> Image.Image:
        file, record = self._locate(i)
        return to_image(file.pixels[record].reshape(3, 32, 32))

    def label(self, i: int) -> int:
        file, record = self._locate(i)
        return int(file.labels[record])

    def name(self, i: int) -> str:
        file, record = self._locate(i)
        return f"{file.name}#{record}"

    def sha256(self, i: int) -> str:
        file, record = self._locate(i)
        return hashlib.sha256(file.pixels[record].tobytes()).hexdigest()

    def labels(self) -> Labels:
        return np.concatenate([file.labels for file in self.files])

    def _locate(self, i: int) -> tuple[CifarFile, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        k = bisect_right(self._ends, i)
        return self.files[k], i - (self._ends[k - 1] if k else 0)


def read_binary(path: Path) -> tuple[Pixels, Labels]:
    """Pixels (N, 3072), memory-mapped, and labels (N,) of one file of the binary form.

    Raises:
        DataError: the file cannot be read, is empty or not a whole number of records.
    """
    size = path.stat().st_size
    if size == 0 or size % RECORD:
        problem = f"is truncated or not CIFAR-10: {size} bytes are not a whole number of records of {RECORD} bytes"
        raise DataError(path, problem, "download cifar-10-binary.tar.gz again")
    try:
        records = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, RECORD)
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "make the file readable") from None
    return records[:, 1:], records[:, 0].astype(np.int64)


_FORMS: list[tuple[str, str, Callable[[Path], tuple[Pixels, Labels]]]] = [
    ("cifar-10-batches-bin", ".bin", read_binary),
    ("cifar-10-batches-py", "", read_batch),
]


def open_cifar10(root: Path, split: str, settings: Preprocess) -> CifarImages:
    """Open a split of CIFAR-10.

    Args:
        root: folder that holds the official files, or their folder cifar-10-batches-bin or cifar-10-batches-py.
        split: "train" (those of the five batches that are there) or "test".
        settings: preprocessing.

    Raises:
        DataError: no file is found, or one is truncated or holds labels other than 0..9.
    """
    stems = _stems(split)
    for folder, suffix, read in _FORMS:
        for base in (root, root / folder):
            paths = [path for stem in stems if (path := base / f"{stem}{suffix}").is_file()]
            if paths:
                return CifarImages(root, split, settings, [_open_file(path, read) for path in paths])
    problem = f"holds no CIFAR-10 files of the split {split} ({stems[0]}.bin or {stems[0]})"
    raise DataError(root, problem, "set data.root to the folder that holds cifar-10-batches-bin or cifar-10-batches-py")


def _stems(split: str) -> list[str]:
    """The names of a split's files, without ending."""
    return ["test_batch"] if split == "test" else [f"data_batch_{k}" for k in range(1, 6)]


def _open_file(path: Path, read: Callable[[Path], tuple[Pixels, Labels]]) -> CifarFile:
    pixels, labels = read(path)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))
    if wrong.size:
        problem = f"label {labels[wrong[0]]} of record {wrong[0]} is outside 0..9"
        raise DataError(path, problem, "this is not a CIFAR-10 file; download it again")
    return CifarFile(path.name, pixels, labels)
