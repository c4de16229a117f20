"""calibquant study"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from calibquant.cli import console
from calibquant.cli.targets import TrustCode


def study(
    what: Annotated[Literal["selection"], typer.Argument(help="What is studied.")],
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. preset=fast calibration.pool=10000.")
    ] = None,
    strategies: Annotated[
        str, typer.Option(help="Separated by spaces, e.g. 'class-balanced moments herding=0.5,tail=0.5'.")
    ] = "random class-balanced captq herding tail moments",
    sizes: Annotated[str, typer.Option(help="Numbers of calibration images, e.g. 32,256,1024.")] = "256",
    bits: Annotated[str, typer.Option(help="Bits of weights and activations, e.g. w2a2,w4a4.")] = "w2a2",
    draws: Annotated[str, typer.Option(help="How many draws of candidates, or a list such as 100,101.")] = "5",
    seeds: Annotated[str, typer.Option(help="Seeds of the runs, e.g. 1005,1006.")] = "1005,1006",
    baseline: Annotated[str, typer.Option(help="What the others are tested against.")] = "class-balanced",
    named: Annotated[
        str | None, typer.Option(help="The comparison named in advance, e.g. moments:256; others are corrected.")
    ] = None,
    shift: Annotated[str, typer.Option(help="Of the candidates: none, missing-class, blurred or dark.")] = "none",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study. Default: selection in the recipe's runs.")
    ] = None,
    trust_code: TrustCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Which calibration images serve best: strategies x sizes x draws x seeds, paired. The same command goes on."""
    from calibquant.studies import selection

    planned = selection.make_selection_study(
        recipe,
        strategies.split(),
        _numbers("sizes", sizes),
        console.words(bits),
        _draws(draws),
        _numbers("seeds", seeds),
        baseline,
        _comparison(named),
        shift,
        overrides or [],
        out,
        trust_code,
    )
    with console.reporting(json) as reporter:
        found = selection.study_selection(planned, reporter)
    if json:
        console.print_json(found.result)
        return
    console.out.print((found.folder / selection.PAGE).read_text(encoding="utf-8"), markup=False)


def _numbers(what: str, text: str) -> list[int]:
    from calibquant.errors import RecipeError

    try:
        return [int(word) for word in console.words(text)]
    except ValueError:
        mend = "give whole numbers separated by commas"
        raise RecipeError(f"calibquant study, {what}", f"'{text}' is no list of numbers", mend) from None


def _draws(text: str) -> list[int]:
    """A number of draws, or with a comma the draws themselves."""
    found = _numbers("draws", text)
    return found if "," in text or not found else list(range(found[0]))


def _comparison(text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    strategy, _, size = text.rpartition(":")
    return strategy, _numbers("named", size)[0] if size.strip() else 0
