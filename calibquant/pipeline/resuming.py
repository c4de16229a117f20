"""What may be different when an interrupted run is continued: a run is made by one recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calibquant.errors import RecipeError, RunFolderError
from calibquant.pipeline.measuring import RECIPE, run_recipe
from calibquant.recipe import Recipe, make_recipe
from calibquant.runfolder import CHECKPOINT, RunFolder
from calibquant.zoo.external import unsafe

CHANGES = "checkpoint-changes.json"  # what was different after an interruption, by field
# Where files lie (images and network are checked by their hashes), what is done when learning is over, and the learning
# rate after a loss that diverged. Threads and device change the last bits of sums; the receipt says that they did.
MAY_CHANGE = (
    "runs", "threads", "device", "data.root", "data.workers", "model.weights", "evaluation", "export", "train.lr",
    "finetune.lr",
)  # fmt: skip


def fields_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it stands in a checkpoint."""
    return recipe.model_dump(mode="json")


def continued_recipe(folder: RunFolder, run: Path, overrides: list[str] | None, trust_code: bool = False) -> Recipe:
    """The recipe with which an interrupted run is continued; recipe.yaml and what is kept of changes follow it.

    Args:
        folder: the run's folder, with a checkpoint.
        run: the name that it will get; `runs` becomes the folder around it.
        overrides: dotted recipe keys.
        trust_code: as `run_recipe` takes it.

    Raises:
        RecipeError: a field differs that is not one of `MAY_CHANGE`.
        RunFolderError: the recipe or the checkpoint is damaged.
    """
    recipe = run_recipe(folder, overrides, trust_code).model_copy(update={"runs": run.parent})
    kept = folder.read_json(CHANGES) if folder.has(CHANGES) else {}
    if not isinstance(kept, dict) or not all(isinstance(values, list) and values for values in kept.values()):
        raise RunFolderError(folder.path / CHANGES, "is damaged", "delete the hidden folder and begin again")
    for field, before, now in _differences(_begun_with(folder), fields_of(recipe)):
        if not any(field == free or field.startswith(f"{free}.") for free in MAY_CHANGE):
            problem = f"was {_words(before)} when the run began and cannot become {_words(now)}"
            mend = f"leave it as it was, or begin a new run; what may change: {', '.join(MAY_CHANGE)}"
            raise RecipeError(f"{run}, recipe, {field}", problem, mend)
        values = kept.setdefault(field, [before])
        if values[-1] != now:
            values.append(now)
    folder.write(RECIPE, recipe.to_yaml())
    kept = {field: values for field, values in kept.items() if field != "runs"}
    if kept:
        folder.write_json(CHANGES, kept)
    return recipe


def again(recipe: Recipe) -> str:
    """What the command that continues a run needs beside --resume: its folder names the code that makes its network."""
    return " --trust-code" if recipe.model.name and unsafe(recipe.model.name, recipe.model.options) else ""


def changes_of(folder: RunFolder) -> dict[str, Any]:
    """For the receipt: the values of each field that changed while the run was made; empty where none did."""
    return {"changed": folder.read_json(CHANGES)} if folder.has(CHANGES) else {}


def _begun_with(folder: RunFolder) -> dict[str, Any]:
    """The recipe of the checkpoint; of earlier versions, whose checkpoints have none, that of the folder."""
    stored = folder.read_json(CHECKPOINT)
    fields = stored.get("recipe") if isinstance(stored, dict) else None
    if fields is None:
        return fields_of(run_recipe(folder))
    if not isinstance(fields, dict):
        raise RunFolderError(folder.path / CHECKPOINT, "is damaged (its recipe)", "begin the run again")
    return fields_of(make_recipe(fields, None, f"{folder.path / CHECKPOINT}, recipe", True)) | {
        "runs": fields.get("runs")
    }


def _differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two recipes differ: dotted name, and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif before != now:
        yield path, before, now


def _words(value: Any) -> str:
    return "none" if value is None else str(value)[:60]
