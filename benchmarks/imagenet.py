"""MobileNetV2 and SqueezeNet 1.1 on a small ImageNet validation set: methods from min-max ranges to reconstruction.

    OMP_NUM_THREADS=1 python benchmarks/imagenet.py --data DATA [--networks …] [--methods …] [--settings …]

DATA holds weights/ and imagenet/ (calibration.csv, val.csv and their images). What was done is kept below --runs, so
that the same command goes on, and methods or settings can be added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common

from calibquant.studies.compare import compare

CONFIGS = Path(__file__).parents[1] / "configs"
NETWORKS = {
    "MobileNetV2": ("mobilenetv2-imagenet.yaml", "mobilenetv2_tf_1.0_224_fp32.pt"),
    "SqueezeNet 1.1": ("squeezenet-imagenet.yaml", "squeezenet1_1_gluon_fp32.pt"),
}
SETTINGS = ("w8a8", "w6a6", "w4a8", "w4a4")
METHODS = {
    "banner-base": "min-max ranges, nearest rounding",
    "nearest": "MSE ranges, nearest rounding",
    "aciq": "ACIQ, bias correction",
    "analytic": "Gram rounding, bias correction",
    "adaround": "AdaRound",
    "qdrop": "QDrop",
}
LEARNED = ("adaround", "qdrop")
COUNT, ITERATIONS, BATCH, RATE = 256, 500, 8, 1e-2
COMMON = (f"calibration.count={COUNT}", "export.onnx=false")
# A quarter of the usual images a step: on large images each has many positions, and steps count more. Roundings move
# by about their rate a step, so few steps need a higher one.
SCHEDULE = (f"reconstruct.iterations={ITERATIONS}", f"reconstruct.batch_size={BATCH}",
            f"reconstruct.rounding_lr={RATE}")  # fmt: skip


def study(name: str, given: Any) -> dict[str, Any]:
    """The rows of one network; those of methods and settings that were not asked for stay as they are known."""
    config, weights = NETWORKS[name]
    overrides = [f"model.weights={given.data / 'weights' / weights}", f"data.root={given.data / 'imagenet'}",
                 f"threads={given.threads}", *COMMON]  # fmt: skip
    rows = []
    for kind, extra in (("analytic", ()), ("learned", SCHEDULE)):
        methods = [m for m in given.methods if (m in LEARNED) == (kind == "learned")]
        if not methods:
            continue
        out = given.runs / "imagenet" / f"{name.replace(' ', '-')}-{kind}"
        done = compare(CONFIGS / config, methods, given.settings, [1005], None, [*overrides, *extra], out)
        for cell in done.result["cells"]:
            metrics = json.loads((out / cell["run"] / "metrics.json").read_text(encoding="utf-8"))
            quantized = metrics["quantized"]
            rows.append({
                "method": cell["method"], "setting": cell["setting"].lower(), "bytes": cell["bytes"],
                "top1": quantized["top1"], "top1_interval": quantized["top1_interval"],
                "agreement": quantized["agreement"], "agreement_interval": quantized["agreement_interval"],
                "seconds": cell["seconds"], "rolled_back": cell["rolled_back"], "units": cell["units"],
            })  # fmt: skip
    return {"rows": rows, "float": metrics["float"], "float_bytes": metrics["size"]["float32"]}


def text_of(networks: dict[str, Any]) -> str:
    parts = []
    for name, network in networks.items():
        found = {(r["method"], r["setting"]): r for r in network["rows"]}
        body = []
        for method, words in METHODS.items():
            cells = [_cell(found.get((method, setting))) for setting in SETTINGS]
            body.append([words, *cells])
        header = ["method", *(f"{s.upper()}: top-1, agreement" for s in SETTINGS)]
        single = network["float"]
        sizes = ", ".join(
            f"{s.upper()} {found['nearest', s]['bytes'] / 1e6:.2f}" for s in SETTINGS if ("nearest", s) in found
        )
        parts.append(
            f"## {name}\n\nFloat top-1 {100 * single['top1']:.2f} % ({_interval(single['top1_interval'])}) on "
            f"{single['count']} images, {network['float_bytes'] / 1e6:.2f} MB; packed MB: {sizes}.\n\n"
            + common.table(header, body)
        )
    return "\n".join(parts) + (
        "\nTop-1 and agreement with the float network in percent, Wilson's 95 % interval of the agreement in brackets. "
        f"Boundary `qdrop`, placement `integer`, {COUNT} training images for calibration, seed 1005; AdaRound and "
        f"QDrop with {ITERATIONS} iterations a unit of {BATCH} images, rounding rate {RATE}.\n"
    )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{100 * row['top1']:.2f}, {100 * row['agreement']:.2f} ({_interval(row['agreement_interval'])})"


def _interval(bounds: list[float]) -> str:
    return "–".join(f"{100 * bound:.1f}" for bound in bounds)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=[*NETWORKS])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    given = parser.parse_args()
    path = common.RESULTS / "imagenet.json"
    known = json.loads(path.read_text(encoding="utf-8")).get("networks", {}) if path.is_file() else {}
    for name in given.networks:
        new = study(name, given)
        asked = {(row["method"], row["setting"]) for row in new["rows"]}
        before = [r for r in known.get(name, {}).get("rows", []) if (r["method"], r["setting"]) not in asked]
        known[name] = new | {"rows": [*before, *new["rows"]]}
        ordered = {n: known[n] for n in NETWORKS if n in known}
        command = "OMP_NUM_THREADS=1 python benchmarks/imagenet.py --data DATA"
        common.write("imagenet", command, {"networks": ordered}, text_of(ordered))


if __name__ == "__main__":
    main()
