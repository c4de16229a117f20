"""Whether a command can write where its results are to go; asked before its work, so that hours are not lost."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from calibquant.errors import RunFolderError
from calibquant.runfolder.files import disk_error, write_atomic

PROBE = f".calibquant-{'probe' * 20}"  # as long as the longest path below a folder of runs
PROBE_BYTES = 1 << 16


def check_place(folder: Path) -> None:
    """Check that files can be written into a folder, or that it can be made; nothing is left there.

    Commands call it before their work, so that hours of it are not lost for want of a place.

    Raises:
        RunFolderError: they cannot, or the disk is full.
    """
    above = folder
    missing: list[str] = []
    while not os.path.lexists(above):
        missing.append(above.name)
        above = above.parent
    if not above.is_dir():
        raise RunFolderError(above, "is a file, not a folder", "choose another folder")
    try:
        for name in missing:
            with suppress(FileNotFoundError):
                os.lstat(above / name)  # a name that is too long fails in another way
        probe = write_atomic(above / PROBE, b"x" * PROBE_BYTES)
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(OSError(error.errno, error.strerror), folder) from error
    except RunFolderError as error:
        raise RunFolderError(folder, error.problem, error.mend) from error


def check_file(path: Path) -> None:
    """Check that a file can be written, or replaced; as `check_place`.

    Raises:
        RunFolderError: it cannot.
    """
    if path.is_dir():
        raise RunFolderError(path, "is a folder, not a file", "give the name of a file")
    check_place(path.parent)
    try:
        with suppress(FileNotFoundError):
            os.lstat(path.with_name(f".{path.name}.{os.getpid()}.tmp"))  # the name that it has while it is written
    except OSError as error:
        raise disk_error(error, path) from error
