"""Checkpoints of a training: enough to go on after the last complete epoch with the same bytes."""

from __future__ import annotations

import io
from typing import Any

import torch

from calibquant.data import ImageSet
from calibquant.errors import RunFolderError
from calibquant.runfolder import CHECKPOINT, TRAINING, RunFolder, sha256
from calibquant.training import Training


def fingerprint(images: ImageSet) -> str:
    """SHA-256 of the names and labels of a set, in order; no image is read."""
    rows = (f"{images.name(i)} {label}\n" for i, label in enumerate(images.labels()))
    return sha256("".join(rows).encode())


def save_training(
    folder: RunFolder, training: Training, images: str, recipe: dict[str, Any], name: str = CHECKPOINT
) -> None:
    """Store the state after an epoch.

    The small JSON file that names the file of the state is replaced last: killed at any moment, the folder holds either
    the old or the new checkpoint.

    Args:
        folder: the run's folder.
        training: its state.
        images: fingerprint of the images that it learns from.
        recipe: the fields of the run's recipe; continuing it needs the same but for a few.
        name: of the small file.
    """
    done = len(training.reports)
    buffer = io.BytesIO()
    torch.save(training.state(), buffer)
    data, state = buffer.getvalue(), f"checkpoint-{done:04d}.pt"
    folder.write(state, data)
    folder.write_json(name, {
        "kind": TRAINING, "state": state, "sha256": sha256(data), "images": images, "recipe": recipe, "epochs": done,
    })  # fmt: skip
    for old in folder.path.glob("checkpoint-*.pt"):
        if old.name != state:
            old.unlink(missing_ok=True)


def load_training(folder: RunFolder, training: Training, images: str, name: str = CHECKPOINT) -> bool:
    """Give a training the stored state, if the folder holds a checkpoint of that name; whether it does.

    Raises:
        RunFolderError: the checkpoint is damaged, or was made of another network, other images or other settings.
    """
    where = folder.path / name
    if not where.is_file():
        return False
    stored = folder.read_json(name)
    try:
        if stored["images"] != images:
            raise RunFolderError(where, "was made with other images", "restore those that the training began with")
        data = folder.read(stored["state"])
        if sha256(data) != stored["sha256"]:
            raise ValueError("its hash is wrong")
        training.restore(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except RuntimeError:
        problem = "was made of another network or with other settings"
        raise RunFolderError(where, problem, "restore what the training began with") from None
    except RunFolderError:
        raise
    except ValueError as error:
        raise RunFolderError(where, f"is damaged ({error})", "delete the hidden folder and train again") from None
    except Exception as error:  # torch's restricted reader raises nearly every kind on damaged bytes
        problem = f"is damaged ({type(error).__name__}: {error})"
        raise RunFolderError(where, problem, "delete the hidden folder and train again") from None
    return True
