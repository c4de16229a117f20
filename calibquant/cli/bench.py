"""calibquant bench"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calibquant.cli import console
from calibquant.cli.tables import show_bench
from calibquant.cli.targets import TrustCode, run_and_overrides


def bench(
    target: Annotated[Path | None, typer.Argument(help="Run folder. Default: the newest run.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. data.root=…")] = None,
    also: Annotated[list[Path] | None, typer.Option(help="Another run of the same network to measure too.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each network.")] = 15,
    runs: Annotated[Path, typer.Option(help="Where to look for the newest run.")] = Path("runs"),
    trust_code: TrustCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Latency and throughput in ONNX Runtime, as ratios to the float network measured side by side."""
    from calibquant.studies.bench import bench as study

    path, keys = run_and_overrides(target, overrides, runs)
    with console.reporting(json) as reporter:
        result = study(path, also or [], keys, rounds, reporter, trust_code)
    if json:
        console.print_json(result)
        return
    show_bench(result)
