"""calibquant compare"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calibquant.cli import console
from calibquant.cli.tables import show_comparison
from calibquant.cli.targets import TrustCode


def compare(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Dotted recipe keys, e.g. calibration.count=256; seed= is the first seed."),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Presets, and framework-int8 and onnxruntime-int8, e.g. nearest,qdrop,framework-int8.")
    ] = "",
    bits: Annotated[str, typer.Option(help="Bits of weights and activations, e.g. w4a4,w2a2; of weights, 1..4.")] = "",
    grids: Annotated[
        str, typer.Option(help="Grids of the weights, each with each preset, e.g. uniform,apot,codebook,nuq,binary.")
    ] = "",
    preset: Annotated[
        str | None, typer.Option(help="A study by name, which gives methods and bits: aciq-ablation.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="How many, or a list with a comma, e.g. 1005,2005.")] = "3",
    baseline: Annotated[
        str | None, typer.Option(help="What the others are tested against. Default: the first.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study. Default: compare in the recipe's runs.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cells at a time, each in a process of its own.")] = 1,
    trust_code: TrustCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Compare methods at several bits and seeds: mean ± sd with paired tests. The same command goes on when stopped."""
    from calibquant.studies import compare as study

    with console.reporting(json) as reporter:
        compared, settings = study.chosen_study(preset, console.words(methods), console.words(bits))
        comparison = study.compare(
            recipe,
            compared,
            settings,
            _seeds(seeds),
            baseline,
            overrides or [],
            out,
            jobs,
            reporter,
            console.words(grids),
            trust_code,
        )
    if json:
        console.print_json(comparison.result)
        return
    show_comparison(comparison.result)
    console.out.print(f"Tests and costs: {comparison.folder / study.PAGE}")


def _seeds(text: str) -> int | list[int]:
    """A number of seeds, or with a comma the seeds themselves."""
    from calibquant.errors import RecipeError

    try:
        return [int(word) for word in console.words(text)] if "," in text else int(text)
    except ValueError:
        mend = "give how many, or a list with a comma such as 1005,2005"
        raise RecipeError("calibquant compare, seeds", f"'{text}' is no number", mend) from None
