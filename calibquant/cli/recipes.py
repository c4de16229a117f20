"""calibquant recipes"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from calibquant.cli import console


def recipes(
    words: Annotated[
        list[str] | None, typer.Argument(help="Of the name, network, setting or method, e.g. resnet50 w2a2.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print one recipe with all that it includes and every default.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """List the recipes that come along, described where words are given. Commands take their names for a file."""
    from calibquant.errors import RecipeError
    from calibquant.recipe import load_recipe
    from calibquant.recipe.catalog import catalog

    if show:
        if len(words or []) != 1:
            raise RecipeError("calibquant recipes, --show", "shows one recipe", "give one name")
        recipe = load_recipe(words[0])  # type: ignore[index]
        if json:
            console.print_json(recipe.model_dump(mode="json"))
        else:
            console.out.print(recipe.to_yaml().rstrip(), markup=False)
        return
    entries = catalog(words or [])
    if json:
        console.print_json([{**asdict(entry), "path": str(entry.path)} for entry in entries])
        return
    header = ["recipe", "network", "setting", "method", "images", "boundary", "data"]
    rows = [
        [e.name, e.network or "–", e.setting, e.method, str(e.calibration), e.boundary, e.data or "–"] for e in entries
    ]
    console.print_table(f"{len(entries)} recipes", header, rows)
    for entry in entries if words else ():
        known = f" Published: {entry.published}" if entry.published else ""
        console.out.print(f"{entry.name}: {entry.description}{known}", markup=False)
