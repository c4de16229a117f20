"""A command that is told to end: by Ctrl-C, by SIGTERM, or since its terminal was closed (SIGHUP)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

ENDING = ("SIGTERM", "SIGHUP")  # Windows lacks the second


@dataclass
class Heard:
    """Which signal has told the command to end.

    Args:
        number: of the signal; None where none came.
    """

    number: int | None = None

    @property
    def code(self) -> int:
        """The command's exit code: 128 and the signal's number, as shells count, or 1 for any other error."""
        return 1 if self.number is None else 128 + self.number


@contextmanager
def heard() -> Iterator[Heard]:
    """Within the context each of these signals raises KeyboardInterrupt, so that all end a run alike.

    A signal that the process was started to ignore, as by nohup, stays ignored.

    Yields:
        which signal came.
    """
    found = Heard()

    def interrupt(number: int, _: FrameType | None) -> None:
        found.number = number
        if number != signal.SIGINT:  # a closed terminal sends more than one, which would disturb the cleaning up
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
        before = {number: signal.SIG_DFL for number in numbers if signal.getsignal(number) == signal.SIG_DFL}
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            before[signal.SIGINT] = signal.default_int_handler  # type: ignore[assignment]
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
