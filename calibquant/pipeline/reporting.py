"""How a run tells what it is doing: to whoever listens, and to its log.txt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

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
def log_to(folder: RunFolder) -> Iterator[None]:
    """Keep what happens within the context in the run's log.txt."""
    handler = _LogFile(folder.path / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with suppress(OSError):  # each line was flushed already
            handler.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A full disk stops the run here as at every other file; logging would print a stack trace and go on."""
        raise
