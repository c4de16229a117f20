"""Weights on grids beyond uniform: ResNet-20 on CIFAR-10 at 1 to 4 bits, weights only, with reconstruction.

    OMP_NUM_THREADS=1 python benchmarks/grids.py --data DATA [--grids …] [--bits 1..4] [--seeds 1005 …]

DATA holds weights/ and cifar-10-batches-bin/. `calibquant compare --grids` with the preset `fast`; activations have 16
bits. What was done is kept below --runs, so that the same command goes on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import common

from calibquant.studies.compare import compare
from calibquant.studies.compare.running import FIGURE

CONFIG = Path(__file__).parents[1] / "configs" / "resnet20-cifar10.yaml"
GRIDS = ("uniform", "codebook", "apot", "power-of-two", "ternary", "binary")
ONE_DRAW = ("calibration.strategy=first", "quant.placement=academic", "quant.boundary=qdrop",
            "quant.activations.bits=16", "export.onnx=false")  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--grids", nargs="+", default=[*GRIDS])
    parser.add_argument("--bits", default="1..4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1005, 1006, 1007])
    given = parser.parse_args()
    keys = [f"model.weights={given.data / 'weights' / 'resnet20-12fca82f.th'}", f"threads={given.threads}",
            f"data.root={given.data / 'cifar-10-batches-bin'}", *ONE_DRAW]  # fmt: skip
    done = compare(CONFIG, ["fast"], [given.bits], given.seeds, None, keys, given.runs / "grids", grids=given.grids)
    rows, tests = done.result["table"], {(t["method"], t["setting"]): t for t in done.result["tests"]}
    body = []
    for row in rows:
        test, top1 = tests.get((row["method"], row["setting"])), row["top1"]
        sd = "" if top1["sd"] is None else f" ± {100 * top1['sd']:.2f}"
        against = "–" if test is None else f"{100 * test['difference']:+.2f}, {test['verdict']}"
        body.append(
            [
                row["setting"],
                row["method"].partition(":")[2],
                str(row["seeds"]),
                f"{100 * top1['mean']:.2f}{sd}",
                f"{row['weight_bits']:.2f}",
                f"{row['bytes']:,}",
                against,
            ]
        )
    header = ["setting", "grid", "seeds", "top-1 %", "bits a weight", "bytes", f"against {done.result['baseline']}"]
    text = common.table(header, body) + (
        f"\nFloat top-1 {100 * done.result['float_top1']:.2f} %. Preset `fast`, the first 1,024 training images, "
        "placement `academic`, boundary `qdrop` (8 bits at both ends), 5,000 test images. Against uniform levels: mean "
        "difference in points, and whether its 95 % interval over the seeds excludes 0.\n\n![](grids.png)\n"
    )
    shutil.copyfile(done.folder / FIGURE, common.RESULTS / "grids.png")
    common.write("grids", "OMP_NUM_THREADS=1 python benchmarks/grids.py --data DATA", {"result": done.result}, text)


if __name__ == "__main__":
    main()
