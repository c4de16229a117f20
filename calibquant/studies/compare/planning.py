"""The plan of a comparison: methods × settings × seeds as cells, checked before anything runs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

from calibquant.errors import RecipeError, nearest
from calibquant.recipe import PRESETS, GridKind, Idle, Recipe, changed, idle_fields, load_recipe, make_recipe
from calibquant.studies.compare.cells import Cell, essence
from calibquant.studies.external import METHODS
from calibquant.studies.settings import grid_bits, parse_setting

Source = str | Path | Mapping[str, Any]
WHERE = "calibquant compare"
MOST_SEEDS = 100
# Comparisons by name: their methods and settings. The first is the table of Banner et al., "Post training 4-bit
# quantization of convolutional networks for rapid-deployment", NeurIPS 2019.
STUDIES = {
    "aciq-ablation": (
        ("banner-base", "banner-clipping", "banner-allocation", "banner-correction", "banner-all"),
        ("w8a4", "w4a8", "w4a4"),
    )
}
FOREIGN_BITS = (8, 8)  # all that other tools' methods do
# Keys that the study itself sets, and by what.
TAKEN = {"preset": "--methods", "quant.weights.bits": "--bits", "quant.activations.bits": "--bits"}


@dataclass(frozen=True)
class Study:
    """A comparison before it runs.

    Args:
        recipe: the recipe file; for fields given from Python, where they are stored.
        overrides: of the recipe, without `seed=`.
        methods: names of presets and of other tools' methods.
        settings: such as W4A4.
        seeds: of the runs.
        baseline: the method that the others are tested against.
        out: the folder that receives everything.
        jobs: cells at a time.
        cells: in the order in which they run, so that early results are already paired.
    """

    recipe: Path
    overrides: tuple[str, ...]
    methods: tuple[str, ...]
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    out: Path
    jobs: int
    cells: tuple[Cell, ...]

    @property
    def command(self) -> str:
        """The command line that makes this study."""
        seeds = ",".join(map(str, self.seeds)) + ("," if len(self.seeds) == 1 else "")
        words = ["calibquant", "compare", str(self.recipe), *self.overrides, "--methods", ",".join(self.methods)]
        words += ["--bits", ",".join(self.settings).lower(), "--seeds", seeds, "--baseline", self.baseline]
        return shlex.join([*words, "--out", str(self.out), "--jobs", str(self.jobs)])


def chosen_study(
    preset: str | None, methods: Sequence[str], bits: Sequence[str]
) -> tuple[Sequence[str], Sequence[str]]:
    """Methods and settings: those given, or those of one of `STUDIES` where none are.

    Raises:
        RecipeError: there is no study of that name.
    """
    if preset is None:
        return methods, bits
    if preset not in STUDIES:
        raise RecipeError(f"{WHERE}, preset", f"'{preset}' is unknown", nearest(preset, STUDIES))
    own_methods, own_bits = STUDIES[preset]
    return methods or own_methods, bits or own_bits


def make_study(
    recipe: Source,
    methods: Sequence[str],
    bits: Sequence[str],
    seeds: int | Sequence[int],
    baseline: str | None,
    overrides: Sequence[str],
    out: Path | None,
    jobs: int,
    grids: Sequence[str] = (),
    trust_code: bool = False,
) -> Study:
    """Plan a comparison; the arguments are those of `compare`. What has no grid of a setting's bits has no cell there.

    Raises:
        RecipeError: an argument is not valid, or methods do not differ with this recipe.
    """
    _check_overrides(overrides, listed=not isinstance(seeds, int))
    base = _load(recipe, list(overrides), trust_code)
    if base.quant.mixed is not None:
        raise RecipeError(f"{WHERE}, quant.mixed", "the settings compared give the bits", "leave quant.mixed out")
    _check_names("methods", methods)
    _check_names("grids", grids or ["uniform"])
    methods = [m if m in METHODS else f"{m}:{grid}" for m in methods for grid in grids] if grids else methods
    for method in methods:
        preset, grid = preset_and_grid(method)
        if preset not in PRESETS and method not in METHODS:
            raise RecipeError(f"{WHERE}, methods", f"'{preset}' is unknown", nearest(preset, [*PRESETS, *METHODS]))
        if grid is not None and grid not in get_args(GridKind):
            raise RecipeError(f"{WHERE}, grids", f"'{grid}' is unknown", nearest(grid, get_args(GridKind)))
    baseline = baseline or methods[0]
    if baseline not in methods:
        raise RecipeError(f"{WHERE}, baseline", f"'{baseline}' is not compared", nearest(baseline, methods))
    settings = [parse_setting(text, WHERE) for text in _spelled(bits, base.quant.activations.bits)]
    _check_names("bits", [f"w{w}a{a}" for w, a in settings])
    foreign = next((method for method in methods if method in METHODS), None)
    if foreign and FOREIGN_BITS not in settings:
        raise RecipeError(f"{WHERE}, bits", f"'{foreign}' knows 8 bits alone", "add w8a8, or leave the method out")
    if jobs < 1:
        raise RecipeError(f"{WHERE}, jobs", f"{jobs} cells at a time is no number of cells", "use 1 or more")
    chosen = _parse_seeds(seeds, base.seed)
    out = base.runs / "compare" if out is None else out
    kept = [text for text in overrides if _key(text) != "seed"]
    shared = list(kept)
    if jobs > 1 and base.threads is None:
        shared.append(f"threads={max(1, (os.cpu_count() or 1) // jobs)}")
    cells = [
        _cell(recipe, shared, out, method, (own, activations), seed, trust_code)
        for weights, activations in settings
        for seed in chosen
        for method in methods
        if (own := _bits_of(base, method, weights, activations)) is not None
    ]
    if not cells:
        raise RecipeError(f"{WHERE}, bits", "no method has a grid of these bits", "use other bits or grids")
    for setting in dict.fromkeys(cell.setting for cell in cells):
        first = [c for c in cells if (c.setting, c.seed) == (setting, chosen[0]) and not c.foreign]
        _check_methods(recipe, first)
    return Study(
        recipe=out / "recipe.yaml" if isinstance(recipe, Mapping) else Path(recipe),
        overrides=tuple(kept),
        methods=tuple(methods),
        settings=tuple(f"W{weights}A{activations}" for weights, activations in settings),
        seeds=chosen,
        baseline=baseline,
        out=out,
        jobs=jobs,
        cells=tuple(cells),
    )


def _load(source: Source, overrides: list[str], trust_code: bool = False) -> Recipe:
    if isinstance(source, Mapping):
        return make_recipe(dict(source), overrides)
    return load_recipe(source, overrides, trust_code)


def idle_everywhere(study: Study) -> list[Idle]:
    """The fields that the recipe sets and that have no effect in any cell of CalibQuant's own methods."""
    found = [{idle.field: idle for idle in idle_fields(cell.recipe)} for cell in study.cells if not cell.foreign]
    return (
        [idle for field, idle in found[0].items() if field not in TAKEN and all(field in f for f in found)]
        if found
        else []
    )


def _cell(
    source: Source, overrides: list[str], out: Path, method: str, bits: tuple[int, int], seed: int, trust_code: bool
) -> Cell:
    # Other tools take network and images alone from the recipe; the rest of it says what is nearest to theirs.
    preset, grid = ("int8", None) if method in METHODS else preset_and_grid(method)
    fields = [f"preset={preset}", f"quant.weights.bits={bits[0]}", f"quant.activations.bits={bits[1]}"]
    fields += [] if grid is None else [f"quant.weights.grid={grid}"]
    recipe = _load(source, [*overrides, *fields, f"seed={seed}"], trust_code)
    folder = out / f"{method.replace(':', '-')}-{recipe.setting.lower()}-seed{seed}"
    return Cell(method, seed, changed(recipe, {"runs": folder}))


def preset_and_grid(method: str) -> tuple[str, str | None]:
    """A method's preset, and the grid of its weights where it names one.

    Example:
        >>> preset_and_grid("qdrop:apot"), preset_and_grid("qdrop")
        (('qdrop', 'apot'), ('qdrop', None))
    """
    preset, _, grid = method.partition(":")
    return preset, grid or None


def _bits_of(base: Recipe, method: str, weights: int, activations: int) -> int | None:
    """`quant.weights.bits` of a method at a setting; None where it has no grid of so many bits."""
    if method in METHODS:
        return weights if (weights, activations) == FOREIGN_BITS else None
    grid = preset_and_grid(method)[1] or base.quant.weights.grid
    return grid_bits(base.quant.weights, grid, weights)  # type: ignore[arg-type]


def _spelled(bits: Sequence[str], activations: int) -> list[str]:
    """Settings, with a range such as 1..4 as weights of 1 to 4 bits beside the recipe's activations."""
    found: list[str] = []
    for text in bits:
        match = re.fullmatch(r"(\d+)\.\.(\d+)", text.strip())
        ends = (int(match[1]), int(match[2])) if match else None
        found += [text] if ends is None else [f"w{n}a{activations}" for n in range(ends[0], ends[1] + 1)]
    return found


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _check_overrides(overrides: Sequence[str], listed: bool) -> None:
    for text in overrides:
        if _key(text) in TAKEN:
            raise RecipeError(f"override '{text}'", f"{TAKEN[_key(text)]} sets this field", "leave the override out")
        if _key(text) == "seed" and listed:
            raise RecipeError(f"override '{text}'", "the seeds are listed already", "give seed= or a list of seeds")


def _check_names(what: str, names: Sequence[str]) -> None:
    """At least one, and none twice."""
    if not names:
        raise RecipeError(f"{WHERE}, {what}", "none is given", f"give at least one of {what}, separated by commas")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"{WHERE}, {what}", f"'{twice}' is given twice", "give each once")


def _parse_seeds(seeds: int | Sequence[int], first: int) -> tuple[int, ...]:
    """The seeds themselves from how many there are or from a list."""
    if not isinstance(seeds, int):
        _check_names("seeds", [str(seed) for seed in seeds])
        if min(seeds) < 0:
            raise RecipeError(f"{WHERE}, seeds", f"{min(seeds)} is negative", "use whole numbers from 0")
        return tuple(seeds)
    if not 1 <= seeds <= MOST_SEEDS:
        mend = f"give 1 to {MOST_SEEDS}, or a list with a comma such as 1005,2005"
        raise RecipeError(f"{WHERE}, seeds", f"{seeds} is no number of seeds", mend)
    return tuple(range(first, first + seeds))


def _check_methods(source: Source, cells: Sequence[Cell]) -> None:
    """Each method does what its name says, and no two do the same: a field of the file wins over a preset's."""
    where = "recipe" if isinstance(source, Mapping) else str(source)
    for cell in cells:
        if "reconstruct.method" in _hidden(cell):
            problem = f"hides what the method '{cell.method}' does"
            raise RecipeError(f"{where}, reconstruct.method", problem, "leave reconstruct.method out of the recipe")
    for one, other in combinations(cells, 2):
        if essence(one.recipe) == essence(other.recipe):
            presets = _flat(PRESETS[preset_and_grid(one.method)[0]]), _flat(PRESETS[preset_and_grid(other.method)[0]])
            hidden = sorted({*_hidden(one), *_hidden(other)})
            fields = [name for name in hidden if presets[0].get(name) != presets[1].get(name)]
            problem = f"the methods '{one.method}' and '{other.method}' are the same with it"
            raise RecipeError(where, problem, f"leave {', '.join(fields) or 'one method'} out")


def _hidden(cell: Cell) -> list[str]:
    """Fields that the method's preset sets and the recipe or an override sets otherwise."""
    effective = _flat(cell.recipe.model_dump())
    preset = _flat(PRESETS[preset_and_grid(cell.method)[0]])
    return [name for name, value in preset.items() if name not in TAKEN and effective[name] != value]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
