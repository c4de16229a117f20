"""Standard output and error that no run is lost for: characters they lack are spelled, a closed one is left alone."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
import unicodedata
from typing import Literal, TextIO

SPELLED = {
    "±": "+-", "×": "x", "–": "-", "—": "-", "…": "...", "→": "->", "·": "*", "≤": "<=", "≥": ">=", "≈": "~",
    "‖": "||", "σ": "sigma", "μ": "mu", "µ": "u", "’": "'", "‘": "'", "“": '"', "”": '"',
}  # fmt: skip
SPELLING = "calibquant-spelling"  # name of the error handler
CLOSED = (errno.EPIPE, errno.EIO, errno.EBADF)  # nobody reads on: `| head`, or a terminal that was closed


class Output:
    """A file-like object that writes to what sys.stdout or sys.stderr is at the time.

    Where writing fails, what follows is dropped, so that the work goes on and ends as it would have.

    Args:
        name: which of the two.

    Attributes:
        failure: why something was not written, other than that nobody reads it; None where nothing failed.
    """

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self._name = name
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        stream = self._stream
        if stream is not None:
            try:
                stream.write(text)
            except OSError as error:
                self._abandon(stream, error)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written, or drop it."""
        stream = self._stream
        if stream is not None:
            try:
                stream.flush()
            except OSError as error:
                self._abandon(stream, error)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's file descriptor.

        Raises:
            OSError: it has none.
        """
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        """Such as utf-8."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def _stream(self) -> TextIO | None:
        """The stream itself; None where the process was started without it, until `prepare_streams`."""
        stream = getattr(sys, self._name)
        return getattr(stream, "rich_proxied_file", stream)  # rich puts a writer of its own there, which writes to us

    def _abandon(self, stream: TextIO, error: OSError) -> None:
        """Let what is still buffered, and all that follows, go nowhere; else Python fails on it again at the end."""
        if error.errno not in CLOSED and self.failure is None:
            self.failure = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def prepare_streams() -> None:
    """Give the process all three standard streams, and let output spell what its encoding lacks."""
    _open_missing()
    codecs.register_error(SPELLING, _spell)
    for stream in (sys.stdout, sys.stderr):
        # An error handler that the user chose by PYTHONIOENCODING stays: those named here are Python's own choices.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors=SPELLING)


def _open_missing() -> None:
    """Let closed standard streams lead nowhere.

    A run's file that got such a stream's number would receive libraries' messages, and rich may fail where Python has
    no object for a stream.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for characters that an encoding lacks; the bytes of a file's name that is no text stay as they are.

    Example:
        >>> codecs.register_error(SPELLING, _spell)
        >>> "92.5 ± 0.3 – Müller, 図".encode("ascii", SPELLING)
        b'92.5 +- 0.3 - Muller, \\\\u56f3'
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    plain = SPELLED.get(character) or unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain or character.encode("ascii", "backslashreplace").decode(), error.start + 1
