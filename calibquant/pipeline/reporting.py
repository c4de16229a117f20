"""How a run tells what it is doing: to whoever listens, and to its log.txt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from calibquant.errors import CalibQuantError, OutOfMemoryError, lacks_memory
from calibquant.runfolder import RunFolder

log = logging.getLogger("calibquant")


class Reporter(Protocol):
    """Hears how a run goes on; the command line draws it."""

    def step(self, number: int, total: int, title: str) -> None:
        """A step begins."""

    def progress(self, done: int, total: int, where: str = "") -> None:
        """Work done within the step, and where it stands in words."""

    def note(self, text: str) -> None:
        """A fact worth showing."""


class Silent:
    """Hears nothing."""

    def step(self, number: int, total: int, title: str) -> None: ...

    def progress(self, done: int, total: int, where: str = "") -> None: ...

    def note(self, text: str) -> None: ...


def begin(reporter: Reporter, number: int, total: int, title: str) -> None:
    """A numbered step begins."""
    log.info("[%d/%d] %s", number, total, title)
    reporter.step(number, total, title)


def note(reporter: Reporter, text: str) -> None:
    """A fact worth showing and keeping."""
    log.info("%s", text)
    reporter.note(text)


def warn(reporter: Reporter, text: object) -> None:
    """What the user should know before the figures are trusted."""
    log.warning("%s", text)
    reporter.note(f"warning: {text}")


@contextmanager
def enough_memory(*fields: str) -> Iterator[None]:
    """Within the context, work that needs more memory than there is becomes an error that names what to lower.

    Args:
        fields: of the recipe, on which the work's memory depends.

    Raises:
        OutOfMemoryError: a library could not allocate memory.
    """
    try:
        yield
    except Exception as error:  # as capture's, which says that the network fails
        lack = lacks_memory(error)
        if lack is None or isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError(
            "memory", f"there is less than this step needs ({lack})", f"lower {' or '.join(fields)}"
        ) from error


@contextmanager
def log_to(folder: RunFolder) -> Iterator[None]:
    """Keep what happens within the context in the run's log.txt, and why it ended if that was too early."""
    handler = _LogFile(folder.path / "log.txt", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # a full disk may be what ended it
            log.error("%s", _reason(error))
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with suppress(OSError):  # each line was flushed already
            handler.close()


def _reason(error: BaseException) -> str:
    if isinstance(error, CalibQuantError):
        return str(error)
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A full disk stops the run here as at every other file; logging would print a stack trace and go on."""
        raise
