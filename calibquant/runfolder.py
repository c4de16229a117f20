"""The run folder: what a run leaves, written so that an interrupted run leaves nothing that looks finished.

A run is written to `.<name>.partial` beside its final place and renamed when it is complete; files are written to a
temporary name and renamed. The receipt holds the hash of every file, and reading a run checks them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibquant.errors import RunFolderError
from calibquant.reading import parse_json, read_file

FORMAT_VERSION = 1
RECEIPT, CHECKPOINT = "receipt.json", "checkpoint.json"
QUANTIZATION, TRAINING = "quantize", "train"  # kinds of runs, by the command that makes them
TRAINED = "weights.safetensors"  # what a training leaves


@dataclass(frozen=True)
class RunFolder:
    """A folder of files with known names.

    Args:
        path: the folder.
    """

    path: Path

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

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            RunFolderError: it is missing or cannot be read.
        """
        if not name or Path(name).name != name:
            raise RunFolderError(self.path, f"names the file '{name}' outside the folder", "do not trust this run")
        return read_file(self.path / name, RunFolderError, "name a complete run folder")

    def read_json(self, name: str) -> Any:
        """A JSON file's value.

        Raises:
            RunFolderError: it is missing or not JSON.
        """
        try:
            return parse_json(self.read(name))
        except ValueError as error:
            raise RunFolderError(self.path / name, f"is damaged ({error})", "quantize again") from None

    def remove(self, pattern: str) -> None:
        """Delete the files that match a pattern, such as `checkpoint*`."""
        for path in self.path.glob(pattern):
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
            RunFolderError: the disk is full or the folder cannot be written; no new file is left then.
        """
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
def new_run(root: Path, stem: str, kind: str = QUANTIZATION) -> Iterator[RunFolder]:
    """Create `<root>/<stem>-NNN`; it appears under that name when the context ends without an error.

    Args:
        root: folder of runs.
        stem: name without its number.
        kind: the command that makes it and can go on with it.

    Yields:
        the folder under its temporary name. Use `final_path` for its final one.

    Raises:
        RunFolderError: the folder cannot be created, writing fails, or the run was interrupted behind a checkpoint.
            Without a checkpoint nothing is left behind; with one the folder stays hidden for `interrupted_run`.
    """
    make_folder(root)
    try:
        partial = _claim(root, stem)
    except OSError as error:
        raise disk_error(error, root) from error
    with _finished(partial, kind) as folder:
        yield folder


@contextmanager
def interrupted_run(path: Path, kind: str = QUANTIZATION) -> Iterator[RunFolder]:
    """Go on with a run that was interrupted, by the name it would have got; as `new_run`.

    Raises:
        RunFolderError: no interrupted run of that name has a checkpoint, or it is of another kind.
    """
    partial = path.with_name(f".{path.name}.partial")
    if not (partial / CHECKPOINT).is_file():
        state = "is complete already" if (path / RECEIPT).is_file() else "is no interrupted run with a checkpoint"
        raise RunFolderError(path, state, f"name the run that an interrupted calibquant {kind} told")
    stored = RunFolder(partial).read_json(CHECKPOINT)
    found = stored.get("kind", QUANTIZATION) if isinstance(stored, dict) else kind
    if found != kind:
        raise RunFolderError(path, f"is no run of calibquant {kind}", f"go on with calibquant {found} --resume {path}")
    with _finished(partial, kind) as folder:
        folder.remove(".*.tmp")  # what a kill left of a file that was being written
        yield folder


@contextmanager
def _finished(partial: Path, kind: str) -> Iterator[RunFolder]:
    try:
        yield RunFolder(partial)
        partial.replace(final_path(partial))
    except OSError as error:
        raise disk_error(error, partial.parent) from error
    except KeyboardInterrupt as error:
        if not (partial / CHECKPOINT).exists():
            raise
        final = final_path(partial)
        raise RunFolderError(final, "was interrupted", f"go on with calibquant {kind} --resume {final}") from error
    finally:
        if partial.exists() and not (partial / CHECKPOINT).exists():
            shutil.rmtree(partial, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Create a folder and those above it, where they are not there yet.

    Raises:
        RunFolderError: the disk is full or the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def final_path(partial: Path) -> Path:
    """Where a partial run folder will stand when complete."""
    return partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))


def open_run(path: Path, kinds: Sequence[str] = (QUANTIZATION,)) -> RunFolder:
    """A complete run folder, its kind, version and hashes checked.

    Raises:
        RunFolderError: it is missing, incomplete, of another kind or version, or damaged.
    """
    folder = RunFolder(path)
    if not path.is_dir():
        raise RunFolderError(path, "there is no such run folder", "list the folder runs/ for what is there")
    if not (path / RECEIPT).is_file():
        raise RunFolderError(path, f"is no run folder ({RECEIPT} is missing)", "name a folder that calibquant wrote")
    receipt = folder.read_json(RECEIPT)
    receipt = receipt if isinstance(receipt, dict) and isinstance(receipt.get("files"), dict) else {}
    version = receipt.get("format_version")
    if version != FORMAT_VERSION:
        raise RunFolderError(
            path / RECEIPT, f"format version {version} is not {FORMAT_VERSION}", "use the calibquant that wrote it"
        )
    if kind_of(folder) not in kinds:
        mend = f"quantize them with model.weights={path / TRAINED}"
        raise RunFolderError(path, "is a run of calibquant train, which holds float weights", mend)
    for name, expected in receipt["files"].items():
        if sha256(folder.read(name)) != expected:
            raise RunFolderError(
                path / name, "is damaged (its hash is not the receipt's)", "restore it or quantize again"
            )
    return folder


def newest_run(root: Path) -> Path:
    """The most recently completed run in a folder of runs, trainings left out.

    Raises:
        RunFolderError: there is none.
    """
    runs = [p for p in root.glob("*/" + RECEIPT) if not p.parent.name.startswith(".")]
    for receipt in sorted(runs, key=lambda p: (p.stat().st_mtime_ns, p.parent.name), reverse=True):
        if kind_of(RunFolder(receipt.parent)) == QUANTIZATION:
            return receipt.parent
    raise RunFolderError(root, "holds no run yet", "run calibquant quantize, or name a run folder")


def kind_of(folder: RunFolder) -> str:
    """The command that made a complete run."""
    receipt = folder.read_json(RECEIPT)
    return str(receipt.get("kind", QUANTIZATION)) if isinstance(receipt, dict) else QUANTIZATION


def write_atomic(path: Path, data: bytes) -> Path:
    """Write a file so that either the old or the complete new content stands there.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
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
    return RunFolderError(
        error.filename or path,
        f"cannot be written ({error.strerror or error})",
        "free space there, or choose another runs= folder",
    )


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def _claim(root: Path, stem: str) -> Path:
    taken = [
        int(m.group(1))
        for p in root.iterdir()
        if (m := re.fullmatch(rf"\.?{re.escape(stem)}-(\d+)(\.partial)?", p.name))
    ]
    number = max(taken, default=0) + 1
    while True:
        partial = root / f".{stem}-{number:03d}.partial"
        try:
            partial.mkdir()
        except FileExistsError:
            number += 1
            continue
        if not final_path(partial).exists():
            return partial
        partial.rmdir()  # another process finished a run of this number since the folder was listed
        number += 1
