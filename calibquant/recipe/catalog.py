"""What the recipes that come with the package are about, as `calibquant recipes` lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibquant.errors import RecipeError
from calibquant.recipe.loading import load_recipe
from calibquant.recipe.shipped import shipped_folder, shipped_recipes

PUBLISHED = "published: "


@dataclass(frozen=True)
class Entry:
    """A recipe of the catalog.

    Args:
        name: what commands take in place of a file.
        network: the recipe's `model.name`.
        setting: such as W4A4.
        method: the preset; without one the way of reconstruction, or nearest.
        calibration: images.
        boundary, placement: the recipe's.
        data: kind of the images.
        description: the file's first comment line.
        published: its comment line that begins with "published:"; the accuracy that others have reported.
        path: the file.
    """

    name: str
    network: str | None
    setting: str
    method: str
    calibration: int
    boundary: str
    placement: str
    data: str | None
    description: str
    published: str | None
    path: Path


def catalog(words: Sequence[str] = ()) -> list[Entry]:
    """The recipes whose name, network, setting or method holds each of the words, whatever its case; sorted by name.

    Raises:
        RecipeError: there is none, or a file is not valid.

    Example:
        >>> catalog(["resnet50", "w4a4", "banner-all"])[0].name
        'banner/resnet50'
    """
    files = shipped_recipes()
    if not files:
        raise RecipeError(shipped_folder(), "holds no recipes", "install calibquant again")
    entries = [_entry(name, path) for name, path in files.items()]
    found = [entry for entry in entries if all(word.lower() in _text(entry) for word in words)]
    if not found:
        problem = f"no recipe is of '{' '.join(words)}'"
        raise RecipeError("calibquant recipes", problem, "without words it lists all")
    return found


def _text(entry: Entry) -> str:
    return f"{entry.name} {entry.network} {entry.setting} {entry.method}".lower()


def _entry(name: str, path: Path) -> Entry:
    recipe = load_recipe(path)
    comments = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    method = recipe.reconstruct.method
    return Entry(
        name=name,
        network=recipe.model.name,
        setting=recipe.setting,
        method=recipe.preset or ("nearest" if method == "none" else method),
        calibration=recipe.calibration.count,
        boundary=recipe.quant.boundary,
        placement=recipe.quant.placement,
        data=recipe.data.kind,
        description=comments[0] if comments else "",
        published=next((c.removeprefix(PUBLISHED) for c in comments if c.startswith(PUBLISHED)), None),
        path=path,
    )
