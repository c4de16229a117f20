"""calibquant inspect"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from calibquant.cli import console
from calibquant.cli.quantize import show_coverage


def inspect(
    target: Annotated[Path | None, typer.Argument(help="Run folder, or a file in it. Default: the newest run.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Show what is inside a run: bits of every node, bytes, ranges, and what stays float."""
    from calibquant.export.artifact import load_artifact, size_of
    from calibquant.export.record import record
    from calibquant.pipeline import coverage_summary
    from calibquant.runfolder import newest_run, open_run

    path = newest_run(Path("runs")) if target is None else target.parent if target.is_file() else target
    folder = open_run(path)
    model, metrics, receipt = load_artifact(folder), folder.read_json("metrics.json"), folder.read_json("receipt.json")
    size, rows = size_of(model), record(model)
    if json:
        coverage = [asdict(row) for row in model.coverage()]
        console.print_json({"run": str(path), "size": asdict(size), "coverage": coverage, "record": rows})
        return
    console.out.print(f"{path}: {metrics['setting']}, placement {metrics['placement']}, boundary {metrics['boundary']}")
    show_coverage(model)
    console.print_table(
        "Activation ranges",
        ["quantizer", "bits", "scale", "zero point", "role"],
        [
            [
                q.name, str(q.plan.grid.bits), "dynamic" if q.scale is None else f"{q.scale.item():.5g}",
                "dynamic" if q.scale is None else str(int(q.zero_point)), q.plan.role,
            ]
            for q in model.activation_quantizers.values()
        ],
    )  # fmt: skip
    console.print_table(
        "Bytes",
        ["part", "bytes"],
        [
            ["weights' codes", f"{size.codes:,}"],
            ["scales and zero points", f"{size.scales:,}"],
            ["float32 remainder (biases, unfolded norms)", f"{size.remainder:,}"],
            ["all tensors", f"{size.packed:,}"],
            ["file", f"{metrics['size']['file']:,}"],
            ["as float32", f"{size.float32:,}"],
        ],
    )
    console.out.print(coverage_summary(model))
    quantized = metrics["quantized"]
    console.out.print(
        f"top-1 {console.percent(metrics['float']['top1'])} float, {console.percent(quantized['top1'])} quantized, "
        f"agreement {console.percent(quantized['agreement'])} on {quantized['count']} {metrics['evaluated_on']}; "
        f"calibquant {receipt['versions']['calibquant']}, seed {receipt['seed']}"
    )
