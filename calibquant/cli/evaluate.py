"""calibquant evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from calibquant.cli import console


def evaluate(
    target: Annotated[
        Path | None, typer.Argument(help="Run folder, or a recipe for its float network. Default: the newest run.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. data.root=…")] = None,
    runs: Annotated[Path, typer.Option(help="Where to look for the newest run.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Measure a saved quantized network, or a recipe's float network, without quantizing again."""
    from calibquant import pipeline
    from calibquant.recipe import load_recipe
    from calibquant.runfolder import newest_run

    if target is not None and "=" in str(target) and not target.exists():
        target, overrides = None, [str(target), *(overrides or [])]
    if target is None:
        target = newest_run(runs)
    with console.reporting(json) as reporter:
        if target.suffix in (".yaml", ".yml"):
            result = pipeline.evaluate_float(load_recipe(target, overrides), reporter)
        else:
            result = pipeline.evaluate_run(target, overrides or [], reporter)
    if json:
        console.print_json(result)
        return
    console.out.print(f"{target}")
    _show_scores("float" if "float" in result else str(result["setting"]), result.get("float") or result["quantized"])


def _show_scores(name: str, scores: dict[str, Any]) -> None:
    rows = [
        ["images", str(scores["count"])],
        ["top-1 %", f"{console.percent(scores['top1'])} ({console.interval(scores['top1_interval'])})"],
        ["top-5 %", console.percent(scores["top5"])],
        ["loss", "–" if scores["loss"] is None else f"{scores['loss']:.4f}"],
    ]
    for average in ("macro", "micro", "weighted"):
        value = scores[average]
        if value is not None:
            rows += [[f"{average} {key} %", console.percent(value[key])] for key in ("precision", "recall", "f1")]
    worst = scores["worst_class"]
    if worst is not None:
        rows.append([f"worst class ({worst['index']}) %", console.percent(worst["accuracy"])])
    console.print_table(name, ["measure", "value"], rows)
