"""Sets of image files: a folder with a folder for each class, a plain folder, or a CSV list."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from calibquant.data.imageset import ImageSet, OnError
from calibquant.data.preprocess import decode, preprocess, unreadable
from calibquant.errors import DataError
from calibquant.recipe import Preprocess

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Listed:
    """One image of a set: its file, and its label where known."""

    path: Path
    label: int | None


class FileImages(ImageSet):
    """Image files under a root, decoded when they are asked for; names are paths relative to the root."""

    def __init__(
        self, root: Path, items: list[Listed], settings: Preprocess, classes: list[str] | None, on_error: OnError
    ) -> None:
        super().__init__(classes, on_error)
        self._root, self._items, self._settings = root, items, settings

    def __len__(self) -> int:
        return len(self._items)

    def image(self, i: int) -> Tensor:
        return preprocess(self.decoded(i), self._settings, str(self._items[i].path))

    def decoded(self, i: int) -> Image.Image:
        path = self._items[i].path
        return decode(path, self._settings.color, str(path))

    def label(self, i: int) -> int | None:
        return self._items[i].label

    def name(self, i: int) -> str:
        path = self._items[i].path
        return (path.relative_to(self._root) if path.is_relative_to(self._root) else path).as_posix()

    def sha256(self, i: int) -> str:
        path = self._items[i].path
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise unreadable(path, str(path), error) from None

    def labels(self) -> npt.NDArray[np.int64]:
        return np.array([-1 if item.label is None else item.label for item in self._items], dtype=np.int64)


def open_folder(root: Path, subfolder: str, settings: Preprocess, on_error: OnError = "fail") -> FileImages:
    """Open root/subfolder/CLASS/…/IMAGE, or root/subfolder/IMAGE without labels.

    Classes are the folders sorted by name; their rank is the label. Hidden files and folders are left out.

    Raises:
        DataError: the folder is missing, holds no images, or holds images beside class folders.
    """
    folder = root / subfolder
    if not folder.is_dir():
        found = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
        mend = f"name one of the folders there: {found}" if found else "correct data.root"
        raise DataError(folder, "there is no such folder", mend)
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    labelled = [Listed(path, label) for label, name in enumerate(classes) for path in _images(folder / name, "**/*")]
    plain = [Listed(path, None) for path in _images(folder, "*")]
    if labelled and plain:
        problem = f"holds images ({plain[0].path.name}) beside class folders ({classes[0]})"
        raise DataError(folder, problem, "move the images into class folders, or the folders away")
    if not labelled and not plain:
        raise DataError(folder, "holds no images", f"put files there that end in {', '.join(EXTENSIONS)}")
    return FileImages(root, labelled or plain, settings, classes if labelled else None, on_error)


def _images(folder: Path, pattern: str) -> list[Path]:
    """The image files that match, sorted by their path's parts."""
    found = (p for p in folder.glob(pattern) if p.suffix.lower() in EXTENSIONS and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def open_csv(root: Path, name: str, settings: Preprocess, on_error: OnError = "fail") -> FileImages:
    """Open a list of images: a CSV file with the header `file,label` or `path,…,label`; other columns are ignored.

    Paths are relative to the root, or absolute. The label column may be missing, and a label may be empty.

    Raises:
        DataError: the list cannot be read, lacks its file column, holds no rows, or a row is not valid; names the line.
    """
    path = root / name
    rows = read_rows(path)
    header = rows[0][1] if rows else {}
    key = next((column for column in ("file", "path") if column in header), None)
    if key is None:
        raise DataError(path, "holds no rows under a header with the column file", "write file,label as the first line")
    items = []
    for line, row in rows:
        where = f"{path}, line {line}"
        if not row[key]:
            raise DataError(where, "names no file", f"fill the column {key}")
        items.append(Listed(root / row[key], parse_label(row.get("label", ""), where)))
    return FileImages(root, items, settings, None, on_error)


def parse_label(text: str, where: str) -> int | None:
    """A label of a CSV file: a whole number from 0, or None for an empty field.

    Raises:
        DataError: it is neither.
    """
    text = text.strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise DataError(where, f"label '{text}' is not a class index", "write a whole number from 0")
    return int(text)


def read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with a header: each with the number of its last line.

    Raises:
        DataError: the file cannot be read, or a row has more or fewer fields than the header.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "give the path of a CSV file") from None
    except (UnicodeDecodeError, csv.Error):
        raise DataError(path, "is not a CSV file in UTF-8", "save it as CSV, UTF-8") from None
    for line, row in rows:
        if None in row or None in row.values():
            problem = "has another number of fields than the header"
            raise DataError(f"{path}, line {line}", problem, "quote fields that hold commas")
    return [(line, {key.strip(): value for key, value in row.items()}) for line, row in rows]
