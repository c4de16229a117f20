"""The errors a user can meet. Each is one line: what is wrong and where, then the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 600  # characters of each part of a message; names from damaged files may have millions


class CalibQuantError(Exception):
    """Base of every error that is the input's or the machine's fault, not a bug.

    Args:
        where: the file, field or graph node the error is about.
        problem: what is wrong there, without a final full stop.
        mend: what the user can do about it.

    Example:
        >>> str(DataError("val.csv, line 3", "label 12 is outside 0..9", "correct the label"))
        'val.csv, line 3: label 12 is outside 0..9; correct the label'
    """

    def __init__(self, where: object, problem: str, mend: str) -> None:
        self.where, self.problem, self.mend = str(where), problem, mend
        super().__init__(f"{_line(str(where))}: {_line(problem)}; {_line(mend)}")

    def __reduce__(self) -> tuple[type[CalibQuantError], tuple[str, str, str]]:
        """So that it can be sent from one process to another."""
        return type(self), (self.where, self.problem, self.mend)


class RecipeError(CalibQuantError):
    """A recipe, an override or an argument is not valid."""


class DataError(CalibQuantError):
    """Images, labels or manifests cannot be read or used."""


class ModelError(CalibQuantError):
    """A network cannot be built, or its weights cannot be loaded."""


class CaptureError(CalibQuantError):
    """A network cannot be brought into the canonical graph."""


class QuantizationError(CalibQuantError):
    """A plan cannot be made or applied."""


class RunFolderError(CalibQuantError):
    """A run folder or one of its files cannot be written or read."""


class ParallelError(CalibQuantError):
    """The processes of a job cannot work together."""


def _line(text: str) -> str:
    """A text on one line: unprintable characters are escaped, and the middle of a very long text is cut."""
    text = " ".join(text.split())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint naming the known word closest to `name`, or the known words when none is close.

    Example:
        >>> nearest("weigths", ["weights", "activations"])
        "did you mean 'weights'?"
    """
    words = sorted(known)
    close = difflib.get_close_matches(name, words, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(words)}"
