"""calibquant demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calibquant.cli import console
from calibquant.cli.tables import show_result


def demo(
    runs: Annotated[Path, typer.Option(help="Folder that receives the run folders.")] = Path("runs"),
    seed: Annotated[int, typer.Option(help="Seed of training and calibration.")] = 1005,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON only.")] = False,
) -> None:
    """Train a small ResNet on handwritten digits, quantize it to 8, 4 and 2 bits, and reconstruct it at 2 bits."""
    from calibquant.studies.digits import run_digits

    with console.reporting(json) as reporter:
        results = run_digits(runs, seed, reporter)
    if json:
        console.print_json([{"run": str(run.folder), **run.metrics} for run in results])
        return
    show_result(results)
    for run in results:
        console.out.print(f"Run folder: {run.folder}")
