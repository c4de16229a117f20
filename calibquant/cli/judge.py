"""calibquant judge"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from calibquant.cli import console
from calibquant.cli.targets import TrustCode


def judge(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    data: Annotated[Path, typer.Argument(help="The set: a manifest, a run folder, a list (CSV) or a folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. calibration.pool=10000.")
    ] = None,
    trust_code: TrustCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Rate a set of images as calibration images, beside random sets of the recipe's calibration images."""
    from calibquant.pipeline import judge as rate
    from calibquant.recipe import load_recipe

    with console.reporting(json) as reporter:
        judged = rate(load_recipe(recipe, overrides, trust_code), data, reporter=reporter)
    if json:
        console.print_json(asdict(judged))
        return
    found = judged.judgement
    rows = [
        [words, f"{getattr(found, key):.4f}", f"{found.random[key]:.4f}"]
        for key, words in (
            ("coverage", "ranges covered"), ("moment_error", "error of second moments"),
            ("mean_error", "error of means, sd"), ("class_distance", "distance of class shares"),
        )
    ]  # fmt: skip
    console.print_table(
        f"{found.images} images ({found.distinct} distinct) beside random ones of {judged.pool} candidates",
        ["", "this set", "random sets"],
        rows,
    )
    worst = sorted(found.layers, key=lambda row: -row.moment_error)[:3]
    names = ", ".join(f"{row.layer} ({100 * row.moment_error:.1f} %)" for row in worst)
    console.out.print(f"Largest errors of second moments at the inputs of: {names}", markup=False)
    if judged.missing_classes:
        console.out.print(f"Classes without an image: {', '.join(judged.missing_classes[:20])}", markup=False)
    if found.stretching:
        pairs = list(zip(judged.stretching, found.stretching, strict=True))[:10]
        words = ", ".join(f"{name} ({s.times:.0f} times the usual peak of {s.node})" for name, s in pairs)
        more = f" and {len(found.stretching) - len(pairs)} more" if len(found.stretching) > len(pairs) else ""
        console.out.print(f"Images that make a range wide for all others: {words}{more}", markup=False)
    if found.distinct < found.images:
        console.out.print(f"{found.images - found.distinct} images are copies of others", markup=False)
    console.out.print(f"Images to add first: {', '.join(judged.add)}", markup=False)
    console.out.print(
        f"Score {found.score:.2f} (a typical random set has 0); better than {found.percentile:.0f} % of random sets",
        markup=False,
    )
