"""Which calibration images serve best: `calibquant study selection` with the preset `fast`, in parts.

    OMP_NUM_THREADS=1 python benchmarks/selection_study.py --data DATA [--parts main w4a4 …]

DATA holds weights/, imagenet/ and cifar-10-batches-bin/. `main`: six strategies, three sizes, ResNet-20 at W2A2, with
`moments` at 256 images named in advance as the one to beat `class-balanced`. `fresh`: the strategy that has the highest
mean there at 256 images, on draws that it has not seen. `w4a4`, `second` (ResNet-20 with convolved shortcuts) and
`mobilenetv2` (all 500 images that there are as candidates, W4A4): whether it holds elsewhere. `missing-class`,
`blurred`, `dark`: candidates that differ from the test images. What was done is kept in the results, so that the same
command goes on; several may run at once on one machine with the same --runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import best
import common

from calibquant.runfolder import make_folder, write_atomic
from calibquant.studies.selection import SelectionStudy, make_selection_study, study_selection
from calibquant.studies.selection.page import figure_png, page
from calibquant.studies.selection.planning import Cell

STRATEGIES = ("random", "class-balanced", "captq", "herding", "tail", "moments")
BASELINE, SIZE = "class-balanced", 256
CIFAR = ("quant.placement=academic",)
IMAGENET = ("calibration.pool=500", "reconstruct.batch_size=8", "reconstruct.network.batch_size=16")


@dataclass(frozen=True)
class Part:
    """One study. Without strategies: the baseline and what won in `main`."""

    network: str
    keys: tuple[str, ...] = CIFAR
    setting: str = "w2a2"
    strategies: tuple[str, ...] = STRATEGIES
    sizes: tuple[int, ...] = (SIZE,)
    draws: range = range(5)
    seeds: tuple[int, ...] = (1005,)
    named: str | None = None
    shift: str = "none"


FEWER = ("class-balanced", "captq", "herding", "moments")
CONVOLVED = (*CIFAR, *best.CONVOLVED)
PARTS = {
    "main": Part("ResNet-20", sizes=(32, SIZE, 1024), seeds=(1005, 1006), named="moments"),
    "fresh": Part("ResNet-20", strategies=(), draws=range(5, 10), seeds=(1005, 1006)),
    "w4a4": Part("ResNet-20", setting="w4a4"),
    "second": Part("ResNet-20, convolved shortcuts", CONVOLVED),
    "missing-class": Part("ResNet-20", strategies=FEWER, draws=range(3), shift="missing-class"),
    "blurred": Part("ResNet-20", strategies=FEWER, draws=range(3), shift="blurred"),
    "dark": Part("ResNet-20", strategies=FEWER, draws=range(3), shift="dark"),
    "mobilenetv2": Part("MobileNetV2", IMAGENET, "w4a4", FEWER, draws=range(3)),
}


def study_of(name: str, given: Any, known: dict[str, Any]) -> SelectionStudy:
    """A part's plan; its folder receives the cells that are in the results."""
    part = PARTS[name]
    config, weights, root, _ = best.NETWORKS[part.network]
    source = [f"model.weights={given.data / 'weights' / weights}", f"data.root={given.data / root}"]
    strategies, named = part.strategies, part.named
    if not strategies:
        named = winner(known["main"])
        strategies = (BASELINE, named)
    study = make_selection_study(
        best.CONFIGS / config, strategies, part.sizes, [part.setting], part.draws, part.seeds, BASELINE,
        None if named is None else (named, SIZE), part.shift,
        ["preset=fast", *part.keys, *source, f"threads={given.threads}"], given.runs / "selection" / name,
    )  # fmt: skip
    make_folder(study.out / "cells")
    for found in known.get(name, {"cells": []})["cells"]:
        cell = Cell(*(found[key] for key in ("setting", "strategy", "size", "draw", "seed")))
        path = study.out / "cells" / f"{cell.name}.json"
        if not path.is_file():
            write_atomic(path, json.dumps(found, indent=1).encode())
    return study


def winner(main: dict[str, Any]) -> str:
    """The strategy with the highest mean top-1 at SIZE images, the baseline aside."""
    rows = [r for r in main["table"] if r["size"] == SIZE and r["strategy"] != BASELINE]
    return str(max(rows, key=lambda row: row["top1"]["mean"])["strategy"])


def public(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """A result with the command of this script, and without this machine's paths."""
    own = [text for text in result["overrides"] if not text.startswith(("model.weights=", "data.root="))]
    command = f"OMP_NUM_THREADS=1 python benchmarks/selection_study.py --data DATA --parts {name}"
    return result | {"command": command, "recipe": Path(result["recipe"]).name, "overrides": own}


def text_of(results: dict[str, dict[str, Any]]) -> str:
    parts = []
    for name in (n for n in PARTS if n in results):
        _, _, text = page(results[name]).partition("\n")
        parts.append(f"## {name}: {PARTS[name].network}\n{text}")
        if name == "main":
            parts.append("![](selection.png)\n")
    return "\n".join(parts)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    given = parser.parse_args()
    path = common.RESULTS / "selection.json"
    for name in given.parts:
        stored = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}
        result = study_selection(study_of(name, given, stored)).result
        stored = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}
        stored[name] = public(name, json.loads(json.dumps(result)))
        if name == "main":
            (common.RESULTS / "selection.png").write_bytes(figure_png(result))
        command = "OMP_NUM_THREADS=1 python benchmarks/selection_study.py --data DATA"
        common.write("selection", command, {"parts": stored}, text_of(stored))


if __name__ == "__main__":
    main()
