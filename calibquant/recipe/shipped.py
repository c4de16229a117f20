"""The recipes that come with the package, by name: configs/w4a4/resnet18.yaml is w4a4/resnet18."""

from __future__ import annotations

from pathlib import Path

FRAGMENTS = "fragments"  # files that recipes include and that are none themselves


def shipped_folder() -> Path:
    """The folder of the recipes: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_recipes() -> dict[str, Path]:
    """The files of the recipes by name, sorted; empty where they are not installed.

    Example:
        >>> shipped_recipes()["digits"].name
        'digits.yaml'
    """
    folder = shipped_folder()
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return {file.with_suffix("").as_posix(): folder / file for file in files if FRAGMENTS not in file.parts}


def located(path: str | Path) -> Path:
    """A path as it is given, or where nothing is there, the recipe that comes along under this name."""
    path = Path(path)
    return path if path.exists() else shipped_recipes().get(path.as_posix().removesuffix(".yaml"), path)
