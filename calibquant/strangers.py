"""Files that come from others: which folders are runs, and reading without being led elsewhere or held up."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

RECEIPT, CHECKPOINT = "receipt.json", "checkpoint.json"  # in a finished and in an interrupted run folder
MOST = 4 << 30  # bytes of the largest file that is read: ONNX files have up to 2 GiB
MOST_TEXT = 64 << 20  # bytes of the largest JSON file
MOST_RECIPE = 256 << 10  # bytes of the largest recipe


def in_run_folder(path: Path) -> bool:
    """Whether a file lies in a run folder, finished or not, by its path or by where a link leads.

    Example:
        >>> in_run_folder(Path("configs/digits.yaml"))
        False
    """
    above = {*path.absolute().parents, *Path(os.path.realpath(path)).parents}
    return any(folder.name.endswith(".partial") or (folder / RECEIPT).is_file() for folder in above)


def read_regular(path: Path, most: int = MOST, links: bool = False) -> bytes:
    """The content of a regular file. A device, a pipe or a folder is refused without waiting for it.

    Args:
        path: the file.
        most: bytes that it may have.
        links: whether the name may be a symbolic link.

    Raises:
        OSError: it is missing, unreadable, no such file or larger; `strerror` says why.
    """
    with _open_regular(path, most, links) as file:
        return file.read(most)


def hash_regular(path: Path) -> str:
    """The hexadecimal SHA-256 of a regular file, which is read piece by piece.

    Raises:
        OSError: as `read_regular`.
    """
    digest = hashlib.sha256()
    with _open_regular(path, MOST, links=False) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a file, pipe or device that the user named himself.

    Raises:
        OSError: it cannot be read, or does not end within `most` bytes.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, _too_large(most))
    return data


def _open_regular(path: Path, most: int, links: bool) -> BinaryIO:
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not links:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link")
        flags |= getattr(os, "O_NOFOLLOW", 0)
    file = os.fdopen(_open(path, flags), "rb")
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    if found.st_size > most:
        file.close()
        raise OSError(errno.EFBIG, _too_large(most))
    return file


def _open(path: Path, flags: int) -> int:
    """A descriptor; a folder is refused here, since it cannot be opened as a file."""
    if path.is_dir():
        raise OSError(errno.EISDIR, "it is a folder")
    try:
        return os.open(path, flags)
    except ValueError as error:  # a NUL byte
        raise OSError(errno.EINVAL, str(error)) from None


def _too_large(most: int) -> str:
    return f"it has more than {most >> 10} KiB"
