"""From the recipe's data section to a set of images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from calibquant.data.cifar import open_cifar10
from calibquant.data.classes import read_classes
from calibquant.data.digits import DigitImages
from calibquant.data.files import open_folder
from calibquant.data.imageset import ImageSet
from calibquant.data.lists import open_csv
from calibquant.data.preprocess import check_preprocess
from calibquant.data.shards import open_shards
from calibquant.errors import DataError, nearest
from calibquant.reading import is_folder
from calibquant.recipe import DataRecipe, Preprocess
from calibquant.recipe.section import checked

Split = Literal["calibration", "evaluation"]

logger = logging.getLogger("calibquant")

_SPLITS = {"calibration": "train", "evaluation": "test"}
_FOLDERS = {"calibration": "train", "evaluation": "val"}


def open_images(recipe: DataRecipe, split: Split) -> ImageSet:
    """Open the images that calibrate, or those that evaluate. Files are decoded later, one by one.

    A warning of the logger `calibquant` says what is left out.

    Args:
        recipe: the recipe's `data`. Where it names no set, cifar10 and digits take train and test, folder takes train
            and val; csv and shards have no default. Digits have one channel: their mean and std need length 1.
        split: which of the two sets.

    Raises:
        RecipeError: the recipe was copied with a value that is not valid.
        DataError: files are missing or invalid, or the preprocessing does not fit the images.

    Example:
        >>> from calibquant.recipe import Preprocess
        >>> settings = Preprocess(resize=16, mean=(0.5,), std=(0.5,))
        >>> images = open_images(DataRecipe(kind="digits", preprocess=settings), "evaluation")
        >>> len(images), images.image(0).shape
        (597, torch.Size([1, 16, 16]))
    """
    checked(recipe)
    chosen = recipe.calibration if split == "calibration" else recipe.evaluation
    own = recipe.calibration_preprocess if split == "calibration" else None
    settings = own or recipe.preprocess
    field = "data.calibration_preprocess" if own else "data.preprocess"
    check_preprocess(settings, 1 if recipe.kind == "digits" else 3, field)
    images = _open(recipe, split, chosen, settings)
    images.workers = recipe.workers
    for remark in images.remarks:
        logger.warning("%s", remark)
    return images


def _open(recipe: DataRecipe, split: Split, chosen: str | None, settings: Preprocess) -> ImageSet:
    if recipe.kind in ("cifar10", "digits"):
        if recipe.classes is not None:
            raise DataError("data.classes", f"{recipe.kind} has classes of its own", "leave it out")
        name = _official_split(chosen, split)
        return DigitImages(name, settings) if recipe.kind == "digits" else open_cifar10(_root(recipe), name, settings)
    root = _root(recipe)
    classes = None if recipe.classes is None else read_classes(root / recipe.classes)
    if recipe.kind == "folder":
        return open_folder(root, chosen or _FOLDERS[split], settings, recipe.on_error, classes)
    what, opened = ("tar files", open_shards) if recipe.kind == "shards" else ("a CSV file", open_csv)
    if chosen is None:
        raise DataError(f"data.{split}", "names no file", f"set it to {what}, as a path relative to data.root")
    return opened(root, chosen, settings, recipe.on_error, classes)


def _official_split(chosen: str | None, split: Split) -> str:
    name = chosen or _SPLITS[split]
    if name not in _SPLITS.values():
        raise DataError(f"data.{split}", f"there is no split '{name}'", nearest(name, _SPLITS.values()))
    return name


def _root(recipe: DataRecipe) -> Path:
    if recipe.root is None:
        raise DataError(
            "data.root", f"is not given, but {recipe.kind} needs it", "set it to the folder of the data set"
        )
    root = recipe.root.expanduser()
    if not is_folder(root):
        raise DataError(f"data.root, {root}", "there is no such folder", "set it to the folder of the data set")
    return root
