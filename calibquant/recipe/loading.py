"""Recipes from files and dictionaries, with includes, presets and dotted overrides; errors of one line.

What stands further down wins: the defaults; the preset; the included files in their order; the file's own fields; the
overrides. There is one preset: the one named furthest down.

null takes a field's value away: the field is null where it can be, and else has the preset's value or its default. {}
empties a mapping such as model.options.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from calibquant.errors import RecipeError, nearest
from calibquant.reading import MOST_RECIPE, parse_yaml, read_regular
from calibquant.recipe.models import Recipe
from calibquant.recipe.presets import merged
from calibquant.recipe.section import Section, given, keep_given, section_of
from calibquant.recipe.shipped import located
from calibquant.strangers import in_run_folder

STANDARD_INPUT = Path("-")


@dataclass(frozen=True)
class Layer:
    """Fields of a recipe that stand together.

    Args:
        source: the name by which errors call the place they come from.
        tree: the fields.
        stranger: whether they come from a run folder, which is data: it names no code that is run and no place that is
            written to.
    """

    source: str
    tree: dict[str, Any]
    stranger: bool = False


def load_recipe(
    path: str | Path, overrides: list[str] | None = None, trust_code: bool = False, own: bool = True
) -> Recipe:
    """Read a recipe file with the files that it includes, and apply dotted overrides.

    A file in a run folder is data: its `runs` does not count, and code that it names is not run.

    Args:
        path: YAML file, the name of a recipe that comes with the package, such as "w4a4/resnet18", or "-" for standard
            input. Relative paths of data and weights are taken from the working directory, those of `include` from the
            file's folder; of standard input both from the working directory.
        overrides: strings such as "quant.weights.bits=2"; the value is read as YAML.
        trust_code: whether code that a run folder's recipe names may be run.
        own: whether the user named the file; one that was found beside another is taken as a run folder's.

    Raises:
        RecipeError: a file is missing, no valid YAML or includes itself, or a field is unknown or invalid.

    Example:
        >>> load_recipe("digits", ["quant.weights.bits=2"]).setting
        'W2A4'
    """
    path = located(path)
    return _recipe(layers_of(path, stranger=not own), overrides or [], _shown(path), trust_code)


def make_recipe(
    tree: dict[str, Any],
    overrides: list[str] | None = None,
    source: str = "recipe",
    stranger: bool = False,
    trust_code: bool = False,
) -> Recipe:
    """A recipe from a nested dictionary, its preset and dotted overrides.

    Args:
        tree: the fields.
        overrides: as `load_recipe` takes them.
        source: names the fields in errors.
        stranger: whether they come from a run folder; see `load_recipe`.
        trust_code: whether code that they name may be run all the same.

    Raises:
        RecipeError: a field is unknown or invalid.
    """
    return _recipe([Layer(source, tree, stranger)], overrides or [], source, trust_code)


def changed(recipe: Recipe, changes: dict[str, Any], source: str = "recipe") -> Recipe:
    """A recipe with other values in some fields, checked as one from a file is.

    What the user has set, `model_fields_set`, is that of `recipe`: changes are the program's.

    Args:
        recipe: is not changed.
        changes: values by dotted names, such as {"quant.weights.bits": 2}.
        source: names their origin in errors.

    Raises:
        RecipeError: a field is unknown or invalid.

    Example:
        >>> changed(make_recipe({}), {"quant.weights.bits": 2}).setting
        'W2A4'
    """
    own: dict[str, Any] = reduce(merged, [_nested(name, None) for name in given(recipe)], {})
    layers = [Layer(source, recipe.model_dump()), *(Layer(source, _nested(*change)) for change in changes.items())]
    result = _validated(reduce(_layered, [layer.tree for layer in layers]), layers, source)
    strangers = {field: path for field, path in recipe.model.strangers.items() if f"model.{field}" not in changes}
    result = _given_by(result, strangers)
    keep_given(result, own)
    return result


def valid(recipe: Recipe | dict[str, Any]) -> Recipe:
    """A recipe from its fields, or one that may have been copied with other values, checked.

    Raises:
        RecipeError: it is something else, or a field is unknown or invalid.
    """
    if isinstance(recipe, Recipe):
        return changed(recipe, {})
    if isinstance(recipe, Mapping):
        return make_recipe(dict(recipe))
    mend = "pass a calibquant.Recipe or its fields as a dictionary"
    if isinstance(recipe, (str, Path)):
        mend = f"pass calibquant.load_recipe({str(recipe)!r})"
    raise RecipeError("recipe", f"is of type {type(recipe).__name__}, not a recipe", mend)


def layers_of(path: Path, within: tuple[Path, ...] = (), stranger: bool = False) -> list[Layer]:
    """The fields of a recipe file behind those of the files that it includes: a later layer wins over an earlier.

    Args:
        path: the file.
        within: the files that have led to it.
        stranger: whether one of them, or what the user named, lies in a run folder.

    Raises:
        RecipeError: a file is missing, no recipe, or includes itself.
    """
    tree = read_tree(path, within[-1] if within else None)
    includes, stranger = tree.pop("include", []), stranger or in_run_folder(path)
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise RecipeError(
            f"{_shown(path)}, include", "is no list of files", "write for example include: [network.yaml]"
        )
    chain = (*within, path)
    layers: list[Layer] = []
    for inner in (path.parent / name for name in includes):
        if any(_real(inner) == _real(outer) for outer in chain):
            way = " -> ".join(str(file) for file in (*chain, inner))
            raise RecipeError(f"{path}, include", f"goes in a circle ({way})", "take one of these out")
        layers += layers_of(inner, chain, stranger)
    return [*layers, Layer(_shown(path), tree, stranger)]


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
    try:
        data = _read(path)
    except OSError as error:
        mend = "give the path of a recipe file, or a name that calibquant recipes lists"
        mend = f"correct include in {includer}" if includer else mend
        raise RecipeError(_shown(path), f"cannot be read ({error.strerror})", mend) from None
    return parse_tree(data, path)


def parse_tree(data: bytes, path: Path) -> dict[str, Any]:
    """The fields that the content of a recipe file gives; `path` names it in errors.

    Raises:
        RecipeError: the text is no valid YAML or no mapping.
    """
    try:
        tree = parse_yaml(data)
    except ValueError as error:
        where, mend = _shown(path), "correct the indentation or quoting there"
        raise RecipeError(where, f"is not valid YAML ({error})", mend) from None
    if not isinstance(tree, dict):
        raise RecipeError(_shown(path), "is not a recipe", "it must hold fields such as model: and data:")
    return tree


def _read(path: Path) -> bytes:
    """The bytes of a recipe file."""
    return _standard_input() if path == STANDARD_INPUT else read_regular(path, MOST_RECIPE, links=True)


@cache
def _standard_input() -> bytes:
    """All of standard input, which can be read once; empty where it is closed."""
    return b"" if sys.stdin is None else sys.stdin.buffer.read(MOST_RECIPE + 1)


def _shown(path: Path) -> str:
    """What errors call a file of fields."""
    return "standard input" if path == STANDARD_INPUT else str(path)


def _recipe(layers: list[Layer], overrides: list[str], source: str, trust_code: bool = False) -> Recipe:
    """Layers under overrides, above the preset that they name."""
    layers = [_without_runs(layer) if layer.stranger else layer for layer in layers]
    layers = [*layers, *(Layer(source, _override(text)) for text in overrides)]
    tree: dict[str, Any] = reduce(_layered, [layer.tree for layer in layers])
    if "include" in tree:
        raise RecipeError(f"{source}, include", "is known in recipe files alone", "write it at the top of a file")
    recipe = _given_by(_validated(tree, layers, source), {} if trust_code else _strangers(layers))
    own: dict[str, Any] = reduce(merged, [layer.tree for layer in layers if not _is_written_out(layer.tree)], {})
    keep_given(recipe, own)
    return recipe


def _validated(tree: dict[str, Any], layers: list[Layer], source: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _first_problem(error, layers, source) from None


def _given_by(recipe: Recipe, strangers: dict[str, str]) -> Recipe:
    """The recipe with a note of which fields of `model` a run folder gives."""
    return recipe.model_copy(update={"model": recipe.model.given_by(strangers)}) if strangers else recipe


def _without_runs(layer: Layer) -> Layer:
    """A run folder does not say where the next one is written."""
    return Layer(layer.source, {key: value for key, value in layer.tree.items() if key != "runs"}, layer.stranger)


def _strangers(layers: list[Layer]) -> dict[str, str]:
    """The fields of `model` that lead to code, where a run folder gives them: its recipe's path."""
    found: dict[str, str] = {}
    for layer in layers:
        model = layer.tree.get("model")
        for field in ("name", "options"):
            if isinstance(model, dict) and model.get(field):
                if layer.stranger:
                    found[field] = layer.source
                elif field == "name":
                    found.pop(field, None)
    return found


def _is_written_out(tree: dict[str, Any]) -> bool:
    """Whether a file has every section, as the recipe.yaml of a run has: then no single field was the user's choice.

    `runs` does not count: `_without_runs` takes it out.
    """
    return tree.keys() | {"runs"} >= Recipe.model_fields.keys()


def _layered(base: dict[str, Any], top: dict[str, Any], section: type[Section] | None = Recipe) -> dict[str, Any]:
    """As `merged`; but {} empties what is no section."""
    result = dict(base)
    for name, value in top.items():
        field = section.model_fields.get(name) if section is not None else None
        inner = None if field is None else section_of(field)
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        plain = field is not None and inner is None
        result[name] = _layered(result[name], value, inner) if both and not (plain and not value) else value
    return result


def _nested(name: str, value: Any) -> dict[str, Any]:
    """A value under a dotted name."""
    outer, _, inner = name.partition(".")
    return {outer: _nested(inner, value) if inner else value}


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
    return _nested(key.strip(), leaf)


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
            section, field = inner, inner.model_fields.get(str(part))
            inner = None if field is None else section_of(field)
            path.append(str(part))
        elif isinstance(part, int):
            path.append(str(part))
    return path, section
