"""Running a selection study: manifests first, then a run for each cell; what is on disk is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from calibquant.data import ImageSet, find_images, make_manifest, manifest_csv, read_manifest
from calibquant.data.augment import black_of
from calibquant.errors import RecipeError
from calibquant.locking import HeldError, locked
from calibquant.parallel import set_threads
from calibquant.pipeline import Reporter, quantize
from calibquant.pipeline.preparing import learned_preprocess, open_calibration, open_candidates, open_set
from calibquant.pipeline.reporting import Silent, warn
from calibquant.pipeline.selecting import Candidates, candidates_of
from calibquant.reading import described_by
from calibquant.recipe import changed, idle_fields
from calibquant.runfolder import RunFolder, check_place, make_folder, write_alone
from calibquant.selection import Pool, needs_of, select
from calibquant.studies.compare.cells import essence
from calibquant.studies.selection.page import figure_png, page
from calibquant.studies.selection.planning import Cell, SelectionStudy
from calibquant.studies.selection.shifting import shifted_candidates
from calibquant.studies.selection.summary import summary

RESULT, PAGE, FIGURE, PLAN = "selection.json", "selection.md", "selection.png", "plan.json"
# Fields that the study itself sets.
SET = ("calibration.count", "calibration.strategy", "calibration.pool", "quant.weights.bits", "export.storage",
       "export.images")  # fmt: skip


@dataclass(frozen=True)
class SelectionResult:
    """A study as far as it is done.

    Args:
        folder: holds selection.json, selection.md, selection.png, the manifests and a file for each cell.
        result: the content of selection.json.
    """

    folder: Path
    result: dict[str, Any]


def study_selection(study: SelectionStudy, reporter: Reporter | None = None) -> SelectionResult:
    """Quantize with what each strategy chooses, and test the differences, paired by draw and seed.

    Every cell leaves a file below `study.out`, so that the same call goes on with a study that was stopped. Several
    processes may work at one study at a time: each takes cells that no other has.

    Raises:
        CalibQuantError: something about the recipe, network or images. What is done stays.
    """
    reporter = reporter or Silent()
    evaluation = open_set(study.recipe, "evaluation")
    set_threads(study.recipe.threads)
    check_place(study.out)
    check_place(study.recipe.runs)
    for name in ("manifests", "cells"):
        make_folder(study.out / name)
    _check_same(study)
    for field in idle_fields(study.recipe):
        if field.field not in SET:
            warn(reporter, field)
    cells, draw = study.cells, _Draw(study, study.draws[0], reporter)
    for number, cell in enumerate(cells, start=1):
        if cell.draw != draw.number:
            draw = _Draw(study, cell.draw, reporter)
        with _claimed(study.out / "cells" / f".{cell.name}.lock") as ours:
            if not ours or _path(study, cell).is_file():
                continue
            reporter.step(number, len(cells), f"{cell.setting} {cell.strategy}, {cell.size} images, "
                          f"draw {cell.draw}, seed {cell.seed}")  # fmt: skip
            found = _run(study, cell, draw.chosen(cell), evaluation, reporter)
            write_alone(_path(study, cell), json.dumps(found, indent=1).encode())
            write_summary(study)
    return SelectionResult(study.out, write_summary(study))


def write_summary(study: SelectionStudy) -> dict[str, Any]:
    """Write selection.json, its page and its figure from the cells that are done; returns the first's content."""
    cells = RunFolder(study.out / "cells")
    done = [cells.read_json(_path(study, c).name) for c in study.cells if _path(study, c).is_file()]
    with described_by(cells.path):
        result = summary(study, done)
    text = json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    for name, data in ((RESULT, text.encode()), (PAGE, page(result).encode()), (FIGURE, figure_png(result))):
        write_alone(study.out / name, data)
    return result


def _check_same(study: SelectionStudy) -> None:
    """What the folder holds is of this recipe and shift; cells do not say so themselves.

    Raises:
        RecipeError: it is of another.
    """
    plan = json.dumps({"shift": study.shift, "recipe": essence(study.recipe)}, sort_keys=True, indent=1, default=str)
    path = study.out / PLAN
    if path.is_file() and path.read_text(encoding="utf-8") != plan:
        problem = "holds a study with another recipe or shift"
        raise RecipeError(path, problem, "name another folder with --out, or repeat that study's command")
    write_alone(path, plan.encode())


def _path(study: SelectionStudy, cell: Cell) -> Path:
    return study.out / "cells" / f"{cell.name}.json"


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether a cell is this process's for the time being; a lock of a process that died is free again."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(path))
        except HeldError:
            yield False
            return
        yield True


class _Draw:
    """The candidates of one draw, which all strategies share; the float network looks at them at most once."""

    def __init__(self, study: SelectionStudy, number: int, reporter: Reporter) -> None:
        self.study, self.number, self.reporter = study, number, reporter

    def chosen(self, cell: Cell) -> ImageSet:
        """The images that a strategy chooses; from its manifest, if there is one already."""
        path = self.study.out / "manifests" / f"{self.study.shift}-{cell.chosen}.csv"
        images = self._images[0]
        if path.is_file():
            return images.subset(find_images(images, read_manifest(path).rows))
        pool = self._pool if needs_of(cell.strategy) != "nothing" else self._plain
        choice = select(pool, cell.size, cell.strategy, cell.draw, self._trial(pool))
        indices = [int(pool.indices[row]) for row in choice.rows]
        manifest = make_manifest(images, indices, choice.strategies, cell.draw, choice.scores)
        write_alone(path, manifest_csv(manifest).encode())
        return images.subset(indices)

    @cached_property
    def _images(self) -> tuple[ImageSet, list[int]]:
        recipe = changed(self.study.recipe, {"seed": self.number})
        images = open_calibration(recipe)
        settings = learned_preprocess(recipe)
        black = black_of(settings, images.image(0).shape[0])
        return shifted_candidates(images, candidates_of(recipe, images), self.study.shift, self.number, black)

    @cached_property
    def _candidates(self) -> Candidates:
        recipe = changed(self.study.recipe, {"seed": self.number})
        images, indices = self._images
        _, found = open_candidates(recipe, None, images, self.reporter)
        return Candidates(recipe, images, indices, found.teacher, found.mount, self.reporter)

    @cached_property
    def _pool(self) -> Pool:
        return self._candidates.pool("network")

    @property
    def _plain(self) -> Pool:
        return self._candidates.pool("nothing")

    def _trial(self, pool: Pool) -> Callable[..., float]:
        return lambda rows, judging: self._candidates.trial(pool, rows, judging)


def _run(
    study: SelectionStudy, cell: Cell, images: ImageSet, evaluation: ImageSet, reporter: Reporter
) -> dict[str, Any]:
    """What a cell's run gives; its folder is not kept."""
    recipe = study.recipe_of(cell)
    shutil.rmtree(recipe.runs, ignore_errors=True)  # what a kill left
    run = quantize(recipe, None, images, evaluation, _Quiet(reporter))
    shutil.rmtree(recipe.runs)
    scores = run.metrics["quantized"]
    return {
        "setting": cell.setting, "strategy": cell.strategy, "size": cell.size, "draw": cell.draw, "seed": cell.seed,
        "float_top1": run.metrics["float"]["top1"], "top1": scores["top1"], "agreement": scores["agreement"],
        "worst_class": None if scores["worst_class"] is None else scores["worst_class"]["accuracy"],
        "images": scores["count"], "seconds": run.metrics["seconds"].get("reconstruct", 0.0),
        "iterations": study.recipe.reconstruct.iterations, "method": study.recipe.reconstruct.method,
    }  # fmt: skip


@dataclass(frozen=True)
class _Quiet:
    """Passes a run's progress on, but neither its steps nor its notes: the study counts cells."""

    reporter: Reporter

    def step(self, number: int, total: int, title: str) -> None: ...

    def progress(self, done: int, total: int, where: str = "") -> None:
        self.reporter.progress(done, total, where)

    def note(self, text: str) -> None: ...
