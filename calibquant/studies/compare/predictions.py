"""What a network said of each evaluation image, kept beside its run so that runs can be compared image by image."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from calibquant.runfolder import write_atomic

PREDICTIONS = "predictions.npz"
Classes = npt.NDArray[np.int64]


def write_predictions(folder: Path, predictions: Classes, labels: Classes) -> None:
    """Store the predicted class and the label (-1 where unknown) of each image, (N,) both."""
    content = io.BytesIO()
    np.savez(content, predictions=predictions.astype(np.int64), labels=labels.astype(np.int64))
    write_atomic(folder / PREDICTIONS, content.getvalue())


def read_predictions(folder: Path, count: int) -> tuple[Classes, Classes] | None:
    """The stored predictions and labels; None where they are missing, damaged or not of `count` images."""
    try:
        with np.load(folder / PREDICTIONS, allow_pickle=False) as stored:
            found = stored["predictions"], stored["labels"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    fitting = all(array.dtype == np.int64 and array.shape == (count,) for array in found)
    return found if fitting else None
