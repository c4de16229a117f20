"""Networks trained on Imagenette by `calibquant train`: float, 8 bits, and 4 bits by rounding and by QDrop.

    OMP_NUM_THREADS=1 python benchmarks/imagenette.py --data DATA --trainings RUN [RUN …]

DATA holds imagenette10/; each RUN is the folder of a training by a recipe of configs/train. What was done is kept in
the results, so that the same command goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common

from calibquant.pipeline import quantize
from calibquant.recipe import load_recipe
from calibquant.runfolder import TRAINED, TRAINING, open_run

CONFIGS = Path(__file__).parents[1] / "configs" / "train"
SHORT = ("reconstruct.iterations=500", "reconstruct.batch_size=8", "reconstruct.rounding_lr=0.01")
WAYS: dict[str, tuple[str, ...]] = {
    "W8A8": ("preset=int8",),
    "W4A4, nearest": ("preset=nearest",),
    "W4A4, analytic": ("preset=analytic",),
    "W4A4, qdrop": ("preset=qdrop", *SHORT),
}


def measure(training: Path, way: str, given: Any) -> dict[str, Any]:
    folder = open_run(training, (TRAINING,))
    metrics = folder.read_json("metrics.json")
    keys = [f"model.weights={training / TRAINED}", f"data.root={given.data / 'imagenette10'}",
            f"threads={given.threads}", f"runs={given.runs / 'imagenette'}", "calibration.count=256",
            "export.onnx=false"]  # fmt: skip
    # The training's own recipe has every default written out, and would win over a preset.
    run = quantize(load_recipe(CONFIGS / f"{metrics['model']}-imagenette.yaml", [*keys, *WAYS[way]]))
    scores = run.metrics["quantized"]
    return {
        "network": metrics["model"], "epochs": len(metrics["epochs"]), "way": way, "float": metrics["float"]["top1"],
        "top1": scores["top1"], "agreement": scores["agreement"], "interval": scores["agreement_interval"],
        "bytes": run.metrics["size"]["file"], "float_bytes": run.metrics["size"]["float32"], "count": scores["count"],
        "seconds": metrics["seconds"]["train"],
    }  # fmt: skip


def text_of(rows: list[dict[str, Any]]) -> str:
    header = ["network", "epochs", "hours", "float top-1 %", *(f"{way}: top-1, agreement" for way in WAYS), "MB"]
    body = []
    for network in dict.fromkeys(r["network"] for r in rows):
        own = {r["way"]: r for r in rows if r["network"] == network}
        first = next(iter(own.values()))
        cells = [
            f"{100 * own[w]['top1']:.2f}, {100 * own[w]['agreement']:.2f}" if w in own else "–" for w in WAYS
        ]  # fmt: skip
        sizes = " → ".join(f"{r / 1e6:.2f}" for r in (first["float_bytes"], *(own[w]["bytes"] for w in own)))
        body.append([network, str(first["epochs"]), f"{first['seconds'] / 3600:.1f}", f"{100 * first['float']:.2f}",
                     *cells, sizes])  # fmt: skip
    return common.table(header, body) + (
        "\nTrained from scratch on Imagenette's training images at 96 pixels, on one core; "
        f"{rows[0]['count']} validation images. Placement `integer`, boundary `qdrop` (W8A8: `none`), 256 training "
        "images calibrate, seed 1005; qdrop with 500 iterations of 8 images. MB: float32, then each way's file.\n"
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--trainings", type=Path, nargs="+", required=True)
    given = parser.parse_args()
    path = common.RESULTS / "imagenette.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    for training in given.trainings:
        name = json.loads((training / "metrics.json").read_text(encoding="utf-8"))["model"]
        for way in WAYS:
            if any((r["network"], r["way"]) == (name, way) for r in rows):
                continue
            rows.append(measure(training, way, given))
            command = "OMP_NUM_THREADS=1 python benchmarks/imagenette.py --data DATA --trainings RUN …"
            common.write("imagenette", command, {"rows": rows}, text_of(rows))


if __name__ == "__main__":
    main()
