"""Choosing calibration images, and judging given ones, without quantizing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from calibquant.data import ImageSet, Manifest, check_images, find_images, manifest_csv, open_images, read_manifest
from calibquant.data.lists import read_rows
from calibquant.data.manifest import COLUMNS
from calibquant.errors import DataError
from calibquant.pipeline.preparing import open_candidates
from calibquant.pipeline.reporting import Reporter, Silent, warn
from calibquant.recipe import Recipe, changed, idle_fields, valid
from calibquant.runfolder import check_file, make_folder, write_alone
from calibquant.selection import Judgement, labelled_pool
from calibquant.selection import judge as judge_pool

POOL = 5_000  # candidates that stand for all when a set is judged, where the recipe gives no number


@dataclass(frozen=True)
class Judged:
    """A judgement with the names of what it speaks of.

    Args:
        judgement: the figures.
        pool: how many images the set was compared with.
        add: names of the images that would improve it most.
        missing_classes: names, or numbers, of the classes that the set lacks.
        stretching: names of the images that alone make a range wide, as in `judgement.stretching`.
    """

    judgement: Judgement
    pool: int
    add: tuple[str, ...]
    missing_classes: tuple[str, ...]
    stretching: tuple[str, ...]


def select(
    recipe: Recipe | dict[str, Any],
    network: nn.Module | None = None,
    calibration: ImageSet | None = None,
    out: Path | None = None,
    reporter: Reporter | None = None,
) -> Manifest:
    """Choose calibration images as a recipe's `calibration` section says.

    Args:
        recipe: names network and images, and how to choose.
        network, calibration: live ones instead.
        out: file for the manifest, written at once; `calibration.manifest` takes it.
        reporter: hears of progress.

    Raises:
        CalibQuantError: something about the recipe, network, images or the file.

    Example:
        >>> import calibquant, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...                           torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> images = calibquant.TensorImages(torch.rand(64, 3, 16, 16))
        >>> recipe = calibquant.Recipe(calibration={"count": 16, "strategy": "herding"})
        >>> len(calibquant.select(recipe, net, images).rows)
        16
    """
    recipe = valid(recipe)
    for field in idle_fields(recipe, "select"):
        warn(reporter or Silent(), field)
    if out is not None:
        check_file(Path(out))
    _, candidates = open_candidates(recipe, network, calibration, reporter)
    manifest = candidates.choose().manifest
    if out is not None:
        make_folder(Path(out).parent)
        write_alone(Path(out), manifest_csv(manifest).encode())
    return manifest


def judge(
    recipe: Recipe | dict[str, Any],
    given: Path | ImageSet,
    network: nn.Module | None = None,
    calibration: ImageSet | None = None,
    reporter: Reporter | None = None,
) -> Judged:
    """Rate a set of images as calibration images, beside random sets of the recipe's calibration set.

    Args:
        recipe: names network and images; `calibration.pool` says with how many candidates the set is compared.
        given: the set: a manifest or a run folder, whose images are looked up in the recipe's calibration set; a list
            (CSV) or a folder of images; or live images.
        network, calibration: live ones instead of the recipe's.
        reporter: hears of progress.

    Raises:
        CalibQuantError: something about the recipe, network or images.

    Example:
        >>> import calibquant, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...                           torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> images = calibquant.TensorImages(torch.rand(200, 3, 16, 16))
        >>> dark = calibquant.TensorImages(torch.rand(32, 3, 16, 16) / 4)
        >>> calibquant.judge(calibquant.Recipe(), dark, net, images).judgement.percentile
        0.0
    """
    recipe = valid(recipe)
    size = recipe.calibration.pool or POOL
    changes = {"calibration.pool": size, "calibration.count": 2, "calibration.manifest": None}
    recipe = changed(recipe, changes)
    _, known = open_candidates(recipe, network, calibration, reporter)
    images, indices = _given(recipe, known.images, given)
    pool, scored = known.score(known.images, known.indices), known.score(images, indices)
    if any((labelled_pool(*which).classes < 0).any() for which in ((known.images, known.indices), (images, indices))):
        pool, scored = pool.as_predicted(), scored.as_predicted()  # the same measure for both
    distinct = len({images.sha256(i) for i in indices})
    found = judge_pool(pool, scored, recipe.seed, distinct)
    classes = images.classes or known.images.classes
    return Judged(
        found,
        len(pool),
        tuple(known.images.name(int(pool.indices[row])) for row in found.add),
        tuple(classes[c] if classes else str(c) for c in found.missing_classes),
        tuple(images.name(indices[stretch.row]) for stretch in found.stretching),
    )


def _given(recipe: Recipe, images: ImageSet, given: Path | ImageSet) -> tuple[ImageSet, list[int]]:
    """The set that is judged, and which of its images."""
    if isinstance(given, ImageSet):
        return given, list(range(len(given)))
    if not isinstance(given, (str, Path)):
        check_images(given, "images to judge")
    given = Path(given)
    path = given / "manifest.csv" if (given / "manifest.csv").is_file() else given
    if path.is_dir():
        own = recipe.data.model_copy(update={"kind": "folder", "root": path.parent, "calibration": path.name})
    elif path.is_file():
        header = read_rows(path)[0][1] if read_rows(path) else {}
        if all(column in header for column in COLUMNS):
            return images, find_images(images, read_manifest(path).rows)
        own = recipe.data.model_copy(update={"kind": "csv", "calibration": str(path.resolve())})
    else:
        raise DataError(path, "there is no such file or folder", "give a manifest, a list of images or a folder")
    opened = open_images(own, "calibration")
    return opened, list(range(len(opened)))
