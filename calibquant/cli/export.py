"""calibquant export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calibquant.cli import console
from calibquant.cli.tables import show_export
from calibquant.cli.targets import TrustCode, run_and_overrides


def export(
    target: Annotated[Path | None, typer.Argument(help="Run folder. Default: the newest run.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. data.root=…")] = None,
    format: Annotated[str, typer.Option(help="Of onnx, record, amct, packed, vectors; several with commas.")] = "onnx",
    storage: Annotated[
        str, typer.Option(help="packed: weights of 2 to 4 bits in INT2 and INT4; int8: for ONNX Runtime before 1.24.")
    ] = "packed",
    out: Annotated[Path | None, typer.Option(help="Folder of the files. Default: the run folder.")] = None,
    input: Annotated[
        str | None, typer.Option(help="Size of one image for a run of live images, e.g. 3,224,224.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where to look for the newest run.")] = Path("runs"),
    trust_code: TrustCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Write a run's network as files that load anywhere, each compared with the simulation before it is left."""
    from calibquant.pipeline.exporting import export_run

    path, keys = run_and_overrides(target, overrides, runs)
    formats = [word.strip() for word in format.split(",") if word.strip()]
    with console.reporting(json) as reporter:
        result = export_run(path, formats, storage, out, keys, _size(input), reporter, trust_code)
    if json:
        console.print_json(result)
        return
    show_export(result)
    console.out.print(f"Folder: {result['out']}")


def _size(text: str | None) -> list[int] | None:
    """3,224,224 -> [3, 224, 224]"""
    from calibquant.errors import RecipeError

    if text is None:
        return None
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise RecipeError("calibquant export, --input", f"'{text}' is no size", "give for example 3,224,224")
    return [int(word) for word in words]
