"""calibquant quantize"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibquant.cli import console
from calibquant.cli.tables import show_coverage, show_layers, show_result, show_units
from calibquant.cli.targets import TrustCode

if TYPE_CHECKING:
    from calibquant.pipeline import DryRun


def quantize(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file (YAML).")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. quant.weights.bits=2 seed=7.")
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Reconstruct as long as this: 90s, 20m, 1.5h; the same as reconstruct.time=20m.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; calibrate and write nothing.")] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Continue this interrupted run. The recipe is read from its folder.")
    ] = None,
    trust_code: TrustCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Quantize a network and leave a run folder with the packed network, its accuracy and its record."""
    from calibquant import pipeline
    from calibquant.errors import RecipeError
    from calibquant.recipe import load_recipe

    given = [*(overrides or []), *([f"reconstruct.time={time}"] if time else [])]
    if resume is not None and recipe is not None and "=" in str(recipe):
        recipe, given = None, [str(recipe), *given]
    if resume is not None and dry_run:
        raise RecipeError(
            "calibquant quantize, --dry-run", "is for a recipe, not for --resume", "leave one of them out"
        )
    if (recipe is None) == (resume is None):
        raise RecipeError("calibquant quantize", "takes a recipe, or --resume RUN", "give one of the two")
    if resume is not None:
        with console.reporting(json) as reporter:
            run = pipeline.resume(resume, reporter=reporter, overrides=given, trust_code=trust_code)
    else:
        loaded = load_recipe(recipe, given, trust_code)  # type: ignore[arg-type]
        if dry_run:
            _show_plan(pipeline.dry_run(loaded), json)
            return
        with console.reporting(json) as reporter:
            run = pipeline.quantize(loaded, reporter=reporter)
    if json:
        console.print_json({"run": str(run.folder), **run.metrics})
        return
    if run.metrics["layers"]:
        show_layers(run.metrics["layers"])
    if run.metrics["units"]:
        show_units(run.metrics["units"])
    show_result([run])
    console.out.print(f"Run folder: {run.folder}")


def _show_plan(plan: DryRun, json: bool) -> None:
    from calibquant.export.artifact import size_of

    size = size_of(plan.model)
    if json:
        console.print_json({
            "coverage": [asdict(row) for row in plan.model.coverage()],
            "size": asdict(size),
            "calibration_images": plan.images,
            "estimated_seconds": plan.seconds,
            "estimated_peak_bytes": plan.peak_bytes,
            "mixed_tensors": plan.mixed,
            "warnings": [str(field) for field in plan.idle],
        })  # fmt: skip
        return
    for field in plan.idle:
        console.out.print(f"warning: {field}", style="dim")
    show_coverage(plan.model)
    if plan.mixed:
        console.out.print(f"The bits of {plan.mixed} tensors are not final: quant.mixed chooses them in the run.")
    console.out.print(
        f"{console.kilobytes(size.float32)} as float32, {console.kilobytes(size.packed)} packed "
        f"({size.weight_bits:.2f} bits a weight); {plan.images} calibration images; "
        f"about {plan.seconds:.0f} s and {plan.peak_bytes / 1e9:.1f} GB beside torch itself"
    )
