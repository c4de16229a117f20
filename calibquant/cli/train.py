"""calibquant train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from calibquant.cli import console
from calibquant.cli.targets import TrustCode


def train(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file (YAML) with a section train.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted recipe keys, e.g. train.epochs=40 data.root=….")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue this interrupted training. The recipe is read from its folder.")
    ] = None,
    trust_code: TrustCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Train a float network and leave a run folder with its weights, curves and accuracy."""
    from calibquant import pipeline
    from calibquant.errors import RecipeError
    from calibquant.recipe import load_recipe

    keys = overrides or []
    if resume is not None and recipe is not None and "=" in str(recipe):
        recipe, keys = None, [str(recipe), *keys]
    if (recipe is None) == (resume is None):
        raise RecipeError("calibquant train", "takes a recipe, or --resume RUN", "give one of the two")
    with console.reporting(json) as reporter:
        if resume is not None:
            run = pipeline.resume_training(resume, reporter=reporter, overrides=keys, trust_code=trust_code)
        else:
            run = pipeline.train(load_recipe(recipe, keys, trust_code), reporter=reporter)  # type: ignore[arg-type]
    if json:
        console.print_json({"run": str(run.folder), **run.metrics})
        return
    _show(run.metrics)
    console.out.print(f"Run folder: {run.folder}")


def _show(metrics: dict[str, Any]) -> None:
    scores, epochs = metrics["float"], metrics["epochs"]
    best = epochs[metrics["best_epoch"] - 1]
    console.print_table("training", ["measure", "value"], [
        ["epochs", str(len(epochs))],
        ["training images", str(metrics["training_images"])],
        ["training loss, last epoch", f"{epochs[-1]['loss']:.4f}"],
        ["epoch kept", str(best["epoch"])],
        ["its top-1 % on images held out", console.percent(best["accuracy"])],
        [f"top-1 % on {scores['count']} {metrics['evaluated_on']}",
         f"{console.percent(scores['top1'])} ({console.interval(scores['top1_interval'])})"],
        ["top-5 %", console.percent(scores["top5"])],
        ["seconds of training", f"{metrics['seconds']['train']:.0f}"],
    ])  # fmt: skip
