"""Quantization-aware training of ResNet-20 on CIFAR-10: W2A2, W3A3, W4A4, and W4A4 as AMCT retrains.

    OMP_NUM_THREADS=1 python benchmarks/qat.py --data DATA [--recipes w2a2 …] [--seeds 1005]

DATA holds weights/ and cifar-10-batches-bin/. The recipes are those of configs/qat; the accuracy is that of 5,000 test
images before and after training, and of the exported deploy.onnx in ONNX Runtime. What was done is kept in the
results, so that the same command goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common

from calibquant.pipeline import quantize
from calibquant.pipeline.deployed import evaluate_onnx
from calibquant.recipe import load_recipe

CONFIGS = Path(__file__).parents[1] / "configs" / "qat"
RECIPES = ("w4a4", "w4a4-amct", "w3a3", "w2a2")


def measure(name: str, seed: int, given: Any) -> dict[str, Any]:
    recipe = load_recipe(CONFIGS / f"resnet20-{name}.yaml", [
        f"model.weights={given.data / 'weights' / 'resnet20-12fca82f.th'}", f"seed={seed}",
        f"data.root={given.data / 'cifar-10-batches-bin'}", f"runs={given.runs / 'qat'}", f"threads={given.threads}",
        "calibration.strategy=first",
    ])  # fmt: skip
    run = quantize(recipe)
    metrics, trained = run.metrics, run.metrics["finetune"]
    deployed = evaluate_onnx(run.folder / "deploy.onnx")
    return {
        "recipe": name, "seed": seed, "setting": metrics["setting"],
        "float": metrics["float"]["top1"], "before": trained["before"]["top1"], "after": metrics["quantized"]["top1"],
        "agreement": metrics["quantized"]["agreement"], "deployed": deployed["deployed"]["top1"],
        "decides_alike": deployed["agreement_with_simulation"], "bytes": metrics["size"]["file"],
        "epochs": trained["epochs"], "images": trained["training_images"],
        "count": metrics["quantized"]["count"], "placement": metrics["placement"], "boundary": metrics["boundary"],
    }  # fmt: skip


def text_of(rows: list[dict[str, Any]]) -> str:
    header = ["recipe", "seed", "epochs", "of images", "top-1 % before", "after", "below float", "agreement %",
              "deploy.onnx", "decides alike %"]  # fmt: skip
    body = []
    for row in rows:
        percents = (row["before"], row["after"], row["float"] - row["after"], row["agreement"], row["deployed"],
                    row["decides_alike"])  # fmt: skip
        facts = f"qat/resnet20-{row['recipe']}", f"{row['seed']}", f"{len(row['epochs'])}", f"{row['images']:,}"
        body.append([*facts, *(f"{100 * p:.2f}" for p in percents)])
    first = rows[0]
    words = (
        f"\nFloat top-1 {100 * first['float']:.2f} %; {first['count']:,} test images; boundary `{first['boundary']}`, "
        f"placement `{first['placement']}`. Where fewer than 50,000 training images are learned from, the others "
        "tell that the start was not better. Before: what calibration, or reconstruction with `fast`, gives. "
        "deploy.onnx: its top-1 in ONNX Runtime, and on how many images it decides as the simulation. "
        "What a step costs: scaling.md.\n"
    )
    return common.table(header, body) + words


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1005])
    given = parser.parse_args()
    path = common.RESULTS / "qat.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    for name in given.recipes:
        for seed in given.seeds:
            if any((r["recipe"], r["seed"]) == (name, seed) for r in rows):
                continue
            rows.append(measure(name, seed, given))
            rows.sort(key=lambda r: (RECIPES.index(r["recipe"]), r["seed"]))
            command = "OMP_NUM_THREADS=1 python benchmarks/qat.py --data DATA"
            common.write("qat", command, {"rows": rows}, text_of(rows))


if __name__ == "__main__":
    main()
