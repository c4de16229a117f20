"""A folder of files that are written so that an interruption leaves nothing that looks finished."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from calibquant.errors import RunFolderError
from calibquant.locking import HeldError, locked
from calibquant.reading import MOST, MOST_TEXT, parse_json, read_regular
from calibquant.strangers import RECEIPT

FORMAT_VERSION = 1
BRIEF = 1  # seconds to wait for a process that only cleans up
WAIT = 60  # seconds to wait for a process that writes files


@dataclass(frozen=True)
class RunFolder:
    """A folder of files with known names.

    Args:
        path: the folder.
        listed: the files that its receipt lists, whose hashes were checked; None where there is no receipt yet. No
            other file is read.
    """

    path: Path
    listed: frozenset[str] | None = None

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file atomically.

        Raises:
            RunFolderError: the disk is full or the folder cannot be written.
        """
        data = content.encode("utf-8") if isinstance(content, str) else content
        return write_atomic(self.path / name, data)

    def write_json(self, name: str, value: Any) -> Path:
        """Write a value as JSON, keys in their given order; a non-finite number is an error."""
        return self.write(name, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")

    def path_of(self, name: str) -> Path:
        """Where a file of the run is.

        Raises:
            RunFolderError: the name is not that of a file in the folder, or the receipt does not list it.
        """
        where = self.path / name
        if not is_plain(name):
            raise RunFolderError(
                self.path, f"names the file {str(name)[:80]!r}, which is outside it", "do not use this run"
            )
        if self.listed is not None and name not in (*self.listed, RECEIPT):
            problem = f"is not listed in {RECEIPT}, so its hash is unknown" if where.exists() else "is missing"
            raise RunFolderError(where, problem, "name a complete run folder")
        return where

    def read(self, name: str, most: int = MOST) -> bytes:
        """The content of a file.

        Raises:
            RunFolderError: as `path_of`, or it is missing, no regular file, or too large.
        """
        where = self.path_of(name)
        try:
            return read_regular(where, most)
        except OSError as error:
            raise RunFolderError(where, f"cannot be read ({error.strerror})", "name a complete run folder") from None

    def read_json(self, name: str) -> Any:
        """A JSON file's value.

        Raises:
            RunFolderError: as `read`, or it is not JSON.
        """
        try:
            return parse_json(self.read(name, MOST_TEXT))
        except ValueError as error:
            raise RunFolderError(self.path / name, f"is damaged ({error})", "quantize again") from None

    def has(self, name: str) -> bool:
        """Whether the run has a file of that name; in a finished run, whether its receipt lists it."""
        return (self.path / name).is_file() if self.listed is None else name in self.listed

    def remove(self, pattern: str) -> None:
        """Delete the files that match a pattern, such as `checkpoint*`: the last by name first.

        So checkpoint.json goes before the files that it names, and a kill leaves no checkpoint without them.
        """
        for path in sorted(self.path.glob(pattern), reverse=True):
            path.unlink(missing_ok=True)

    def seal(self, receipt: dict[str, Any]) -> None:
        """Write the receipt: the given facts, the format version and the hash of every lasting file in the folder."""
        passing = (RECEIPT, "log.txt", ".", "checkpoint")
        lasting = [p for p in sorted(self.path.iterdir()) if p.is_file() and not p.name.startswith(passing)]
        files = {p.name: sha256(p.read_bytes()) for p in lasting}
        self.write_json(RECEIPT, {"format_version": FORMAT_VERSION, **receipt, "files": files})

    def add(self, files: Mapping[str, bytes]) -> None:
        """Add files to a sealed run, or replace some; whenever this is interrupted, `open_run` accepts the run.

        The receipt disowns what will change before it does, and names the new hashes when all is there. The run keeps
        its place among the newest.

        Raises:
            RunFolderError: the disk is full or the folder cannot be written, or another process writes to it; no new
                file is left then.
        """
        with alone(self.path, WAIT):
            self._add(files)

    def _add(self, files: Mapping[str, bytes]) -> None:
        receipt = self.read_json(RECEIPT)
        before = (self.path / RECEIPT).stat().st_mtime_ns
        hashes = {name: sha256(data) for name, data in files.items()}
        changing = [name for name, digest in hashes.items() if receipt["files"].get(name) != digest]
        staged = {name: self.path / f".{name}.{os.getpid()}.tmp" for name in changing}
        placed: list[Path] = []
        try:
            self.remove(".*.tmp")  # what a kill left
            for name, temporary in staged.items():
                write_atomic(temporary, files[name])
            kept = {name: digest for name, digest in receipt["files"].items() if name not in changing}
            if len(kept) < len(receipt["files"]):
                self._write_receipt({**receipt, "files": kept}, before)
            for name, temporary in staged.items():
                placed.append(temporary.replace(self.path / name))
            if changing:
                self._write_receipt({**receipt, "files": dict(sorted((kept | hashes).items()))}, before)
        except (OSError, RunFolderError) as error:
            for path in [*placed, *staged.values()]:
                path.unlink(missing_ok=True)
            raise error if isinstance(error, RunFolderError) else disk_error(error, self.path) from error

    def _write_receipt(self, receipt: dict[str, Any], modified: int) -> None:
        os.utime(self.write_json(RECEIPT, receipt), ns=(modified, modified))


@contextmanager
def alone(path: Path, wait: float = BRIEF) -> Iterator[None]:
    """Keep other processes from a folder for the length of a context.

    Raises:
        RunFolderError: one of them works at it, or its lock cannot be made.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock_of(path), wait))
        except HeldError as error:
            mend = "wait until that process ends, or end it"
            raise RunFolderError(path, f"{error} is at work there", mend) from None
        except OSError as error:
            raise disk_error(error, path.parent) from error
        yield


@contextmanager
def shared_folder(path: Path) -> Iterator[RunFolder]:
    """A folder that one command works at for the length of a context, such as that of a study; it is made.

    Raises:
        RunFolderError: another process works at it, or it cannot be made.
    """
    make_folder(path)
    with alone(path):
        folder = RunFolder(path)
        folder.remove(".*.tmp")  # what a kill left
        yield folder


def lock_of(path: Path) -> Path:
    """The file of the lock of a folder or a file, beside it."""
    path = path.resolve()
    return path.with_name(f".{path.name}.lock")


def write_alone(path: Path, data: bytes) -> Path:
    """`write_atomic` of a file that several processes may write: one at a time, and without what killed ones left.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written.
    """
    with alone(path, WAIT):
        for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
            left.unlink(missing_ok=True)
        return write_atomic(path, data)


def make_folder(path: Path) -> None:
    """Create a folder and those above it, where they are not there yet.

    Raises:
        RunFolderError: the disk is full or the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def write_atomic(path: Path, data: bytes) -> Path:
    """Write a file so that either the old or the complete new content stands there.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # x: a link of this name is not followed
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, path) from error
    return path


def disk_error(error: OSError, path: Path) -> RunFolderError:
    """A disk's refusal as one line."""
    mend = {
        errno.ENOSPC: "free space there, or choose another folder (runs=…)",
        errno.ENAMETOOLONG: "choose a shorter name",
    }.get(error.errno or 0, "choose another folder (runs=…)")
    return RunFolderError(error.filename or path, f"cannot be written ({error.strerror or error})", mend)


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def is_plain(name: object) -> bool:
    """Whether this is the name of a file directly in a folder.

    Example:
        >>> is_plain("recipe.yaml"), is_plain("../recipe.yaml"), is_plain("..")
        (True, False, False)
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
