"""Six networks of the literature from end to end: built, quantized with a few steps of QDrop, saved, loaded, exported.

    OMP_NUM_THREADS=1 python benchmarks/networks.py --data DATA [--networks resnet18 …] [--settings W4A4 W2A2]

DATA holds imagenet/ (calibration.csv and its images). The weights are random and BatchNorm has the statistics of the
calibration images, so this shows that every step works and what it takes, and says nothing about accuracy. Each row is
saved when it is done.
"""

from __future__ import annotations

import json
import shutil
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import nn

import calibquant
from calibquant import zoo
from calibquant.data import batches
from calibquant.export.session import open_session
from calibquant.pipeline.preparing import open_set
from calibquant.recipe import Recipe, make_recipe

Row = dict[str, Any]
# Parameters by torchvision's documentation, pycls' and timm's table (6.20 million) and, for MNASNet × 2.0, which has no
# published number, by the count of tests/zoo/test_families.py.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "mobilenet_v2": 3_504_872,
    "regnet_x_600mf": 6_196_040,
    "mnasnet2_0": 12_469_944,
}
SETTINGS = ("W4A4", "W2A2")
# Gain of the BatchNorm that ends a residual branch. With 1, and still with 0.2, the untrained ResNet-101 amplifies
# rounding so far that its simulations in float32 and float64 decide differently on 3 of 16 images at W4A4, all margins
# being tiny, and the export is refused. Networks are trained from such small gains too (Goyal et al., arXiv:1706.02677,
# section 5.1).
GAINS = {"resnet101": (".bn3", 0.05)}
IMAGES, ITERATIONS, SEED = 16, 3, 1005


def recipe_of(name: str, setting: str, given: Namespace, weights: Path) -> Recipe:
    return make_recipe({
        "model": {"name": name, "weights": str(weights)},
        "data": {
            "kind": "csv", "root": str(given.data / "imagenet"), "calibration": "calibration.csv",
            "evaluation": "calibration.csv", "preprocess": {"resize": 256, "crop": 224},
        },
        "calibration": {"count": IMAGES, "batch_size": IMAGES},
        "evaluation": {"count": IMAGES, "batch_size": IMAGES},
        "quant": {"weights": {"bits": int(setting[1])}, "activations": {"bits": int(setting[3])}},
        "reconstruct": {"method": "qdrop", "iterations": ITERATIONS, "batch_size": IMAGES},
        "export": {"images": IMAGES},
        "seed": SEED, "threads": given.threads, "runs": str(given.runs),
    })  # fmt: skip


def random_weights(name: str, given: Namespace) -> Path:
    """A file of random weights, and of the BatchNorm statistics that their activations have."""
    path: Path = given.runs / f"{name}-random.safetensors"
    torch.manual_seed(SEED)
    network = zoo.build(name).train()
    ending, gain = GAINS.get(name, ("", 1.0))
    for key, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
            nn.init.constant_(module.weight, gain if key.endswith(ending) else 1.0)
    images = open_set(recipe_of(name, "W4A4", given, path), "calibration")
    with torch.no_grad():
        for batch in batches(images.subset(range(IMAGES)), IMAGES):
            network(batch.images)
    path.parent.mkdir(parents=True, exist_ok=True)
    zoo.save_weights(network, path)
    return path


def measured(name: str, setting: str, given: Namespace) -> Row:
    """One network at one setting."""
    weights = random_weights(name, given)
    recipe, begin = recipe_of(name, setting, given, weights), time.perf_counter()
    run = calibquant.quantize(recipe)
    seconds = time.perf_counter() - begin
    images = next(batches(open_set(recipe, "evaluation").subset(range(IMAGES)), IMAGES)).images
    loaded = calibquant.load(run.folder)
    with torch.inference_mode():
        want, again = run.model(images), loaded(images)
    session = open_session("deploy.onnx", (run.folder / "deploy.onnx").read_bytes(), 1)
    got = session.run(images.numpy())[0]
    parity = json.loads((run.folder / "parity.json").read_text(encoding="utf-8"))
    metrics = run.metrics
    row = {
        "network": name, "setting": setting, "parameters": sum(p.numel() for p in zoo.build(name).parameters()),
        "published": PARAMETERS[name], "placement": metrics["placement"], "boundary": metrics["boundary"],
        "calibration_images": IMAGES, "iterations": ITERATIONS, "seed": SEED, "regularizer": regularizer(run.folder),
        "float_nodes": [r["node"] for r in metrics["coverage"] if r["reason"]], "nodes": len(metrics["coverage"]),
        "units": len(metrics["units"]), "loaded_equal": bool(torch.equal(want, again)),
        "runtime": session.runtime, "deployed_decisions": int((got.argmax(1) == want.numpy().argmax(1)).sum()),
        "deployed_error": float(np.abs(got - want.numpy()).max()), "logit_range": float(want.max() - want.min()),
        "parity": parity["files"],
        "float_bytes": metrics["size"]["float32"], "bytes": metrics["size"]["file"],
        "deploy_bytes": (run.folder / "deploy.onnx").stat().st_size,
        "seconds": round(seconds, 1), "stages": metrics["seconds"], "threads": given.threads,
    }  # fmt: skip
    shutil.rmtree(run.folder)
    weights.unlink()
    return row


def regularizer(folder: Path) -> float | None:
    return calibquant.load_recipe(folder / "recipe.yaml").reconstruct.regularizer


def stored() -> list[Row]:
    path = common.RESULTS / "networks.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def save(row: Row) -> None:
    """Put a row into the results, in place of an older one."""
    known = {(r["network"], r["setting"]): r for r in (*stored(), row)}
    rows = [known[key] for name in PARAMETERS for setting in SETTINGS if (key := (name, setting)) in known]
    header = [
        "network", "parameters", "setting", "units", "loaded", "deploy.onnx: same decisions, largest error of a logit",
        "MB: float, packed, deploy.onnx", "seconds (reconstruction)",
    ]  # fmt: skip
    body = [
        [
            r["network"], f"{r['parameters']:,}" + ("" if r["parameters"] == r["published"] else " (differs)"),
            r["setting"], str(r["units"]), "equal" if r["loaded_equal"] else "differs",
            f"{r['deployed_decisions']}/{IMAGES}, {r['deployed_error']:.2g} of {r['logit_range']:.2g}",
            ", ".join(f"{r[key] / 1e6:.2f}" for key in ("float_bytes", "bytes", "deploy_bytes")),
            f"{r['seconds']:.0f} ({r['stages']['reconstruct']:.0f})",
        ]
        for r in rows
    ]  # fmt: skip
    floats = sum(len(r["float_nodes"]) for r in rows)
    text = common.table(header, body) + (
        f"\nRandom weights (seed {SEED}), {IMAGES} training images of ImageNet at 224 pixels, {ITERATIONS} steps of"
        f" QDrop a unit; placement `integer`, boundary `qdrop`; compute nodes that stay float: {floats}. Parameters are"
        " marked where they differ from the published number. `loaded`: logits of the loaded run and of the network"
        " that was saved, bit for bit. The error of a logit stands beside the range of all logits. In ResNet-101 the"
        " BatchNorm that ends a block has the gain 0.05: with 1 the untrained network amplifies rounding so far that"
        " its export is refused. Times are of"
        f" {rows[0]['threads']} thread on a machine that did other work too.\n"
    )
    command = "OMP_NUM_THREADS=1 python benchmarks/networks.py --data DATA --threads 1"
    common.write("networks", command, {"rows": rows}, text)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=[*PARAMETERS], default=[*PARAMETERS])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    given = parser.parse_args()
    for name in given.networks:
        for setting in given.settings:
            save(measured(name, setting, given))


if __name__ == "__main__":
    main()
