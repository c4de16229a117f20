"""calibquant finetune"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from calibquant.cli import console
from calibquant.cli.tables import show_result
from calibquant.cli.targets import TrustCode


def finetune(
    start: Annotated[
        Path | None, typer.Argument(help="Run folder to go on from, or a recipe (YAML): quantize first, then train.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. finetune.epochs=10 finetune.lr=….")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue this interrupted run. The recipe is read from its folder.")
    ] = None,
    trust_code: TrustCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Train a quantized network (QAT), taught by its float network; under torchrun on several devices."""
    from calibquant import pipeline
    from calibquant.errors import RecipeError
    from calibquant.recipe import load_recipe

    keys = overrides or []
    if resume is not None and start is not None and "=" in str(start):
        start, keys = None, [str(start), *keys]
    if (start is None) == (resume is None):
        raise RecipeError("calibquant finetune", "takes a run or a recipe, or --resume RUN", "give one of the two")
    with console.reporting(json) as reporter:
        if resume is not None:
            run = pipeline.resume(resume, reporter=reporter, overrides=keys, trust_code=trust_code)
        elif start is not None and start.is_dir():
            run = pipeline.finetune(start, keys, reporter=reporter, trust_code=trust_code)
        else:
            recipe = load_recipe(start, keys, trust_code)  # type: ignore[arg-type]
            if recipe.finetune is None:
                recipe = load_recipe(start, ["finetune={}", *keys], trust_code)  # type: ignore[arg-type]
            run = pipeline.quantize(recipe, reporter=reporter)
    if json:
        console.print_json({"run": str(run.folder), **run.metrics})
        return
    _show(run.metrics)
    show_result([run])
    console.out.print(f"Run folder: {run.folder}")


def _show(metrics: dict[str, Any]) -> None:
    trained = metrics["finetune"]
    before, after, epochs = trained["before"], metrics["quantized"], trained["epochs"]
    rows = [["epochs", str(len(epochs))], ["training images", str(trained["training_images"])]]
    rows.append(["training loss, last epoch", f"{epochs[-1]['loss']:.4f}"])
    rows.append(["kept", "the last epoch" if trained["kept"] else "the start"])
    for name, key in (("top-1", "top1"), ("top-5", "top5")):
        rows.append([f"{name} % before training", console.percent(before[key])])
        rows.append([f"{name} % after", console.percent(after[key])])
    rows.append(["seconds an epoch", f"{sum(e['seconds'] for e in epochs) / len(epochs):.0f}"])
    console.print_table("quantization-aware training", ["measure", "value"], rows)
