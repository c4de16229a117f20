"""calibquant analyze"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calibquant.cli import console
from calibquant.cli.targets import TrustCode


def analyze(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. quant.weights.bits=4.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Calibration images on which tensors are measured.")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the page. Default: analysis in the recipe's runs.")
    ] = None,
    trust_code: TrustCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Which tensors do the harm, why, and what keeping them at 8 bits would cost."""
    from calibquant.recipe import load_recipe
    from calibquant.studies import analysis
    from calibquant.studies.analysis.page import effect_text, harm_table

    with console.reporting(json) as reporter:
        found = analysis.analyze(load_recipe(recipe, overrides, trust_code), out=out, images=images, reporter=reporter)
    result = found.to_dict()
    if json:
        console.print_json(result)
        return
    header, rows = harm_table(result)
    console.print_table(f"Harm of each tensor alone, {result['images']} images", header, rows[:10])
    for row in found.advice:
        console.out.print(f"- {row.text}", markup=False)
    if found.effect:
        console.out.print(f"- {effect_text(result)}", markup=False)
    console.out.print(f"Page: {found.folder / analysis.PAGE}")
