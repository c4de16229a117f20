"""calibquant inspect"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibquant.cli import console
from calibquant.cli.tables import (
    show_bytes,
    show_coverage,
    show_errors,
    show_layers,
    show_onnx,
    show_ranges,
    show_units,
)

if TYPE_CHECKING:
    from calibquant.quantization import QuantModel


def inspect(
    target: Annotated[
        Path | None, typer.Argument(help="Run folder, a file in it, or an ONNX file. Default: the newest run.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where to look for the newest run.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Show what is inside a run or an ONNX file: bits, bytes, ranges, and what stays float."""
    from calibquant.export.artifact import load_artifact
    from calibquant.reading import described_by
    from calibquant.runfolder import newest_run, open_run

    if target is not None and target.suffix == ".onnx":
        _inspect_onnx(target, json)
        return
    path = newest_run(runs) if target is None else target.parent if target.is_file() else target
    folder = open_run(path)
    model, metrics, receipt = load_artifact(folder), folder.read_json("metrics.json"), folder.read_json("receipt.json")
    with described_by(path / "metrics.json"):
        _show(path, model, metrics, receipt, json)


def _show(path: Path, model: QuantModel, metrics: dict[str, Any], receipt: dict[str, Any], json: bool) -> None:
    from calibquant.export.artifact import size_of
    from calibquant.export.record import record

    size, rows = size_of(model), record(model)
    files = {name: (path / name).stat().st_size for name in receipt["files"] if name.endswith(".onnx")}
    unlisted = sorted(
        {p.name for p in path.iterdir() if p.name not in ("receipt.json", "log.txt")} - receipt["files"].keys()
    )
    if json:
        coverage = [asdict(row) for row in model.coverage()]
        console.print_json({
            "run": str(path), "size": asdict(size), "coverage": coverage, "record": rows,
            "layers": metrics.get("layers", []), "units": metrics["units"],
            "feature_errors": metrics.get("feature_errors", []), "onnx": files,
            "checked": sorted(receipt["files"]), "unlisted": unlisted,
        })  # fmt: skip
        return
    console.out.print(f"{path}: {metrics['setting']}, placement {metrics['placement']}, boundary {metrics['boundary']}")
    show_coverage(model)
    show_ranges(model)
    if metrics.get("layers"):  # runs of earlier versions have none
        show_layers(metrics["layers"])
    if metrics["units"]:
        show_units(metrics["units"])
    if metrics.get("feature_errors"):  # runs of earlier versions have none
        show_errors(metrics["feature_errors"])
    show_bytes(size, {"model.safetensors": metrics["size"]["file"], **files})
    quantized = metrics["quantized"]
    console.out.print(
        f"top-1 {console.percent(metrics['float']['top1'])} float, {console.percent(quantized['top1'])} quantized, "
        f"agreement {console.percent(quantized['agreement'])} on {quantized['count']} {metrics['evaluated_on']}; "
        f"calibquant {receipt['versions']['calibquant']}, seed {receipt['seed']}"
    )
    checked = f"The hashes of {len(receipt['files'])} files are those of receipt.json."
    if unlisted:
        checked += f" Not listed there, and not read: {', '.join(unlisted)}."
    console.out.print(checked, markup=False)


def _inspect_onnx(path: Path, json: bool) -> None:
    from calibquant.export.onnx_content import read_onnx

    content = read_onnx(path)
    if json:
        console.print_json({"file": str(path), **content.to_dict()})
        return
    show_onnx(path, content)
