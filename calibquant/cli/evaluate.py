"""calibquant evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from calibquant.cli import console
from calibquant.cli.tables import show_classes, show_deployed
from calibquant.cli.targets import TrustCode, run_and_overrides


def evaluate(
    target: Annotated[
        Path | None,
        typer.Argument(help="Run folder, a recipe for its float network, or an ONNX file. Default: the newest run."),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. data.root=…")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="For an ONNX file: names its images. Default: recipe.yaml beside it.")
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also the scores of each class.")] = False,
    confusion: Annotated[
        Path | None, typer.Option(help="File for the confusion matrix (CSV); shows what is confused most.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where to look for the newest run.")] = Path("runs"),
    trust_code: TrustCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Measure a saved quantized network, a recipe's float network or an ONNX file, without quantizing again."""
    from calibquant import pipeline
    from calibquant.errors import RecipeError
    from calibquant.pipeline.by_class import ByClass
    from calibquant.pipeline.deployed import evaluate_onnx
    from calibquant.recipe import load_recipe
    from calibquant.recipe.shipped import located

    path, keys = run_and_overrides(target, overrides, runs)
    path = located(path)
    if recipe is not None and path.suffix != ".onnx":
        raise RecipeError("calibquant evaluate, --recipe", "is for an ONNX file", "leave it out")
    by_class = ByClass(per_class, confusion)
    with console.reporting(json) as reporter:
        if path.suffix in (".yaml", ".yml"):
            result = pipeline.evaluate_float(load_recipe(path, keys, trust_code), reporter, by_class)
        elif path.suffix == ".onnx":
            result = evaluate_onnx(path, recipe, keys, reporter, by_class, trust_code)
        else:
            result = pipeline.evaluate_run(path, keys, reporter, by_class, trust_code)
    if json:
        console.print_json(result)
        return
    console.out.print(f"{path}")
    if "deployed" in result:
        show_deployed(result, path.name)
    else:
        name = "float" if "float" in result else str(result["setting"])
        _show_scores(name, result.get("float") or result["quantized"])
    show_classes(result)


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
