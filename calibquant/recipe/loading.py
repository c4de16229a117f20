"""Recipes from files and dictionaries, with includes, presets and dotted overrides; errors of one line.

What stands further down wins: the defaults; the preset; the included files in their order; the file's own fields; the
overrides. There is one preset: the one named furthest down.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from calibquant.errors import RecipeError, nearest
from calibquant.reading import parse_yaml, read_file
from calibquant.recipe.models import Recipe
from calibquant.recipe.presets import PRESETS, merged
from calibquant.recipe.section import Section
from calibquant.recipe.shipped import located


@dataclass(frozen=True)
class Layer:
    """Fields of a recipe that stand together, and the name by which errors call the place they come from."""

    source: str
    tree: dict[str, Any]


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file with the files that it includes, and apply dotted overrides.

    Args:
        path: YAML file, or the name of a recipe that comes with the package, such as "w4a4/resnet18". Relative paths
            of data and weights are taken from the working directory, those of `include` from the file's folder.
        overrides: strings such as "quant.weights.bits=2"; the value is read as YAML.

    Raises:
        RecipeError: a file is missing, no valid YAML or includes itself, or a field is unknown or invalid.

    Example:
        >>> load_recipe("digits", ["quant.weights.bits=2"]).setting
        'W2A4'
    """
    path = located(path)
    return _recipe(layers_of(path), overrides or [], str(path))


def make_recipe(tree: dict[str, Any], overrides: list[str] | None = None, source: str = "recipe") -> Recipe:
    """A recipe from a nested dictionary, its preset and dotted overrides; `source` names it in errors.

    Raises:
        RecipeError: a field is unknown or invalid.
    """
    return _recipe([Layer(source, tree)], overrides or [], source)


def layers_of(path: Path, within: tuple[Path, ...] = ()) -> list[Layer]:
    """The fields of a recipe file behind those of the files that it includes: a later layer wins over an earlier.

    Args:
        path: the file.
        within: the files that have led to it.

    Raises:
        RecipeError: a file is missing, no recipe, or includes itself.
    """
    tree = read_tree(path, within[-1] if within else None)
    includes = tree.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise RecipeError(f"{path}, include", "is no list of files", "write for example include: [network.yaml]")
    chain = (*within, path)
    layers: list[Layer] = []
    for inner in (path.parent / name for name in includes):
        if any(_real(inner) == _real(outer) for outer in chain):
            way = " -> ".join(str(file) for file in (*chain, inner))
            raise RecipeError(f"{path}, include", f"goes in a circle ({way})", "take one of these out")
        layers += layers_of(inner, chain)
    return [*layers, Layer(str(path), tree)]


def _real(path: Path) -> str:
    """The file that a path leads to; the path itself where it leads to none, such as a link to itself."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return str(path)


def read_tree(path: Path, includer: Path | None = None) -> dict[str, Any]:
    """The fields of one file, as they stand there.

    Args:
        path: YAML file.
        includer: the file that includes it.

    Raises:
        RecipeError: the file is missing, no valid YAML or no mapping.
    """
    mend = "give the path of a recipe file, or a name that calibquant recipes lists"
    data = read_file(path, RecipeError, f"correct include in {includer}" if includer else mend)
    return parse_tree(data, path)


def parse_tree(data: bytes, path: Path) -> dict[str, Any]:
    """The fields that the content of a recipe file gives; `path` names it in errors.

    Raises:
        RecipeError: the text is no valid YAML or no mapping.
    """
    try:
        tree = parse_yaml(data)
    except ValueError as error:
        raise RecipeError(path, f"is not valid YAML ({error})", "correct the indentation or quoting there") from None
    if not isinstance(tree, dict):
        raise RecipeError(path, "is not a recipe", "it must hold fields such as model: and data:")
    return tree


def _recipe(layers: list[Layer], overrides: list[str], source: str) -> Recipe:
    """Layers under overrides, above the preset that they name."""
    layers = [*layers, *(Layer(source, _override(text)) for text in overrides)]
    tree: dict[str, Any] = reduce(merged, [layer.tree for layer in layers])
    if "include" in tree:
        raise RecipeError(f"{source}, include", "is known in recipe files alone", "write it at the top of a file")
    preset = tree.get("preset")
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            where = f"{_origin(layers, ['preset'], source)}, preset"
            raise RecipeError(where, f"'{preset}' is unknown", nearest(str(preset), PRESETS))
        tree = merged(PRESETS[preset], tree)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _first_problem(error, layers, source) from None


def _origin(layers: list[Layer], path: list[str], source: str) -> str:
    """The source of the last layer that sets a field; `source` where none does."""

    def sets(tree: Any, parts: list[str]) -> bool:
        if not parts or not isinstance(tree, dict):
            return not parts
        return any(str(key) == parts[0] and sets(value, parts[1:]) for key, value in tree.items())

    return next((layer.source for layer in reversed(layers) if sets(layer.tree, path)), source)


def _override(text: str) -> dict[str, Any]:
    """The fields that an override such as quant.weights.bits=2 sets."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"override '{text}'", "is not key=value", "write for example quant.weights.bits=2")
    try:
        leaf: Any = parse_yaml(value.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise RecipeError(f"override '{text}'", f"its value is not valid YAML ({error})", "quote the value") from None
    for part in reversed(key.strip().split(".")):
        leaf = {part: leaf}
    return leaf


def _first_problem(error: ValidationError, layers: list[Layer], source: str) -> RecipeError:
    """One line for the first problem; unknown keys first, since they often cause the others, then the deepest."""
    problem = min(error.errors(), key=lambda p: (p["type"] != "extra_forbidden", -len(p["loc"])))
    if problem["type"] == "conflict":
        context = problem["ctx"]
        where = f"{_origin(layers, context['field'].split('.'), source)}, {context['field']}"
        return RecipeError(where, context["problem"], context["mend"])
    path, section = _field(problem["loc"])
    where = f"{_origin(layers, path, source)}, {'.'.join(path)}" if path else source
    if problem["type"] == "extra_forbidden":
        return RecipeError(where, "this key is unknown", nearest(path[-1], section.model_fields))
    if problem["type"] == "missing":
        return RecipeError(where, "this field is required", "add it to the recipe")
    got = repr(problem["input"])
    if problem["type"] == "model_type":
        return RecipeError(where, f"holds {got[:60]} in place of fields", "give fields, or leave the key out")
    text = problem["msg"].removeprefix("Value error, ")
    return RecipeError(where, f"{text[0].lower()}{text[1:]}", f"got {got[:60]}")


def _field(location: tuple[int | str, ...]) -> tuple[list[str], type[Section]]:
    """The dotted path of a field and its section; what pydantic adds for the branches of a union is left out."""
    path: list[str] = []
    section: type[Section] = Recipe
    inner: type[Section] | None = Recipe
    for part in location:
        if inner is not None:
            section, inner = inner, _section(inner, str(part))
            path.append(str(part))
        elif isinstance(part, int):
            path.append(str(part))
    return path, section


def _section(outer: type[Section], name: str) -> type[Section] | None:
    """The section that a field holds, or None for a plain value or an unknown field."""
    annotation = outer.model_fields[name].annotation if name in outer.model_fields else None
    candidates = (annotation, *get_args(annotation))
    return next((a for a in candidates if isinstance(a, type) and issubclass(a, Section)), None)
