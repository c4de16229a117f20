"""Accuracy against time: QDrop's own code, and `qdrop`, `fast` and `best`; ResNet-20 on CIFAR-10.

    python benchmarks/time_to_accuracy.py --reference qdrop_times.json

Reads benchmarks/results/best.json, and the times of QDrop's own code: a list of {"setting", "iterations", "seconds",
"top1"}, measured on the same machine with one thread. That code (github.com/wimh966/QDrop) stays outside this project:
three `.cuda()` calls and one import of torchvision are removed, the network's block is added to its table of blocks,
and its `reconstruction` is called with batches of 32, drop 0.5 and warm-up 0.2, as its configurations do. Without
--reference the times of the last results are taken again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common
import numpy as np

SETTINGS = ("W4A4", "W2A2")
VARIANTS = ("qdrop", "qdrop, bfloat16", "fast", "best")
REFERENCE = "QDrop's own code"
FULL = 2000  # iterations whose accuracy the presets are to reach


def rows_of(best: dict[str, Any], reference: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method and setting (and number of iterations, of QDrop's code): means over the seeds."""
    found: list[dict[str, Any]] = [
        {"method": REFERENCE, "seeds": 1} | row for row in reference if row["setting"] in SETTINGS
    ]
    for setting in SETTINGS:
        for variant in VARIANTS:
            cells = [
                r for r in best["rows"]
                if (r["network"], r["setting"], r["variant"]) == ("ResNet-20", setting, variant)
            ]  # fmt: skip
            if cells:
                seconds, top1 = (float(np.mean([c[key] for c in cells])) for key in ("seconds", "top1"))
                found.append({
                    "method": variant, "setting": setting, "iterations": None, "seconds": seconds, "top1": top1,
                    "seeds": len(cells),
                })  # fmt: skip
    return found


def text_of(rows: list[dict[str, Any]]) -> str:
    full = {r["setting"]: r for r in rows if r["method"] == REFERENCE and r["iterations"] == FULL}
    body = []
    for row in sorted(rows, key=lambda r: (SETTINGS.index(r["setting"]), r["seconds"])):
        whole = full.get(row["setting"])
        name = row["method"] if row["iterations"] is None else f"{row['method']}, {row['iterations']} iterations"
        ratio = f"{whole['seconds'] / row['seconds']:.1f}" if whole else "–"
        gain = f"{100 * (row['top1'] - whole['top1']):+.2f}" if whole else "–"
        body.append(
            [row["setting"], name, str(row["seeds"]), f"{row['seconds']:.0f}", f"{100 * row['top1']:.2f}", ratio, gain]
        )
    faster = f"times as fast as {FULL} iterations of {REFERENCE}"
    header = ["setting", "method", "seeds", "seconds of reconstruction", "top-1 %", faster, "top-1 against it"]
    return common.table(header, body) + (
        "\nResNet-20 on CIFAR-10, the first 1,024 training images, boundary `qdrop`, placement `academic`, 5,000 test "
        "images; one pinned thread each, while another run used the other core.\n\n![](time_to_accuracy.png)\n"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for panel, setting in enumerate(SETTINGS, start=1):
        axes = figure.add_subplot(1, len(SETTINGS), panel)
        for method in (REFERENCE, *VARIANTS):
            found = sorted(
                (r for r in rows if (r["method"], r["setting"]) == (method, setting)), key=lambda r: r["seconds"]
            )
            if found:
                axes.plot([r["seconds"] for r in found], [100 * r["top1"] for r in found], "o-", label=method)
        axes.set_xscale("log")
        axes.set_xlabel("seconds of reconstruction, one thread")
        axes.set_ylabel("top-1 %")
        axes.set_title(setting, fontsize=10)
    figure.axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="times of QDrop's own code, JSON")
    given = parser.parse_args()
    stored = common.RESULTS / "time_to_accuracy.json"
    if given.reference is not None:
        reference = json.loads(given.reference.read_text(encoding="utf-8"))
    else:
        reference = json.loads(stored.read_text(encoding="utf-8"))["reference"]
    rows = rows_of(json.loads((common.RESULTS / "best.json").read_text(encoding="utf-8")), reference)
    draw(rows, common.RESULTS / "time_to_accuracy.png")
    command = "python benchmarks/time_to_accuracy.py --reference qdrop_times.json"
    common.write("time_to_accuracy", command, {"rows": rows, "reference": reference}, text_of(rows))


if __name__ == "__main__":
    main()
