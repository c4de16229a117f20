"""Recipes from files and dictionaries, with presets and dotted overrides; errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from calibquant.errors import RecipeError, nearest
from calibquant.recipe.models import Recipe, Section
from calibquant.recipe.presets import PRESETS, merged


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply dotted overrides.

    Args:
        path: YAML file. Relative paths inside it are taken from the working directory.
        overrides: strings such as "quant.weights.bits=2"; the value is read as YAML.

    Raises:
        RecipeError: the file is missing, no valid YAML, or a field is unknown or invalid.

    Example:
        >>> recipe = load_recipe("configs/demo.yaml", ["quant.weights.bits=2"])  # doctest: +SKIP
        >>> recipe.quant.weights.bits  # doctest: +SKIP
        2
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(path, f"cannot be read ({reason})", "give the path of a recipe file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}", "is not valid YAML", "correct the indentation or quoting there") from None
    if not isinstance(tree, dict):
        raise RecipeError(path, "is not a recipe", "it must hold fields such as model: and data:")
    return make_recipe(tree, overrides, source=str(path))


def make_recipe(tree: dict[str, Any], overrides: list[str] | None = None, source: str = "recipe") -> Recipe:
    """A recipe from a nested dictionary, its preset and dotted overrides; `source` names it in errors.

    Raises:
        RecipeError: a field is unknown or invalid.
    """
    for override in overrides or []:
        tree = _override(tree, override)
    preset = tree.get("preset")
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise RecipeError(f"{source}, preset", f"'{preset}' is unknown", nearest(str(preset), PRESETS))
        tree = merged(PRESETS[preset], tree)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _first_problem(error, source) from None


def _override(tree: dict[str, Any], text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"override '{text}'", "is not key=value", "write for example quant.weights.bits=2")
    try:
        leaf: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise RecipeError(f"override '{text}'", "its value is not valid YAML", "quote the value") from None
    for part in reversed(key.strip().split(".")):
        leaf = {part: leaf}
    return merged(tree, leaf)


def _first_problem(error: ValidationError, source: str) -> RecipeError:
    """One line for the first problem; unknown keys first, since they often cause the others, then the deepest."""
    problem = min(error.errors(), key=lambda p: (p["type"] != "extra_forbidden", -len(p["loc"])))
    if problem["type"] == "conflict":
        context = problem["ctx"]
        return RecipeError(f"{source}, {context['field']}", context["problem"], context["mend"])
    path, section = _field(problem["loc"])
    where = f"{source}, {'.'.join(path)}" if path else source
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
