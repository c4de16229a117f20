"""The errors a user can meet. Each is one line: what is wrong and where, then the mend."""

from __future__ import annotations

import difflib
import re
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


def unknown(where: object, name: str, known: Iterable[str]) -> RecipeError:
    """The error for a name that a function does not know; `where` is the recipe's field that holds it.

    Example:
        >>> print(unknown("quant.weights.observer", "mes", ["mse", "minmax"]))
        quant.weights.observer: 'mes' is unknown; did you mean 'mse'?
    """
    return RecipeError(where, f"'{name}' is unknown", nearest(name, known))


class OutOfMemoryError(CalibQuantError):
    """The machine or the device has less memory than the work needs."""


def lacks_memory(error: BaseException) -> str | None:
    """What another library's error says of missing memory; None where it is about something else.

    oneDNN says only that it could not create a primitive. The error may be the one that another was made of.

    Example:
        >>> lacks_memory(RuntimeError("could not create a primitive"))
        'could not create a primitive'
    """
    found: BaseException | None = error
    while found is not None:
        text = " ".join(str(found).split())
        sign = _LACK.search(text)
        if sign is not None:
            return text[sign.start() :].partition(". ")[0][:120]
        if isinstance(found, MemoryError):
            return text[:120] or "no memory is left"
        found = found.__context__
    return None


_LACK = re.compile(
    r"could not create a primitive(?! desc)|can't allocate memory|not enough memory|out of memory|std::bad_alloc"
    r"|Failed to allocate memory|Cannot allocate memory"
)


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
