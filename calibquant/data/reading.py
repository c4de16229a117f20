"""Reading whole files that a user names or a folder holds, whatever they turn out to be."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

MOST_IMAGE = 1 << 29  # bytes of an image: three for each of the most pixels that Pillow opens (178,956,970)
MOST_TEXT = 1 << 28  # bytes of a list: three million lines of 80


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file. A pipe or a device is not opened: it may have no end.

    Args:
        path: the file, or a link to it.
        most: bytes that are accepted.

    Raises:
        OSError: there is no such file, it is not a regular one, it is too large, or it cannot be read. `strerror` says
            which.
    """
    try:
        status = path.stat()
    except ValueError:
        raise OSError(errno.EINVAL, "the path holds a NUL byte") from None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than the limit of {most:,}")
    return path.read_bytes()


def is_regular(path: Path) -> bool:
    """Whether there is a regular file at a path; False also for paths that no file can have."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether there is a folder at a path; False also for paths that no folder can have."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (OSError, ValueError):  # among them a name that is too long, a circle of links, a NUL byte
        return 0
