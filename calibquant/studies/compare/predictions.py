"""What a network said of each evaluation image, kept beside its run so that runs can be compared image by image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from calibquant.errors import RunFolderError
from calibquant.reading import read_file
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
        data = read_file(folder / PREDICTIONS, RunFolderError, "evaluate the run again")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            found = np.asarray(stored["predictions"]), np.asarray(stored["labels"])
    except Exception:  # a missing file, or what zip and numpy raise on a damaged one: nearly anything
        return None
    fitting = all(array.dtype == np.int64 and array.shape == (count,) for array in found)
    return found if fitting else None
