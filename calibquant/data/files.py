"""Image files: a folder with a folder for each class, or a plain folder; `lists.py` has the lists of files."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from calibquant.data.classes import Classes
from calibquant.data.encoded import EncodedImages, Strings
from calibquant.data.imageset import OnError, UnreadableImageError
from calibquant.errors import DataError
from calibquant.reading import MOST_IMAGE, is_folder, read_regular
from calibquant.recipe import Preprocess

EXTENSIONS = (
    ".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
SHOWN = 8  # kinds of files, or folders, that a remark names


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
            data = read_regular(path, MOST_IMAGE, links=True)
        except FileNotFoundError:
            if path.is_symlink():
                problem = "is a link to a file that does not exist"
                raise UnreadableImageError(path, problem, f"restore that file, {skip}") from None
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
    What is left out (hidden files, other file types, folders without images) is counted in the set's `remarks`.

    Raises:
        DataError: the folder is missing or cannot be read, holds no images, holds images beside class folders, or a
            folder is none of the classes.
    """
    folder = root / subfolder
    if not is_folder(folder):
        there = ", ".join(_folders(root))
        mend = f"name one of the folders there: {there}" if there else "correct data.root"
        raise DataError(folder, "there is no such folder", mend)
    left = Counter[str]()
    try:
        found = sorted(_images(folder, left, links=True))
    except OSError as error:
        where, mend = error.filename or folder, "make the folder readable"
        raise DataError(where, f"cannot be read ({error.strerror})", mend) from None
    if not found:
        problem = f"holds no images, but {left.total():,} other files ({_counts(left)})" if left else "holds no images"
        raise DataError(folder, problem, f"put files there that end in {', '.join(EXTENSIONS)}")
    folders = _folders(folder)
    plain, labelled = ([parts for parts in found if (len(parts) > 1) == deep] for deep in (False, True))
    if labelled and plain:
        problem = f"holds images ({plain[0][0]}) beside class folders ({folders[0]})"
        raise DataError(folder, problem, "move the images into class folders, or the folders away")
    base = relative(root, folder)
    names = Strings("/".join(parts if base == "." else (base, *parts)) for parts in found)
    used = sorted({parts[0] for parts in labelled})
    ranked = folders if classes is None else used
    ranks = {name: classes.index(name, str(folder / name)) if classes else rank for rank, name in enumerate(ranked)}
    labels = [ranks[parts[0]] if labelled else None for parts in found]
    shown = list(classes.names) if classes else folders if labelled else None
    images = FileImages(root, names, labels, settings, shown, on_error)
    images.remarks = _remarks(folder, left, sorted(set(folders) - set(used)))
    return images


def relative(root: Path, path: Path) -> str:
    """The path from the root on, or the whole path if it is not below."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _folders(folder: Path) -> list[str]:
    """The names of the folders, and links to folders, in a folder but for the hidden ones; none if it is unreadable."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.name[0] != "." and _is_folder(entry, links=True))
    except OSError:
        return []


def _images(folder: Path | str, left: Counter[str], links: bool = False) -> Iterator[tuple[str, ...]]:
    """The image files below a folder, as the parts of their paths from there, in any order; `left` counts the others.

    Links to folders are followed directly in it if `links`, and nowhere deeper, where they could form circles. A link
    with an image's name that leads nowhere is an image: reading it tells what is wrong.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                left["hidden"] += 1
            elif _is_folder(entry, links):
                yield from ((entry.name, *parts) for parts in _images(entry.path, left))
            elif (reason := _no_image(entry)) is not None:
                left[reason] += 1
            else:
                yield (entry.name,)


def _is_folder(entry: os.DirEntry[str], links: bool) -> bool:
    """Whether an entry is a folder, or if `links` a link to one that does not hold the link."""
    try:
        if not links or not entry.is_symlink():
            return entry.is_dir(follow_symlinks=False)
        path = Path(entry.path)
        return entry.is_dir() and not path.parent.resolve().is_relative_to(path.resolve())
    except OSError:  # a circle of links
        return False


def _no_image(entry: os.DirEntry[str]) -> str | None:
    """Why an entry that is no folder is left out: its suffix, or what it is; None for an image."""
    _, dot, ending = entry.name.rpartition(".")
    suffix = dot and dot + ending.lower()
    reason = None if suffix in EXTENSIONS else suffix or "without suffix"
    if entry.is_file(follow_symlinks=False):
        return reason
    try:
        mode = entry.stat().st_mode
    except OSError:
        return reason and f"broken link {entry.name}"
    if stat.S_ISREG(mode):
        return reason
    return "link to a folder" if stat.S_ISDIR(mode) else "pipe or device"


def _counts(left: Counter[str]) -> str:
    """For example: .txt 12, hidden 1."""
    kinds = [f"{kind} {count:,}" for kind, count in sorted(left.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join(kinds[:SHOWN]) + (f" and {len(kinds) - SHOWN:,} kinds more" if len(kinds) > SHOWN else "")


def _remarks(folder: Path, left: Counter[str], empty: list[str]) -> tuple[str, ...]:
    """What a folder holds beside images, and which of its folders have none."""
    remarks = []
    if left:
        remarks.append(f"{folder}: files left out because they are not images: {left.total():,} ({_counts(left)})")
    if empty:
        names = ", ".join(empty[:SHOWN]) + (" …" if len(empty) > SHOWN else "")
        remarks.append(f"{folder}: folders without images: {len(empty):,} ({names})")
    return tuple(remarks)
