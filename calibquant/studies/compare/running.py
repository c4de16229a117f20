"""Running a comparison: what is on disk is taken, the rest runs in turn or in several processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibquant.errors import CalibQuantError, RunFolderError
from calibquant.pipeline import Reporter
from calibquant.pipeline.preparing import open_set
from calibquant.pipeline.reporting import Silent, warn
from calibquant.runfolder import RunFolder, check_place, shared_folder
from calibquant.studies.compare.cells import CellResult, Way, complete, is_complete, read_result
from calibquant.studies.compare.figure import pareto_png
from calibquant.studies.compare.markdown import markdown, score_text
from calibquant.studies.compare.planning import Source, Study, idle_everywhere, make_study
from calibquant.studies.compare.predictions import PREDICTIONS
from calibquant.studies.compare.processes import complete_in_processes
from calibquant.studies.compare.summary import summary
from calibquant.studies.external import METHODS

RESULT, PAGE, FIGURE = "compare.json", "compare.md", "compare.png"


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Args:
        folder: holds compare.json, compare.md, compare.png (bytes against accuracy) and a folder for each cell.
        result: the content of compare.json.
    """

    folder: Path
    result: dict[str, Any]


def compare(
    recipe: Source,
    methods: Sequence[str],
    bits: Sequence[str],
    seeds: int | Sequence[int] = 3,
    baseline: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    jobs: int = 1,
    reporter: Reporter | None = None,
    grids: Sequence[str] = (),
    trust_code: bool = False,
) -> Comparison:
    """Quantize by several methods, at several settings and with several seeds, and test the differences.

    Every cell is a run of its own below `out`. What is complete there is taken as it is and what was interrupted is
    gone on with, so that the same call goes on with a study that was stopped, and one with more seeds extends it.

    Args:
        recipe: a recipe file, or its fields; what it sets wins over what a method sets.
        methods: names of presets, as "qdrop" or with a grid of the weights as "qdrop:apot", and of other tools' methods
            (`studies.external`), which do 8 bits alone.
        bits: settings such as "w4a4", or "1..4" for weights of 1 to 4 bits beside the recipe's activations.
        seeds: how many, counted from the recipe's, or a list.
        baseline: the method that the others are tested against; None takes the first.
        overrides: dotted recipe keys, such as "reconstruct.iterations=2000".
        out: folder of the study; None takes `compare` in the recipe's `runs`.
        jobs: cells at a time, each in a process of its own. A script that asks for more than one needs
            `if __name__ == "__main__":` around the call.
        reporter: hears of the cells.
        grids: each preset is compared with each of these grids of its weights, at the settings where there is one.
        trust_code: whether code that a recipe in a run folder names may be run.

    Raises:
        RecipeError: an argument is not valid, or methods do not differ with this recipe.
        CalibQuantError: a cell is not possible, or was interrupted. What is done stays.

    Example:
        >>> comparison = compare("recipe.yaml", ["nearest", "qdrop"], ["w2a2"], seeds=3)  # doctest: +SKIP
        >>> comparison.result["tests"][0]["verdict"]  # doctest: +SKIP
        'better'
    """
    study = make_study(recipe, methods, bits, seeds, baseline, overrides, out, jobs, grids, trust_code)
    open_set(study.cells[0].recipe, "evaluation")  # without it a study is refused before anything is written
    present = [i for i, cell in enumerate(study.cells) if is_complete(cell)]
    for method in {cell.method for i, cell in enumerate(study.cells) if cell.foreign and i not in present}:
        METHODS[method].check(method)
    check_place(study.out)
    with shared_folder(study.out) as folder:
        if isinstance(recipe, Mapping):
            plain = json.loads(json.dumps(recipe, default=str))
            folder.write(study.recipe.name, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        return _compare(study, present, reporter or Silent())


def _compare(study: Study, present: Sequence[int], reporter: Reporter) -> Comparison:
    """Take the cells that are complete, and complete the others."""
    board = _Board(study, reporter)
    for idle in idle_everywhere(study):
        warn(board.reporter, idle)
    try:
        for i in present:
            board.begin(i)
            board.add(i, "taken")
        _complete_rest(board)
    except KeyboardInterrupt as error:
        problem = f"was interrupted after {len(board.results)} of {len(study.cells)} cells"
        raise RunFolderError(study.out, problem, "the same command goes on") from error
    except CalibQuantError as error:
        state = f"the same command then goes on after {len(board.results)} of {len(study.cells)} cells"
        raise type(error)(error.where, error.problem, f"{error.mend}; {state}") from error
    return Comparison(study.out, board.result)


def _complete_rest(board: _Board) -> None:
    """Complete the cells that are not there yet."""
    cells, jobs = board.study.cells, board.study.jobs
    missing = {i: cell for i, cell in enumerate(cells) if i not in board.results}
    if jobs == 1:
        for i, cell in missing.items():
            board.begin(i)
            way = complete(cell, board.reporter)
            board.add(i, way)
        return

    def finished(i: int, way: Way) -> None:
        board.begin(i)
        board.add(i, way)
        board.reporter.progress(len(board.results), len(cells))

    complete_in_processes(missing, jobs, finished)


@dataclass
class _Board:
    """The results so far, by the cells' places; compare.json and compare.md follow them."""

    study: Study
    reporter: Reporter
    results: dict[int, CellResult] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    def begin(self, i: int) -> None:
        """A cell begins, or its result is there."""
        self.reporter.step(len(self.results) + 1, len(self.study.cells), str(self.study.cells[i]))

    def add(self, i: int, way: Way) -> None:
        """Take what a cell left into the files.

        Raises:
            RunFolderError: it is about other images than the cells before, or the disk is full.
        """
        result = read_result(self.study.cells[i])
        first = next(iter(self.results.values()), result)
        if not np.array_equal(first.labels, result.labels):
            problem = f"holds other labels than that of {first.cell}"
            mend = "delete both, so that these networks are evaluated again"
            raise RunFolderError(result.cell.folder / PREDICTIONS, problem, mend)
        self.results[i] = result
        self.result = summary(self.study, [self.results[place] for place in sorted(self.results)])
        folder = RunFolder(self.study.out)
        folder.write_json(RESULT, self.result)
        folder.write(PAGE, markdown(self.result))
        folder.write(FIGURE, pareto_png(self.result))
        where = f"cell {len(self.results)} of {len(self.study.cells)}"
        self.reporter.note(f"{where}, {result.cell}: {score_text(result.top1, result.agreement)}, {way}")
