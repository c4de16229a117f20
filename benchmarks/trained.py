"""A network that `calibquant train` made at 16, 8, 4 and 2 bits: ours beside ptq_resnet20's way.

    OMP_NUM_THREADS=1 python benchmarks/trained.py --data DATA --training RUN [--settings w2a2 …] [--ways …]
        [--seeds 1005 …]

RUN is the folder of a training; DATA holds cifar-10-batches-bin/. ptq_resnet20's way is its observers, its number of
images and no boundary rule on the same network; its published table is of its own, wider one.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import common

from calibquant.pipeline import quantize
from calibquant.recipe import load_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
SETTINGS = ("w16a16", "w8a8", "w4a4", "w2a2")
# Way -> recipe, further keys, settings.
WAYS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "CalibQuant": ("{name}-cifar10/{setting}.yaml", (), SETTINGS),
    "CalibQuant, best": ("{name}-cifar10/{setting}.yaml", ("preset=best",), ("w4a4", "w2a2")),
    "ptq_resnet20's way": ("reference/ptq-resnet20/{setting}.yaml", (), SETTINGS),
}
# README of ptq_resnet20, on its wide ResNet-20 (float 91.53): accuracy, macro precision, recall, F1.
PUBLISHED = {
    "w2a2": (0.1303, 0.1396, 0.1303, 0.1176), "w4a4": (0.8600, 0.8695, 0.8600, 0.8616),
    "w8a8": (0.9156, 0.9167, 0.9156, 0.9159), "w16a16": (0.9153, 0.9166, 0.9153, 0.9156),
}  # fmt: skip
MEASURES = ("accuracy", "precision", "recall", "f1")


def scores_of(metrics: dict[str, Any]) -> dict[str, float]:
    return {"accuracy": metrics["top1"], **{key: metrics["macro"][key] for key in MEASURES[1:]}}


def measure(way: str, setting: str, seed: int, given: Any, training: dict[str, Any]) -> dict[str, Any]:
    name = "resnet20" if training["model"] == "cifar_resnet20" else "wide-resnet20"
    file, keys, _ = WAYS[way]
    recipe = load_recipe(CONFIGS / file.format(name=name, setting=setting), [
        *keys,
        f"model.name={training['model']}", f"model.weights={given.training / 'weights.safetensors'}",
        f"data.root={given.data}", f"runs={given.runs}", f"threads={given.threads}", f"seed={seed}",
        "export.onnx=false",
    ])  # fmt: skip
    metrics = quantize(recipe).metrics
    return {
        "way": way, "setting": setting, "seed": seed, "boundary": metrics["boundary"],
        "placement": metrics["placement"], "method": metrics["reconstruction"],
        "images": metrics["calibration_images"], "iterations": recipe.reconstruct.iterations,
        "bytes": metrics["size"]["file"], "float": scores_of(metrics["float"]), "count": metrics["quantized"]["count"],
        **scores_of(metrics["quantized"]),
    }  # fmt: skip


def text_of(rows: list[dict[str, Any]], training: dict[str, Any]) -> str:
    first = rows[0]
    body = [["float", "", *(f"{100 * first['float'][key]:.2f}" for key in MEASURES), "–"]]
    for setting in SETTINGS:
        for way in WAYS:
            chosen = [r for r in rows if (r["way"], r["setting"]) == (way, setting)]
            if chosen:
                cells = [_spread([r[key] for r in chosen]) for key in MEASURES]
                body.append([setting.upper(), f"{way}, {_how(chosen)}", *cells, f"{chosen[0]['bytes'] / 1e3:.0f}"])
        published = [f"{100 * value:.2f}" for value in PUBLISHED[setting]]
        body.append([setting.upper(), "published by ptq_resnet20 for its wide network", *published, "–"])
    header = ["setting", "way", "accuracy", "precision", "recall", "F1", "kB"]
    return common.table(header, body) + (
        f"\n{training['model']}, trained for {training['epochs']} epochs on {training['training_images']} images; "
        f"{first['count']} test images; precision, recall and F1 are macro averages.\n"
    )


def _how(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    method = f"{first['method']} ({first['iterations']} iterations)" if first["method"] != "none" else "nearest"
    seeds = f"{len(rows)} seeds" if len(rows) > 1 else f"seed {first['seed']}"
    return f"{method}; boundary {first['boundary']}, placement {first['placement']}, {first['images']} images; {seeds}"


def _spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--training", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1005])
    given = parser.parse_args()
    metrics = json.loads((given.training / "metrics.json").read_text(encoding="utf-8"))
    training = {key: metrics[key] for key in ("model", "training_images", "held_out_images", "best_epoch", "seconds")}
    training["epochs"] = len(metrics["epochs"])
    path = common.RESULTS / "trained.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    for setting in given.settings:
        for way in (w for w in given.ways if setting in WAYS[w][2]):
            for seed in given.seeds:
                rows = [r for r in rows if (r["way"], r["setting"], r["seed"]) != (way, setting, seed)]
                rows.append(measure(way, setting, seed, given, training))
                command = "OMP_NUM_THREADS=1 python benchmarks/trained.py --data DATA --training RUN"
                common.write("trained", command, {"training": training, "rows": rows}, text_of(rows, training))


if __name__ == "__main__":
    main()
