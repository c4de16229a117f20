"""Image files: a folder with a folder for each class, or a plain folder; `lists.py` has the lists of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from calibquant.data.classes import Classes
from calibquant.data.encoded import EncodedImages, Strings
from calibquant.data.imageset import OnError, UnreadableImageError
from calibquant.errors import DataError
from calibquant.recipe import Preprocess

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class FileImages(EncodedImages):
    """Image files under a root; names are paths relative to it, or absolute ones.

    Args:
        root: what relative names are relative to.
        digests: the sha256 that each file must have, "" where none is known; None when none is.
    """

    def __init__(
        self,
        root: Path,
        names: Strings,
        labels: Sequence[int | None],
        settings: Preprocess,
        classes: list[str] | None,
        on_error: OnError,
        digests: Strings | None = None,
    ) -> None:
        super().__init__(names, labels, settings, classes, on_error)
        self._root, self._digests = root, digests

    def where(self, i: int) -> str:
        return str(self._root / self.name(i))

    def read(self, i: int) -> bytes:
        path = self._root / self.name(i)
        skip = "or set data.on_error to skip"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UnreadableImageError(path, "there is no such file", f"correct the path, {skip}") from None
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise UnreadableImageError(path, problem, f"make the file readable, {skip}") from None
        digest = self._digests[i] if self._digests else ""
        if digest and hashlib.sha256(data).hexdigest() != digest:
            mend = "restore the file, or take the column sha256 out of the list"
            raise DataError(path, "is not the file that was listed: its sha256 is another", mend)
        return data


def open_folder(
    root: Path, subfolder: str, settings: Preprocess, on_error: OnError = "fail", classes: Classes | None = None
) -> FileImages:
    """Open root/subfolder/CLASS/…/IMAGE, or root/subfolder/IMAGE without labels.

    Classes are the folders sorted by name; their rank is the label, unless `classes` say which class a folder holds.
    Hidden files and folders are left out.

    Raises:
        DataError: the folder is missing or cannot be read, holds no images, holds images beside class folders, or a
            folder is none of the classes.
    """
    folder = root / subfolder
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
        mend = f"name one of the folders there: {there}" if there else "correct data.root"
        raise DataError(folder, "there is no such folder", mend)
    try:
        folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = sorted(_images(folder, links=True))
    except OSError as error:
        where, mend = error.filename or folder, "make the folder readable"
        raise DataError(where, f"cannot be read ({error.strerror})", mend) from None
    if not found:
        raise DataError(folder, "holds no images", f"put files there that end in {', '.join(EXTENSIONS)}")
    plain, labelled = ([parts for parts in found if (len(parts) > 1) == deep] for deep in (False, True))
    if labelled and plain:
        problem = f"holds images ({plain[0][0]}) beside class folders ({folders[0]})"
        raise DataError(folder, problem, "move the images into class folders, or the folders away")
    base = relative(root, folder)
    names = Strings("/".join(parts if base == "." else (base, *parts)) for parts in found)
    shown = list(classes.names) if classes else folders if labelled else None
    if not labelled:
        return FileImages(root, names, [None] * len(found), settings, shown, on_error)
    used = folders if classes is None else sorted({parts[0] for parts in labelled})
    ranks = {name: classes.index(name, str(folder / name)) if classes else rank for rank, name in enumerate(used)}
    return FileImages(root, names, [ranks[parts[0]] for parts in found], settings, shown, on_error)


def relative(root: Path, path: Path) -> str:
    """The path from the root on, or the whole path if it is not below."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _images(folder: Path | str, links: bool = False) -> Iterator[tuple[str, ...]]:
    """The image files below a folder, as the parts of their paths from there, in any order.

    Links to folders are followed directly in it if `links`, and nowhere deeper, where they could form circles.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=links):
                yield from ((entry.name, *parts) for parts in _images(entry.path))
            elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                yield (entry.name,)
