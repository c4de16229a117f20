"""One case: a damaged file, what the loader does with it, and whether that is allowed."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from calibquant.errors import CalibQuantError

from .loaders import MUTATORS, Loader
from .mutators import PLACES

SECONDS = 10.0
BYTES = 1 << 30  # of memory beyond what the process had before
LONGEST = 2000  # characters of a message
WORDS = "accepted", "refused", "fault"


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        word: "accepted", "refused" or "fault".
        text: the refusal's line, or what is wrong.
        damage: names of the mutators.
        seconds: time it took.
    """

    word: str
    text: str
    damage: tuple[str, ...]
    seconds: float


class HangError(BaseException):
    """The time is up; no loader catches it."""


class Site:
    """A folder in which one loader is tried; its good files are made once.

    Args:
        loader: the loader.
        folder: an empty folder.
    """

    def __init__(self, loader: Loader, folder: Path) -> None:
        self.loader, self.folder = loader, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.targets = loader.make(folder)
        self.contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def good(self) -> Outcome:
        """What the loader says of the files as they were made."""
        return self._outcome((), Random(0))

    def run(self, seed: int) -> Outcome:
        """The case of one number."""
        rng = Random(f"{self.loader.name}/{seed}")
        target = rng.choice(self.targets)
        try:
            if self.loader.places and rng.random() < 0.03:
                damage: tuple[str, ...] = (rng.choice(PLACES),)
                _place(target, damage[-1])
            else:
                chosen = rng.choices(
                    [m for kind in self.loader.kinds for m in MUTATORS[kind]], k=rng.choice((1, 1, 1, 2, 3))
                )
                damage, data = tuple(m.__name__ for m in chosen), self.contents[target]
                for mutate in chosen:
                    data = mutate(data, rng)
                target.write_bytes(data)
            self.loader.mend(self.folder, target)
            return self._outcome((target.name, *damage), rng)
        finally:
            self._restore(target)

    def _restore(self, target: Path) -> None:
        """All files as they were made: the loader may have written some too."""
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        for path, data in self.contents.items():
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)

    def _outcome(self, damage: tuple[str, ...], rng: Random) -> Outcome:
        before, start = _memory(reset=True), time.monotonic()
        try:
            with _limit(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.loader.load(self.folder)
            word, text = "accepted", ""
        except CalibQuantError as error:
            word, text = self._judged(str(error))
        except HangError:
            word, text = "fault", f"hang: more than {SECONDS:.0f} s"
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-4:]
            way = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(last))
            word, text = "fault", f"{type(error).__name__}: {' '.join(str(error)[:300].split())} [{way}]"
        seconds, used = time.monotonic() - start, _memory() - before
        if word != "fault" and seconds > SECONDS:
            word, text = "fault", f"hang: {seconds:.0f} s"
        if word != "fault" and used > BYTES:
            word, text = "fault", f"memory: {used / 2**30:.1f} GiB"
        return Outcome(word, text, damage, seconds)

    def _judged(self, line: str) -> tuple[str, str]:
        """Whether a refusal is one line of a sensible length that names the file."""
        names = self.loader.names or tuple(path.name for path in self.targets)
        if len(line.splitlines()) != 1 or not line.isprintable():
            return "fault", f"not one line: {line[:300]!r}"
        if len(line) > LONGEST:
            return "fault", f"{len(line)} characters: {line[:200]}"
        if not any(name in line for name in names):
            return "fault", f"names no file: {line}"
        return "refused", line


def _place(target: Path, word: str) -> None:
    """Something that is no regular file in the place of a file."""
    target.unlink()
    if word == "directory":
        target.mkdir()
    elif word == "fifo":
        os.mkfifo(target)
    elif word == "loop":
        target.symlink_to(target.name)
    elif word == "device":
        target.symlink_to("/dev/zero")


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Ends Python code that takes longer, and refuses memory far beyond the limit before the machine suffers."""

    def ring(*_: object) -> None:
        raise HangError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _memory(reset: bool = False) -> int:
    """Bytes of this process's highest use of memory; `reset` starts again from what it uses now."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
