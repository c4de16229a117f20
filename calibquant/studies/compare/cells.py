"""One cell of a comparison: a method at a setting and a seed. It is taken from disk, gone on with, or run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from calibquant.errors import CalibQuantError, RunFolderError
from calibquant.evaluation import Evaluation
from calibquant.parallel import resolve_device
from calibquant.pipeline import Reporter, quantize, resume, run_recipe
from calibquant.pipeline.measuring import measure, saved_network
from calibquant.pipeline.preparing import open_set
from calibquant.pipeline.reporting import Silent
from calibquant.reading import described_by
from calibquant.recipe import Recipe
from calibquant.runfolder import CHECKPOINT, RECEIPT, RunFolder, final_path, open_run, sha256
from calibquant.studies.compare.foreign import evaluate_foreign, run_foreign
from calibquant.studies.compare.predictions import PREDICTIONS, Classes, read_predictions, write_predictions
from calibquant.studies.external import METHODS

Way = Literal["taken", "evaluated again", "resumed", "run"]


@dataclass(frozen=True)
class Cell:
    """What is run at one place of the table.

    Args:
        method: name of a preset, or of another tool's method.
        seed: of the run.
        recipe: the effective recipe; its `runs` is the cell's own folder.
    """

    method: str
    seed: int
    recipe: Recipe

    @property
    def setting(self) -> str:
        """Such as W4A4."""
        return self.recipe.setting

    @property
    def foreign(self) -> bool:
        """Whether the method is another tool's."""
        return self.method in METHODS

    @property
    def folder(self) -> Path:
        """Holds the run folder and the predictions."""
        return self.recipe.runs

    def __str__(self) -> str:
        return f"{self.method} {self.setting} seed {self.seed}"


@dataclass(frozen=True, eq=False)
class CellResult:
    """What a cell left on disk.

    Args:
        cell: the cell.
        run: its run folder.
        metrics: the content of the run's metrics.json.
        predictions: class of each evaluation image, (N,).
        labels: their labels, -1 where unknown, (N,).
    """

    cell: Cell
    run: Path
    metrics: dict[str, Any]
    predictions: Classes
    labels: Classes

    @cached_property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether each labelled image was classified correctly."""
        known = self.labels >= 0
        return self.predictions[known] == self.labels[known]

    @property
    def top1(self) -> float | None:
        """Share of the labelled images that are correct; None without labels."""
        return float(self.correct.mean()) if len(self.correct) else None

    @property
    def agreement(self) -> float:
        """Share of images that are classified as by the float network."""
        return float(self.metrics["quantized"]["agreement"])


def same_run(wanted: Recipe, found: Recipe) -> bool:
    """Whether two recipes make the same run, wherever and on whatever machine; a null regularizer equals any."""
    ours, theirs = essence(wanted), essence(found)
    if "reconstruct" in ours and ours["reconstruct"]["regularizer"] is None and "reconstruct" in theirs:
        ours["reconstruct"]["regularizer"] = theirs["reconstruct"]["regularizer"]
    return ours == theirs


def essence(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that decide what a run finds; those of reconstruction only where there is one."""
    elsewhere: dict[str, Any] = {
        "preset": True, "runs": True, "threads": True, "device": True, "data": {"workers"},
        "evaluation": {"batch_size"},
    }  # fmt: skip
    fields = recipe.model_dump(mode="json", exclude=elsewhere)
    if recipe.reconstruct.method == "none":
        del fields["reconstruct"]
    return fields


def find_run(cell: Cell) -> Path | None:
    """The complete run of a cell, its hashes checked.

    Raises:
        RunFolderError: there are runs, but all of another recipe; one of them is damaged or made with other weights.
    """
    runs = [path.parent for path in sorted(cell.folder.glob(f"*/{RECEIPT}")) if not path.parent.name.startswith(".")]
    for run in runs:
        folder = open_run(run)
        if same_run(cell.recipe, run_recipe(folder)):
            _check_weights(cell.recipe, folder)
            return run
    if runs:
        raise RunFolderError(runs[-1], "was made with another recipe", "give another folder with --out")
    return None


def _check_weights(recipe: Recipe, folder: RunFolder) -> None:
    """Runs of different networks that bear one name are not to be compared."""
    path = recipe.model.weights
    with described_by(folder.path / RECEIPT):
        stored = (folder.read_json(RECEIPT).get("weights") or {}).get("sha256")
    if path is not None and path.is_file() and stored:
        now = path.stat()
        if _hash(path, now.st_mtime_ns, now.st_size) != stored:
            problem = f"was made with other weights than {path} holds now"
            raise RunFolderError(folder.path, problem, "give another folder with --out")


@lru_cache(maxsize=4)
def _hash(path: Path, changed: int, size: int) -> str:
    """SHA-256 of a file; read once for all cells, until it changes."""
    return sha256(path.read_bytes())


def _interrupted(cell: Cell) -> Path | None:
    """The run that a checkpoint in the cell's folder can go on with, by the name it would have got."""
    for path in sorted(cell.folder.glob(f".*.partial/{CHECKPOINT}")):
        try:
            if same_run(cell.recipe, run_recipe(RunFolder(path.parent))):
                return final_path(path.parent)
        except CalibQuantError:  # a recipe that cannot be read is not this cell's
            continue
    return None


def complete(cell: Cell, reporter: Reporter | None = None) -> Way:
    """Do what a cell lacks, so that its run and its predictions are on disk.

    Args:
        cell: the cell.
        reporter: hears the progress within the run, not its steps.

    Returns:
        what had to be done.

    Raises:
        CalibQuantError: the run is not possible, or the folder holds another.
        KeyboardInterrupt: it was interrupted; a checkpoint stays where reconstruction had begun.
    """
    RunFolder(cell.folder).remove(".*.tmp")  # what a kill left
    run, bar = find_run(cell), _OnlyProgress(reporter or Silent())
    if run is not None:
        count = _images(run)
        if read_predictions(cell.folder, count) is not None:
            return "taken"
        if cell.foreign:
            evaluation = evaluate_foreign(cell.recipe, cell.method, bar)
        else:
            evaluation = evaluate_again(cell.recipe, run, bar)
        if len(evaluation.predictions) != count:
            problem = f"was evaluated on {count} images, and now there are {len(evaluation.predictions)}"
            raise RunFolderError(run, problem, "restore the images, or give another folder with --out")
        _store(cell, evaluation)
        return "evaluated again"
    (cell.folder / PREDICTIONS).unlink(missing_ok=True)  # of a run that is no longer there
    if cell.foreign:
        _store(cell, run_foreign(cell.recipe, cell.method, bar))
        return "run"
    stopped = _interrupted(cell)
    try:
        if stopped is None:
            done = quantize(cell.recipe, reporter=bar)
        else:  # code that the folder's recipe names is what the cell's own names: they are the same but for places
            done = resume(stopped, reporter=bar, trust_code=not cell.recipe.model.strangers)
    except RunFolderError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # the pipeline tells how to go on with the run alone
            raise KeyboardInterrupt from error
        raise
    _store(cell, done.evaluation)
    return "run" if stopped is None else "resumed"


def evaluate_again(recipe: Recipe, run: Path, reporter: Reporter) -> Evaluation:
    """What the saved network of a run does on the recipe's evaluation images."""
    network, images = saved_network(open_run(run), recipe), open_set(recipe, "evaluation")
    return measure(recipe, network, images, resolve_device(recipe.device), reporter)


def _store(cell: Cell, evaluation: Evaluation) -> None:
    write_predictions(cell.folder, evaluation.predictions, evaluation.labels)


def is_complete(cell: Cell) -> bool:
    """Whether a cell's run and its predictions are on disk.

    Raises:
        RunFolderError: as `find_run`.
    """
    run = find_run(cell)
    return run is not None and read_predictions(cell.folder, _images(run)) is not None


def read_result(cell: Cell) -> CellResult:
    """What a complete cell left.

    Raises:
        RunFolderError: something is missing or damaged.
    """
    run = find_run(cell)
    found = None if run is None else read_predictions(cell.folder, _images(run))
    if run is None or found is None:
        raise RunFolderError(
            cell.folder, "has lost files while the study ran", "leave the folder to one study at a time"
        )
    return CellResult(cell, run, RunFolder(run).read_json("metrics.json"), *found)


def _images(run: Path) -> int:
    """How many images a run was evaluated on."""
    with described_by(run / "metrics.json"):
        return int(RunFolder(run).read_json("metrics.json")["quantized"]["count"])


class _OnlyProgress:
    """Passes on the progress; the steps of a run within a study are not told."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def progress(self, done: int, total: int, where: str = "") -> None:
        self._reporter.progress(done, total, where)

    def step(self, number: int, total: int, title: str) -> None: ...

    def note(self, text: str) -> None: ...
