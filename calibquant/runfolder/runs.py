"""The run folder: what a run leaves, written so that an interrupted run leaves nothing that looks finished.

A run is written to `.<name>.partial` beside its final place and renamed when it is complete; files are written to a
temporary name and renamed. While a process works at a run it holds `.<name>.lock` beside it. The receipt holds the hash
of every file. `open_run` checks them, and a file that the receipt does not list is not read.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from calibquant.errors import RunFolderError
from calibquant.locking import HeldError, locked
from calibquant.reading import hash_regular
from calibquant.runfolder.files import FORMAT_VERSION, RunFolder, alone, disk_error, is_plain, lock_of, make_folder
from calibquant.runfolder.places import check_place
from calibquant.strangers import CHECKPOINT, RECEIPT

QUANTIZATION, TRAINING = "quantize", "train"  # kinds of runs, by the command that makes them
TRAINED = "weights.safetensors"  # what a training leaves


@contextmanager
def new_run(root: Path, stem: str, kind: str = QUANTIZATION, flags: str = "") -> Iterator[RunFolder]:
    """Create `<root>/<stem>-NNN`; it appears under that name when the context ends without an error.

    What killed runs left in `root` without a checkpoint is removed first.

    Args:
        root: folder of runs.
        stem: name without its number.
        kind: the command that makes it and can continue it.
        flags: what that command needs then beside --resume, such as " --trust-code".

    Yields:
        the folder under its temporary name. Use `final_path` for its final one.

    Raises:
        RunFolderError: the folder cannot be created, writing fails, or the run was interrupted behind a checkpoint.
            Without a checkpoint nothing is left behind; with one the folder stays hidden for `interrupted_run`.
    """
    check_place(root)
    make_folder(root)
    with ExitStack() as held:
        try:
            remove_abandoned(root)
            partial = _claim(root, stem, held)
        except OSError as error:
            raise disk_error(error, root) from error
        with _finished(partial, kind, flags) as folder:
            yield folder


@contextmanager
def interrupted_run(path: Path, kind: str = QUANTIZATION, flags: str = "") -> Iterator[RunFolder]:
    """Continue a run that was interrupted, by the name it would have got; as `new_run`.

    Raises:
        RunFolderError: no interrupted run of that name has a checkpoint, it is of another kind, another process works
            at it, or its folder holds anything but regular files.
    """
    partial = path.with_name(f".{path.name}.partial") if path.name else path
    _check_interrupted(path, partial, kind)
    with alone(path):
        _check_interrupted(path, partial, kind)  # again: another process may have finished it
        for file in partial.iterdir():
            if file.is_symlink() or not file.is_file():
                raise RunFolderError(file, "is no regular file", "do not continue this run, or remove the file")
        with _finished(partial, kind, flags) as folder:
            folder.remove(".*.tmp")  # what a kill left of a file that was being written
            yield folder


def _check_interrupted(path: Path, partial: Path, kind: str) -> None:
    if not (partial / CHECKPOINT).is_file():
        state = "is complete already" if (path / RECEIPT).is_file() else "is no interrupted run with a checkpoint"
        raise RunFolderError(path, state, f"name the run that an interrupted calibquant {kind} told")
    stored = RunFolder(partial).read_json(CHECKPOINT)
    found = stored.get("kind", QUANTIZATION) if isinstance(stored, dict) else kind
    if found != kind:
        mend = (
            f"go on with calibquant {found} --resume {path}" if found in (QUANTIZATION, TRAINING) else "quantize again"
        )
        raise RunFolderError(path, f"is no run of calibquant {kind}", mend)


@contextmanager
def _finished(partial: Path, kind: str, flags: str) -> Iterator[RunFolder]:
    try:
        yield RunFolder(partial)
        partial.replace(final_path(partial))
    except OSError as error:
        raise disk_error(error, partial.parent) from error
    except KeyboardInterrupt as error:
        if not (partial / CHECKPOINT).exists():
            raise
        final = final_path(partial)
        raise RunFolderError(
            final, "was interrupted", f"go on with calibquant {kind} --resume {final}{flags}"
        ) from error
    finally:
        if partial.exists() and not (partial / CHECKPOINT).exists():
            shutil.rmtree(partial, ignore_errors=True)


def remove_abandoned(root: Path) -> None:
    """Remove what killed processes left in a folder of runs: locks, and runs without a checkpoint.

    A process that is at work holds its lock, so that nothing of its own is touched.
    """
    for path in sorted(p for p in root.iterdir() if re.fullmatch(r"\..+-\d{3,9}\.(partial|lock)", p.name)):
        with suppress(HeldError, OSError), locked(lock_of(final_path(path))):
            if path.suffix == ".partial" and path.is_dir() and not (path / CHECKPOINT).exists():
                shutil.rmtree(path)


def final_path(partial: Path) -> Path:
    """Where a partial run folder will stand when complete; the same of its lock."""
    return partial.with_name(partial.name.removeprefix(".").removesuffix(".partial").removesuffix(".lock"))


def open_run(path: Path, kinds: Sequence[str] = (QUANTIZATION,)) -> RunFolder:
    """A complete run folder, its kind, version and the hashes of all files that its receipt lists checked.

    Files that the receipt does not list cannot be read from it.

    Raises:
        RunFolderError: it is missing, incomplete, of another kind or version, or damaged, or its receipt names anything
            but regular files in the folder.
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
            path / RECEIPT,
            f"format version {str(version)[:20]} is not {FORMAT_VERSION}",
            "use the calibquant that wrote it",
        )
    kind = kind_of(folder)
    if kind not in (QUANTIZATION, TRAINING):
        raise RunFolderError(path / RECEIPT, f"names an unknown kind of run, {kind[:40]!r}", "do not use this run")
    if kind not in kinds:
        mend = f"quantize them with model.weights={path / TRAINED}"
        raise RunFolderError(path, "is a run of calibquant train, which holds float weights", mend)
    for name, expected in receipt["files"].items():
        if _hash_of(path, name) != expected:
            raise RunFolderError(
                path / name, "is damaged (its hash is not the receipt's)", "restore it or quantize again"
            )
    return RunFolder(path, frozenset(receipt["files"]))


def _hash_of(run: Path, name: str) -> str:
    """The SHA-256 of a file that a receipt lists."""
    if not is_plain(name):
        problem = f"lists {name[:80]!r}, which is no plain name of a file in the run"
        raise RunFolderError(run / RECEIPT, problem, "do not use this run")
    try:
        return hash_regular(run / name)
    except OSError as error:
        raise RunFolderError(run / name, f"cannot be read ({error.strerror})", "name a complete run folder") from None


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


def _claim(root: Path, stem: str, held: ExitStack) -> Path:
    """A new partial folder, whose lock is added to those that are held."""
    taken = [
        int(m.group(1))
        for p in root.iterdir()
        if (m := re.fullmatch(rf"\.?{re.escape(stem)}-(\d{{1,9}})(\.partial)?", p.name))
    ]
    number = max(taken, default=0) + 1
    while True:
        final = root / f"{stem}-{number:03d}"
        partial = root / f".{final.name}.partial"
        with ExitStack() as lock, suppress(HeldError, FileExistsError):
            lock.enter_context(locked(lock_of(final)))
            if not final.exists():
                partial.mkdir()
                held.push(lock.pop_all())
                return partial
        number += 1
