"""Reading the pickles of CIFAR-10's python form without executing them.

A pickle calls what it names. Here the few names that those files need stand for inert objects of this module, and any
other name is refused, so that neither numpy's nor anyone's code runs on a file's behalf.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from calibquant.errors import DataError
from calibquant.reading import read_regular

MOST_BYTES = 1 << 29  # of a file; an official one has 31 million
MOST_STEPS = 1_000_000  # of a pickle; an official one has 30,000


class _Array:
    """What stands for numpy's ndarray until the pickle has told its contents."""

    def __init__(self) -> None:
        self.values: npt.NDArray[np.uint8] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, raw = state
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes) or math.prod(shape) != len(raw):
            raise pickle.UnpicklingError("not an array of bytes")
        self.values = np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if column_major else "C")


class _Dtype:
    """What stands for numpy's dtype: always one unsigned byte."""

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment say nothing about single bytes."""


class _Allowed:
    """A name that the pickle may call. It cannot be altered by the pickle, having neither attributes nor state."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("state for a function")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _dtype(name: str | bytes, *_: Any) -> _Dtype:
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError("not an array of bytes")
    return _Dtype()


def _refuse(*_: Any) -> NoReturn:
    raise pickle.UnpicklingError("an array made in an unknown way")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _refuse,  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _dtype,
}


class _BatchUnpickler(pickle.Unpickler):
    """Reads a pickle whose steps `_check_steps` found to be harmless in number and place."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._left = len(data)  # that may still be encoded: an honest pickle encodes each of its texts once

    def find_class(self, module: str, name: str) -> _Allowed:
        if (module, name) == ("_codecs", "encode"):
            return _Allowed(self._encode)
        if (module, name) not in _ALLOWED:
            raise _ForbiddenNameError(f"{module}.{name}")
        return _Allowed(_ALLOWED[module, name])

    def _encode(self, text: str, encoding: str) -> bytes:
        self._left -= len(text)
        if encoding not in ("latin1", b"latin1") or self._left < 0:
            raise pickle.UnpicklingError("not latin1, or more bytes than the file holds")
        return text.encode("latin1")


def _check_steps(data: bytes) -> None:
    """Refuse what makes the unpickler reserve more memory than the file justifies: sizes, steps and memo numbers."""
    for count, (code, argument, _) in enumerate(pickletools.genops(data)):  # raises where a size passes the file's end
        if count > MOST_STEPS or ("PUT" in code.name and (argument or 0) > count):
            raise pickle.UnpicklingError("too many steps, or a memo number beyond them")


class _ForbiddenNameError(Exception):
    """The pickle names something that a CIFAR-10 batch does not need."""


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 256


def read_batch(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels (N, 3072) and labels (N,) of one file of the python form.

    Raises:
        DataError: the file is truncated, is no CIFAR-10 batch, or names anything that such a batch does not need.
    """
    again = "download cifar-10-python.tar.gz again"
    try:
        data = read_regular(path, MOST_BYTES, links=True)
        _check_steps(data)
        tree = _BatchUnpickler(data).load()
    except _ForbiddenNameError as error:
        problem = f"is not read because it asks to run {error}, which no CIFAR-10 file does"
        raise DataError(path, problem, "do not trust this file; " + again) from None
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "make the file readable") from None
    except Exception:  # a damaged pickle can raise nearly anything
        raise DataError(path, "is truncated or not a CIFAR-10 batch", again) from None
    fields = tree if isinstance(tree, dict) else {}
    array, labels = (fields.get(key, fields.get(key.encode())) for key in ("data", "labels"))
    pixels = array.values if isinstance(array, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise DataError(path, "holds no images of 3072 bytes under 'data'", again)
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(_is_byte(x) for x in labels):
        raise DataError(path, f"holds no list of {len(pixels)} class indices under 'labels'", again)
    return pixels, np.array(labels, dtype=np.int64)
