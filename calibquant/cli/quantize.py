"""calibquant quantize"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from calibquant.cli import console


def quantize(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. quant.weights.bits=2 seed=7.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; calibrate and write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Quantize a network and leave a run folder with the packed network, its accuracy and its record."""
    from calibquant import pipeline
    from calibquant.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    if dry_run:
        _show_plan(pipeline.dry_run(loaded), json)
        return
    with console.reporting(json) as reporter:
        run = pipeline.quantize(loaded, reporter=reporter)
    if json:
        console.print_json({"run": str(run.folder), **run.metrics})
        return
    show_result([run])
    console.out.print(f"Run folder: {run.folder}")


def show_result(runs: list) -> None:  # type: ignore[type-arg]
    """The closing table of one or more runs of one network."""
    first = runs[0].metrics
    rows = [
        ["float", "32", console.kilobytes(first["size"]["float32"]), console.percent(first["float"]["top1"]), "–", "–"]
    ]
    for run in runs:
        m = run.metrics
        rows.append([
            m["setting"], f"{m['size']['weight_bits']:.2f}", console.kilobytes(m["size"]["file"]),
            console.percent(m["quantized"]["top1"]), console.percent(m["quantized"]["agreement"]),
            console.interval(m["quantized"]["agreement_interval"]),
        ])  # fmt: skip
    title = (
        f"{first['quantized']['count']} {first['evaluated_on']}, {first['calibration_images']} for calibration; "
        f"placement {first['placement']}, boundary {first['boundary']}"
    )
    console.print_table(title, ["network", "weight bits", "size", "top-1 %", "agreement %", "95 % interval"], rows)


def _show_plan(plan: object, json: bool) -> None:
    from calibquant.export.artifact import size_of
    from calibquant.pipeline import DryRun, coverage_summary

    assert isinstance(plan, DryRun)
    size = size_of(plan.model)
    if json:
        console.print_json({
            "coverage": [asdict(row) for row in plan.model.coverage()],
            "size": asdict(size),
            "calibration_images": plan.images,
            "estimated_seconds": plan.seconds,
            "estimated_peak_bytes": plan.peak_bytes,
        })  # fmt: skip
        return
    show_coverage(plan.model)
    console.out.print(coverage_summary(plan.model))
    console.out.print(
        f"{console.kilobytes(size.float32)} as float32, {console.kilobytes(size.packed)} packed "
        f"({size.weight_bits:.2f} bits a weight); {plan.images} calibration images; "
        f"about {plan.seconds:.0f} s and {plan.peak_bytes / 1e9:.1f} GB beside torch itself"
    )


def show_coverage(model: object) -> None:
    """The table of compute nodes with their bits, or why they stay float."""
    from calibquant.quantization import QuantModel

    assert isinstance(model, QuantModel)
    rows = [
        [
            row.node, row.op, _bits(row.weight_bits), " ".join(_bits(b) for b in row.input_bits), row.reason or "",
        ]
        for row in model.coverage()
    ]  # fmt: skip
    console.print_table("Coverage", ["node", "op", "weight bits", "input bits", "stays float because"], rows)


def _bits(bits: int | None) -> str:
    return "float" if bits is None else str(bits)
