"""QDrop's reconstruction against QDrop's own code: ResNet-20 on CIFAR-10, four settings, several seeds.

    python benchmarks/reconstruction.py --data DATA --reference qdrop_resnet20_reconstructed.npz [--jobs 2]

DATA holds weights/resnet20-12fca82f.th and cifar-10-batches-bin/. The reference file holds, for each setting, the
logits of QDrop's own code (seed 1005, 2,000 iterations a unit, the first 1,024 training images) on the test images.
24 runs of about 7 minutes on one thread each; the same command goes on with a run that was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import numpy as np

from calibquant.metrics import mcnemar
from calibquant.studies.compare import compare
from calibquant.studies.compare.markdown import facts, score_table
from calibquant.studies.compare.predictions import read_predictions
from calibquant.studies.paired import spread

COMMAND = "python benchmarks/reconstruction.py --data DATA --reference qdrop_resnet20_reconstructed.npz"
ROOT = Path(__file__).parent.parent
METHODS, BITS = ["qdrop-reference", "qdrop"], ["w4a4", "w3a3", "w2a4", "w2a2"]
# What qdrop-reference sets beside the method, for qdrop as well: only sampling and the never-worse rule differ.
SHARED = [
    "calibration.strategy=first", "calibration.range_count=256", "calibration.batch_size=256",
    "quant.placement=academic", "quant.boundary=qdrop", "quant.activations.observer=mse-batch",
    "reconstruct.iterations=2000", "threads=1",
]  # fmt: skip


def against_reference(study: Path, cells: list[dict[str, Any]], logits: Any) -> list[dict[str, Any]]:
    """For each setting and method: QDrop's own accuracy, the difference to it in seeds' spread, and tests on images."""
    rows = []
    for bits in BITS:
        reference = logits[f"{bits}/logits"].astype(np.float32).argmax(axis=1)
        for method in METHODS:
            mine = [c for c in cells if (c["method"], c["setting"]) == (method, bits.upper())]
            found = [read_predictions(study / Path(c["run"]).parent, len(reference)) for c in mine]
            if not mine or None in found:
                continue
            right = [(predicted == labels, reference == labels) for predicted, labels in found]  # type: ignore[misc]
            top1 = spread([float(a.mean()) for a, _ in right])
            rows.append({
                "setting": bits.upper(), "method": method, "seeds": top1.n, "top1": top1.mean, "sd": top1.sd,
                "each": [float(a.mean()) for a, _ in right], "reference_top1": float(right[0][1].mean()),
                "difference": top1.mean - float(right[0][1].mean()), "mcnemar": [mcnemar(a, b) for a, b in right],
            })  # fmt: skip
    return rows


def reference_table(rows: list[dict[str, Any]]) -> str:
    header = [
        "setting",
        "method",
        "seeds' top-1 %",
        "mean ± sd",
        "QDrop's code",
        "difference",
        "McNemar p of each seed",
    ]
    lines = []
    for row in rows:
        sd = "" if row["sd"] is None else f" ± {100 * row['sd']:.2f}"
        lines.append([
            row["setting"], row["method"], ", ".join(f"{100 * a:.2f}" for a in row["each"]),
            f"{100 * row['top1']:.2f}{sd}", f"{100 * row['reference_top1']:.2f}", f"{100 * row['difference']:+.2f}",
            ", ".join(f"{p:.3f}" for p in row["mcnemar"]),
        ])  # fmt: skip
    return common.table(header, lines)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=3)
    given: argparse.Namespace = parser.parse_args()
    network = [
        f"model.weights={given.data / 'weights' / 'resnet20-12fca82f.th'}",
        f"data.root={given.data / 'cifar-10-batches-bin'}",
    ]
    study = given.runs / "reconstruction"
    recipe = ROOT / "configs" / "resnet20-cifar10.yaml"
    result = compare(recipe, METHODS, BITS, given.seeds, None, [*network, *SHARED], study, given.jobs).result
    with np.load(given.reference, allow_pickle=False) as logits:
        rows = against_reference(study, result["cells"], logits)
    tests = [
        [
            t["setting"], f"{100 * t['difference']:+.2f}", "–" if t["sd"] is None else f"{100 * t['sd']:.2f}",
            "–" if t["interval"] is None else f"{100 * t['interval'][0]:+.2f} to {100 * t['interval'][1]:+.2f}",
            f"{t['p_images']:.3f}", t["verdict"],
        ]
        for t in result["tests"]
    ]  # fmt: skip
    header = ["setting", "qdrop − qdrop-reference", "sd", "95 % interval (seeds)", "p (images)", "verdict"]
    page = [
        facts(result), common.table(*score_table(result)), reference_table(rows), common.table(header, tests),
    ]  # fmt: skip
    cells = [{key: value for key, value in cell.items() if key != "run"} for cell in result["cells"]]
    found = {"methods": result["methods"], "cells": cells, "tests": result["tests"], "reference": rows}
    common.write("reconstruction", COMMAND, found, "\n".join(page))


if __name__ == "__main__":
    main()
