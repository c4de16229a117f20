"""Errors while a network is exported name the node at which they happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from calibquant.errors import CalibQuantError, ModelError
from calibquant.export.session import brief

REPORT = "report it with the recipe and the version of ONNX Runtime"


@contextmanager
def at_node(name: str, what: str) -> Iterator[None]:
    """Turns any exception within the context into a ModelError of one line.

    Args:
        name: of the node or step.
        what: was to be done with it, such as "written".

    Example:
        >>> with at_node("conv1", "written"):
        ...     [][0]
        Traceback (most recent call last):
        calibquant.errors.ModelError: node conv1: cannot be written (IndexError: list index out of range); report it ...
    """
    try:
        yield
    except CalibQuantError:
        raise
    except Exception as error:
        problem = f"cannot be {what} ({type(error).__name__}: {brief(error)})"
        raise ModelError(f"node {name}", problem, REPORT) from error
