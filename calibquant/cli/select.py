"""calibquant select"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from calibquant.cli import console
from calibquant.cli.targets import TrustCode


def select(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. calibration.pool=10000.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="One of the strategies (--list), or such as herding=0.75,tail=0.25.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=2, help="Images to choose. Default: the recipe's.")] = None,
    out: Annotated[Path, typer.Option(help="The manifest (CSV).")] = Path("manifest.csv"),
    listed: Annotated[bool, typer.Option("--list", help="List the strategies, and choose nothing.")] = False,
    trust_code: TrustCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Choose the images that calibrate, and write a manifest of them."""
    from calibquant.pipeline import select as choose
    from calibquant.recipe import load_recipe
    from calibquant.selection import STRATEGIES

    if listed:
        console.print_table("Strategies", ["name", "which images"], [[n, s.words] for n, s in STRATEGIES.items()])
        return
    keys = [*(overrides or [])]
    keys += [] if strategy is None else [f"calibration.strategy={strategy}"]
    keys += [] if count is None else [f"calibration.count={count}"]
    loaded = load_recipe(recipe, keys, trust_code)
    with console.reporting(json) as reporter:
        manifest = choose(loaded, out=out, reporter=reporter)
    classes = Counter(row.label for row in manifest.rows if row.label is not None)
    result = {
        "manifest": str(out), "images": len(manifest.rows), "strategy": loaded.calibration.strategy,
        "seed": loaded.seed, "classes": len(classes),
        "images_a_class": [min(classes.values()), max(classes.values())] if classes else None,
    }  # fmt: skip
    if json:
        console.print_json(result)
        return
    spread = (
        f", {min(classes.values())} to {max(classes.values())} of each of {len(classes)} classes" if classes else ""
    )
    console.out.print(f"{len(manifest.rows)} images by {loaded.calibration.strategy}{spread}: {out}", markup=False)
    console.out.print(f"Quantize with them: calibration.manifest={out}", markup=False)
