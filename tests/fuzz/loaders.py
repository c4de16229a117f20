"""The table of loaders: for each, how its good files are made, how they are read, and which mutators damage them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calibquant.recipe import load_recipe
from calibquant.recipe.loading import read_tree

from . import containers, mutators, trees
from .mutators import Mutator

MUTATORS: dict[str, tuple[Mutator, ...]] = {
    "bytes": mutators.BYTES,
    "text": mutators.TEXT,
    "yaml": (*mutators.YAML_TEXT, *trees.YAML_TREE),
    "json": trees.JSON_TREE,
    "safetensors": containers.SAFETENSORS,
    "tar": containers.TAR,
    "png": containers.PNG,
    "zip": containers.ZIP,
    "pickle": containers.PICKLE,
    "onnx": containers.ONNX,
}


def _nothing(_folder: Path, _target: Path) -> None: ...


@dataclass(frozen=True)
class Loader:
    """One row of the table.

    Args:
        name: of the row.
        kinds: of the mutators.
        make: writes good files into a folder and gives those that are to be damaged.
        load: reads them; a refusal is a CalibQuantError.
        names: one of them stands in a refusal; none means the files' names.
        places: whether something else may stand in a file's place.
        mend: puts right what else in the folder depends on the damaged file, such as its hash.
    """

    name: str
    kinds: tuple[str, ...]
    make: Callable[[Path], list[Path]]
    load: Callable[[Path], object]
    names: tuple[str, ...] = ()
    places: bool = True
    mend: Callable[[Path, Path], None] = _nothing


class WrongExitError(AssertionError):
    """A command ended with another code or more than its one line."""


def command(*arguments: str) -> None:
    """Run the command line; a refusal is raised as the error that it is.

    Raises:
        CalibQuantError: the command refused its input in one line with exit code 1.
        WrongExitError: it ended otherwise.
    """
    from calibquant.cli import console, main
    from calibquant.errors import CalibQuantError

    said = io.StringIO()
    before = console.err.file
    console.err.file = said
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = main(list(arguments))
    finally:
        console.err.file = before
    text = said.getvalue()
    if code == 0:
        return
    if code != 1 or not text.startswith("error: ") or "internal error" in text:
        raise WrongExitError(f"exit code {code}: {text[:400]}")
    raise CalibQuantError("", text.removeprefix("error: "), "")


# --- recipes ----------------------------------------------------------------------------------------------------------

RECIPE = """\
# a comment
preset: fast
model: {name: digits_resnet, options: {}}
data:
  kind: digits
  preprocess: {resize: [16, 16], crop: 14, mean: [0.5], std: [0.5]}
  augment: {scale: [0.2, 1.0], flip: true, pad: 2}
calibration: {count: 64, strategy: "herding=0.75,tail=0.25", range_count: 32}
quant:
  weights: {bits: 3, observer: mse, percentile: 99.9}
  activations: {bits: 4, symmetric: false}
  bits: {conv1.weight: 8, "fc.weight": 8}
reconstruct: {iterations: 200, time: 20m}
finetune: {epochs: 2, lr: 1.0e-3}
seed: 7
threads: 2
"""


def _recipe(folder: Path) -> list[Path]:
    (folder / "recipe.yaml").write_text(RECIPE)
    return [folder / "recipe.yaml"]


def _include(folder: Path) -> list[Path]:
    (folder / "main.yaml").write_text("include: [base.yaml, more.yaml]\nseed: 3\n")
    (folder / "base.yaml").write_text("include: [more.yaml]\n" + RECIPE)
    (folder / "more.yaml").write_text("quant: {weights: &w {bits: 2}}\ntrain: {}\n")
    return [folder / "main.yaml", folder / "base.yaml", folder / "more.yaml"]


OVERRIDES = (
    "quant.weights.bits=2\nseed=7\nquant.bits={conv1.weight: 8}\ndata.preprocess.mean=[0.5]\nruns=runs\n"
    "model.options={padding: same}\nreconstruct.iterations=100\nquant.activations.percentile=99.5\nfinetune.lr=1e-3\n"
)


def _overrides(folder: Path) -> list[Path]:
    (folder / "override").write_text(OVERRIDES)
    return [folder / "override"]


def _load_overrides(folder: Path) -> object:
    """As the command line hands them over: bytes that are no UTF-8 arrive as surrogates, and NUL cannot arrive."""
    text = (folder / "override").read_bytes().decode("utf-8", "surrogateescape")
    return load_recipe("digits", text.rstrip("\n").split("\n"))


RECIPES = (
    Loader("recipe", ("yaml", "text", "bytes"), _recipe, lambda f: load_recipe(f / "recipe.yaml").to_yaml()),
    Loader("included recipe", ("yaml", "text", "bytes"), _include, lambda f: load_recipe(f / "main.yaml").to_yaml()),
    Loader("recipe's tree", ("yaml", "text", "bytes"), _recipe, lambda f: read_tree(f / "recipe.yaml")),
    Loader(
        "override", ("yaml", "text", "bytes"), _overrides, _load_overrides,
        names=("override", "digits.yaml"), places=False,
    ),
    Loader(
        "evaluate RECIPE", ("yaml", "text"), _recipe,
        lambda f: command("evaluate", str(f / "recipe.yaml"), "evaluation.count=1", "--json"),
        names=("recipe", "data.", "model."),
    ),
)  # fmt: skip
