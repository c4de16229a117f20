"""What a user passes from Python: a recipe, a network and images, checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from calibquant.data import ImageSet, check_images
from calibquant.errors import ModelError, RunFolderError
from calibquant.networks import bare, check_network
from calibquant.recipe import Recipe

Live = tuple[nn.Module | None, ImageSet | None, ImageSet | None]  # network, calibration and evaluation images


def as_path(path: Path | str, where: str) -> Path:
    """A path, or the one that a string names.

    Raises:
        RunFolderError: it is something else.
    """
    if isinstance(path, (str, Path)):
        return Path(path)
    mend = "pass its attribute folder" if hasattr(path, "folder") else "pass the path of a run folder"
    raise RunFolderError(where, f"is of type {type(path).__name__}, not a path", mend)


def checked_live(
    network: nn.Module | None, calibration: ImageSet | None = None, evaluation: ImageSet | None = None
) -> Live:
    """The given network without its wrappers, and the given images.

    Raises:
        ModelError: the network is no nn.Module.
        DataError: images are no ImageSet.
    """
    for images, where in ((calibration, "calibration images"), (evaluation, "evaluation images")):
        if images is not None:
            check_images(images, where)
    if network is None:
        return None, calibration, evaluation
    check_network(network)
    return bare(network), calibration, evaluation


def check_weights_file(recipe: Recipe) -> None:
    """Check that the weights that a recipe names beside a live network can be read: the receipt gets their hash.

    Raises:
        ModelError: they cannot.
    """
    path = recipe.model.weights
    if path is not None and not (path.is_file() and os.access(path, os.R_OK)):
        problem = "cannot be read" if path.is_file() else "there is no such file"
        mend = "correct the path, or leave model.weights out: the network that was passed has its own weights"
        raise ModelError(f"recipe, model.weights, {path}", problem, mend)
