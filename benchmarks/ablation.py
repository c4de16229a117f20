"""The parts of Banner et al.'s 4-bit quantization alone and together, and CalibQuant's own method without gradients.

    OMP_NUM_THREADS=1 python benchmarks/ablation.py --data DATA [--networks NAME …] [--settings w4a4 …] [--seeds 3]

DATA holds weights/, imagenet/ and cifar-10-batches-bin/. The cells are those of `calibquant compare --preset
aciq-ablation` and of the preset `analytic`; what was done is kept below --runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common

from calibquant.studies.compare import STUDIES, compare
from calibquant.studies.compare.markdown import facts

CONFIGS = Path(__file__).parents[1] / "configs"
OWN = "analytic"
BASE, SETTINGS = "banner-base", STUDIES["aciq-ablation"][1]
CIFAR = ("calibration.count=512", "evaluation.count=2000")
OTHER = ("model.options={shortcut: conv}", "data.preprocess.mean=[0.491, 0.482, 0.447]",
         "data.preprocess.std=[0.247, 0.243, 0.262]")  # fmt: skip
IMAGENET = ("calibration.count=100",)
PREPROCESSING = ("preprocess", "calibration_preprocess")
FEW = ("calibration.count=8", "evaluation.count=16")  # of untrained networks, whose agreement tells little
NETWORKS = {
    "ResNet-20": ("resnet20-cifar10.yaml", "resnet20-12fca82f.th", ".", CIFAR),
    "ResNet-20, convolved shortcuts": (
        "resnet20-cifar10.yaml", "cifar_resnet20_convshortcut_apot_fp32.pt", ".", (*CIFAR, *OTHER),
    ),
    "SqueezeNet 1.1": ("squeezenet-imagenet.yaml", "squeezenet1_1_gluon_fp32.pt", "imagenet", IMAGENET),
    "MobileNetV2": ("mobilenetv2-imagenet.yaml", "mobilenetv2_tf_1.0_224_fp32.pt", "imagenet", IMAGENET),
    "VGG-16-BN, random weights": ("squeezenet-imagenet.yaml", "", "imagenet", ("model.name=vgg16_bn", *FEW)),
    "Inception-v3, random weights": (
        "squeezenet-imagenet.yaml", "", "imagenet",
        ("model.name=inception_v3", *(f"data.{p}={{resize: 342, crop: 299}}" for p in PREPROCESSING), *FEW),
    ),
}  # fmt: skip


def study(name: str, given: Any) -> dict[str, Any]:
    """The table of one network."""
    config, weights, root, options = NETWORKS[name]
    methods = STUDIES["aciq-ablation"][0]
    overrides = [f"data.root={given.data / root}", "export.onnx=false", f"threads={given.threads}", *options]
    overrides += [f"model.weights={given.data / 'weights' / weights}"] if weights else []
    out = given.runs / "ablation" / name.replace(" ", "-").replace(",", "")
    done = compare(CONFIGS / config, (*methods, OWN), given.settings, given.seeds, BASE, overrides, out)
    return done.result


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Top-1 of each method and setting, and the share of the base's drop that it recovers."""
    found = {(row["method"], row["setting"]): row for row in result["table"]}
    rows = []
    for (method, setting), row in found.items():
        top1, base, float_top1 = row["top1"]["mean"], found[BASE, setting]["top1"]["mean"], result["float_top1"]
        drop = float_top1 - base
        rows.append({
            "method": method, "setting": setting, "top1": top1, "sd": row["top1"]["sd"], "n": row["top1"]["n"],
            "float_top1": float_top1, "recovered": (top1 - base) / drop if drop > 0 else None, "bytes": row["bytes"],
            "seconds": row["seconds"]["total"],
        })  # fmt: skip
    return rows


def text_of(networks: dict[str, Any]) -> str:
    parts = []
    for name, network in networks.items():
        rows = network["rows"]
        cells = {(r["method"], r["setting"].lower()): r for r in rows}
        header = ["method", *(s.upper() for s in SETTINGS), "W4A4: drop recovered"]
        lines = []
        for method in dict.fromkeys(r["method"] for r in rows):
            last = cells[method, "w4a4"]["recovered"] if (method, "w4a4") in cells else None
            share = "–" if method == BASE or last is None else f"{100 * last:.0f} %"
            lines.append([method, *(_spread(cells.get((method, s))) for s in SETTINGS), share])
        parts.append(f"## {name}\n\n{network['facts']}\n\n" + common.table(header, lines))
    return "\n".join(parts)


def _spread(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    sd = "" if row["sd"] is None else f" ± {100 * row['sd']:.2f}"
    return f"{100 * row['top1']:.2f}{sd}"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=[*NETWORKS])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    path = common.RESULTS / "ablation.json"
    known = json.loads(path.read_text(encoding="utf-8"))["networks"] if path.is_file() else {}
    for name in given.networks:
        result = study(name, given)
        rows = rows_of(result)
        done = {row["setting"] for row in rows}
        others = [row for row in known.get(name, {}).get("rows", []) if row["setting"] not in done]
        known[name] = {"rows": [*others, *rows], "facts": facts(result), "seeds": result["seeds"]}
        ordered = {n: known[n] for n in NETWORKS if n in known}
        command = "OMP_NUM_THREADS=1 python benchmarks/ablation.py --data DATA"
        common.write("ablation", command, {"networks": ordered}, text_of(ordered))


if __name__ == "__main__":
    main()
