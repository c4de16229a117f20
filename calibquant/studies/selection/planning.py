"""The plan of a selection study, checked before anything runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibquant.errors import RecipeError, nearest
from calibquant.recipe import Recipe, changed, load_recipe
from calibquant.selection import parse_strategy
from calibquant.studies.settings import grid_bits, parse_setting

WHERE = "calibquant study"
POOL = 10_000  # candidates of a draw, where the recipe gives no number
SHIFTS = {
    "none": "candidates as they are",
    "missing-class": "no candidate of one class, another in each draw",
    "blurred": "half of the candidates blurred",
    "dark": "half of the candidates darkened",
}


@dataclass(frozen=True)
class Cell:
    """One run: what was chosen for a draw of candidates, and the seed of its reconstruction."""

    setting: str
    strategy: str
    size: int
    draw: int
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.setting}-{self.chosen}-seed{self.seed}"

    @property
    def chosen(self) -> str:
        """What the choice depends on, of its manifest's name."""
        return f"{re.sub('[^a-z0-9.-]', '_', self.strategy)}-{self.size}-draw{self.draw}"


@dataclass(frozen=True)
class SelectionStudy:
    """A study before it runs.

    Args:
        source: the recipe file.
        overrides: of the recipe.
        recipe: as loaded.
        strategies: in the order of the table.
        sizes: numbers of calibration images.
        settings: such as w2a2.
        draws: numbers of the draws of candidates; a draw is the seed of everything random in a choice.
        seeds: of the runs.
        baseline: the strategy that the others are tested against.
        named: the one comparison that was named in advance, as (strategy, size); None: none was.
        shift: how candidates differ from the images of the evaluation.
        out: the folder that receives everything.
    """

    source: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    strategies: tuple[str, ...]
    sizes: tuple[int, ...]
    settings: tuple[str, ...]
    draws: tuple[int, ...]
    seeds: tuple[int, ...]
    baseline: str
    named: tuple[str, int] | None
    shift: str
    out: Path

    @property
    def cells(self) -> list[Cell]:
        """In the order in which they run: draw by draw, so that early results are paired."""
        return [
            Cell(setting, strategy, size, draw, seed)
            for setting in self.settings
            for draw in self.draws
            for size in self.sizes
            for seed in self.seeds
            for strategy in self.strategies
        ]

    @property
    def command(self) -> str:
        """The command line that makes it."""
        words = ["calibquant", "study", "selection", str(self.source), *self.overrides]
        words += ["--strategies", " ".join(self.strategies), "--sizes", _joined(self.sizes)]
        words += ["--bits", _joined(self.settings), "--draws", _joined(self.draws), "--seeds", _joined(self.seeds)]
        words += ["--baseline", self.baseline, "--shift", self.shift]
        words += ["--named", f"{self.named[0]}:{self.named[1]}"] if self.named else []
        return shlex.join([*words, "--out", str(self.out)])

    def recipe_of(self, cell: Cell) -> Recipe:
        """The recipe of a cell, which calibrates with the images that it is given.

        Raises:
            RecipeError: the recipe's grids have no codes of the cell's bits.
        """
        weights, activations = parse_setting(cell.setting, WHERE)
        grid = self.recipe.quant.weights.grid
        bits = grid_bits(self.recipe.quant.weights, grid, weights)
        if bits is None:
            problem = f"{grid} has no codes of {weights} bits with this recipe, which {cell.setting} asks for"
            raise RecipeError(f"{WHERE}, bits", problem, "use other bits, or another quant.weights.grid")
        changes = {
            "seed": cell.seed, "calibration.count": cell.size, "calibration.strategy": "first",
            "calibration.pool": None, "calibration.manifest": None, "quant.weights.bits": bits,
            "quant.activations.bits": activations, "export.onnx": False, "runs": self.out / "runs" / cell.name,
        }  # fmt: skip
        return changed(self.recipe, changes, WHERE)


def make_selection_study(
    recipe: Path | str,
    strategies: Sequence[str],
    sizes: Sequence[int],
    bits: Sequence[str] = ("w2a2",),
    draws: Sequence[int] = range(5),
    seeds: Sequence[int] = (1005, 1006),
    baseline: str = "class-balanced",
    named: tuple[str, int] | None = None,
    shift: str = "none",
    overrides: Sequence[str] = (),
    out: Path | None = None,
    trust_code: bool = False,
) -> SelectionStudy:
    """Plan a study; the arguments are those of `SelectionStudy`, and `trust_code` as `load_recipe` takes it.

    Raises:
        RecipeError: an argument is not valid.
        DataError: a strategy is unknown.
    """
    loaded = load_recipe(recipe, list(overrides), trust_code)
    if loaded.quant.mixed is not None:
        raise RecipeError(f"{WHERE}, quant.mixed", "the settings studied give the bits", "leave quant.mixed out")
    for what, values in (("strategies", strategies), ("sizes", sizes), ("bits", bits), ("draws", draws),
                         ("seeds", seeds)):  # fmt: skip
        if not values:
            raise RecipeError(f"{WHERE}, {what}", "none is given", f"give at least one of {what}")
        if len(set(values)) < len(values):
            raise RecipeError(f"{WHERE}, {what}", "one is given twice", "give each once")
    for strategy in strategies:
        parse_strategy(strategy)
    for setting in bits:
        parse_setting(setting, WHERE)
    if baseline not in strategies:
        raise RecipeError(f"{WHERE}, baseline", f"'{baseline}' is not studied", nearest(baseline, strategies))
    if named is not None and (named[0] not in strategies or named[0] == baseline or named[1] not in sizes):
        problem = f"'{named[0]}:{named[1]}' is no comparison of this study"
        raise RecipeError(f"{WHERE}, named", problem, "name one of its strategies, not the baseline, and a size")
    if shift not in SHIFTS:
        raise RecipeError(f"{WHERE}, shift", f"'{shift}' is unknown", nearest(shift, SHIFTS))
    pool = loaded.calibration.pool or POOL
    if max(sizes) > pool:
        problem = f"{max(sizes)} images cannot be chosen of {pool} candidates"
        raise RecipeError(f"{WHERE}, sizes", problem, "use smaller sizes, or set calibration.pool")
    if min(sizes) < 2:
        raise RecipeError(f"{WHERE}, sizes", f"{min(sizes)} is too small", "use 2 images or more")
    loaded = changed(loaded, {"calibration.pool": pool})
    study = SelectionStudy(
        Path(recipe), tuple(overrides), loaded, tuple(strategies), tuple(sizes), tuple(s.lower() for s in bits),
        tuple(draws), tuple(seeds), baseline, named, shift, loaded.runs / "selection" if out is None else out,
    )  # fmt: skip
    for cell in {cell.setting: cell for cell in study.cells}.values():
        study.recipe_of(cell)  # what has no recipe is refused before anything is written
    return study


def _joined(values: Sequence[object]) -> str:
    return ",".join(map(str, values))
