"""The README's tables of results, written from benchmarks/results/*.json.

    python benchmarks/readme.py [--check]

Each table stands in README.md between `<!-- table NAME -->` and `<!-- end -->`. With --check nothing is written, and
the exit code says whether the tables are those of the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
from imagenet import METHODS, SETTINGS

README = Path(__file__).parents[1] / "README.md"
PAPERS = ("W4A4", "W3A3", "W2A4", "W2A2")
# QDrop's own code with 2,000 iterations, as in results/reconstruction.json.
QDROP = "QDrop's own code, 2,000 iterations"


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((common.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def imagenet() -> str:
    """Top-1 and agreement of each method on MobileNetV2 and SqueezeNet."""
    body = []
    for name, network in results("imagenet")["networks"].items():
        found = {(row["method"], row["setting"]): row for row in network["rows"]}
        for number, (method, words) in enumerate((m, w) for m, w in METHODS.items() if m != "banner-base"):
            cells = [found.get((method, setting)) for setting in SETTINGS]
            shown = ["–" if c is None else f"{100 * c['top1']:.2f} ({100 * c['agreement']:.2f})" for c in cells]
            title = f"{name} ({100 * network['float']['top1']:.2f}): " if number == 0 else ""
            body.append([f"{title}{words}", *shown])
    return common.table(["", *(setting.upper() for setting in SETTINGS)], body)


def presets() -> str:
    """`fast` and `best` beside QDrop's own code, ResNet-20."""
    rows = [r for r in results("best")["rows"] if r["network"] == "ResNet-20"]
    single = 100 * rows[0]["float_top1"]
    reference = {row["setting"]: row["reference_top1"] for row in results("reconstruction")["reference"]}
    body = [[QDROP, *(f"{100 * reference[s]:.2f}, {single - 100 * reference[s]:.2f}" for s in PAPERS)]]
    for variant in ("fast", "best"):
        cells = []
        for setting in PAPERS:
            found = [r for r in rows if (r["variant"], r["setting"]) == (variant, setting)]
            top1 = 100 * np.array([r["top1"] for r in found])
            spread = f" ± {top1.std(ddof=1):.2f}" if len(found) > 1 else ""
            seconds = np.mean([r["seconds"] for r in found])
            cells.append(f"{top1.mean():.2f}{spread}, {single - top1.mean():.2f}, {seconds:.0f} s")
        body.append([f"`{variant}`", *cells])
    return common.table([f"top-1 %, drop from {single:.2f}, seconds of reconstruction", *PAPERS], body)


TABLES = {"imagenet": imagenet, "presets": presets}


def filled(text: str) -> str:
    """The README with its tables made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- table {name} -->\n\n", "\n<!-- end -->"
        before, found, rest = text.partition(begin)
        if not found:
            raise SystemExit(f"README.md has no place for the table {name}")
        text = before + begin + make() + end + rest.partition(end)[2]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    new = filled(text)
    if given.check and new != text:
        sys.exit("README.md: its tables are not those of benchmarks/results; run benchmarks/readme.py")
    if not given.check:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
