"""The same codes on every processor: what deploy.onnx computes, what the 7-bit reach of weights costs, and its speed.

    OMP_NUM_THREADS=1 python benchmarks/processors.py --data DATA --files FOLDER
        [--part codes|cost|speed] [--networks ResNet-20 …] [--settings W8A8 …]

DATA holds weights/, imagenet/ and cifar-10-batches-bin/. Rows are kept in the results as they are made, with what the
processor's 8-bit kernels do ("saturating" sums of two products, or "exact"); rows that are there are not made again.

codes  every code of deploy.onnx in ONNX Runtime on 200 evaluation images against the integer executor, each step fed
       the runtime's own codes, and the executor against itself in the mode that saturates as x86 without VNNI does
cost   preset int8 with quant.weights.reach auto and full: three draws of calibration images, paired on the images
speed  float.onnx, int8 with full reach and with auto, on one thread, in turns
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from given_networks import efficientnet_lite0, resnet8
from torch import nn

import calibquant
from calibquant.data import batches
from calibquant.export.executor import Execution, execute
from calibquant.export.lowering import make_program
from calibquant.export.onnx_files import with_outputs
from calibquant.export.program import Program
from calibquant.export.session import open_session
from calibquant.pipeline import Run
from calibquant.pipeline.preparing import open_set
from calibquant.recipe import Recipe, load_recipe, make_recipe
from calibquant.studies.bench import measure
from calibquant.studies.digits import FIELDS, train_digits
from calibquant.studies.paired import spread

ROOT, NAME = Path(__file__).parents[1], "processors"
SETTINGS = ("W8A8", "W4A8", "W4A4", "W2A2")
CODES, CHUNK = 200, 8  # evaluation images whose codes are compared; at a time
DRAWS = (1005, 1006, 1007)
ROUNDS, SECONDS = 20, 0.05
CIFAR, IMAGENET = "resnet20-cifar10.yaml", "mobilenetv2-imagenet.yaml"
LITE = tuple(
    f"data.{kind}.{key}=[{value}]"
    for kind in ("preprocess", "calibration_preprocess")
    for key, value in (("mean", ",".join(["0.498039"] * 3)), ("std", ",".join(["0.501961"] * 3)))
)
TORCH = tuple(
    f"data.{kind}.{key}={value}"
    for kind in ("preprocess", "calibration_preprocess")
    for key, value in (("mean", "[0.485,0.456,0.406]"), ("std", "[0.229,0.224,0.225]"))
)
RAW = (
    "data.preprocess.mean=[0,0,0]",
    "data.preprocess.std=[0.00392156862745098,0.00392156862745098,0.00392156862745098]",
)
NETWORKS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # configuration, weights, overrides
    "digits": ("digits.yaml", "", ()),
    "ResNet-8": (CIFAR, "resnet8_cifar10_mlperf_tiny.safetensors", RAW),
    "ResNet-20": (CIFAR, "resnet20-12fca82f.th", ()),
    "SqueezeNet 1.1": ("squeezenet-imagenet.yaml", "squeezenet1_1_gluon_fp32.pt", ()),
    "MobileNetV2 (TensorFlow)": (IMAGENET, "mobilenetv2_tf_1.0_224_fp32.pt", ()),
    "MobileNetV2 (torchvision)": (
        IMAGENET, "mobilenetv2_torchvision_bn_fp16.safetensors", ("model.options.padding=torch", *TORCH),
    ),
    "EfficientNet-Lite0": (IMAGENET, "efficientnet_lite0_fp16.safetensors", LITE),
}  # fmt: skip
LIVE = {"ResNet-8": resnet8, "EfficientNet-Lite0": efficientnet_lite0}
Row = dict[str, Any]


def recipe_of(given: Namespace, network: str, setting: str, *extra: str) -> Recipe:
    """W8A8 is the preset int8; fewer bits are rounded to nearest, with the ends at 8 bits (boundary qdrop)."""
    bits = ["preset=int8"] if setting == "W8A8" else ["preset=nearest"]
    bits += [
        f"quant.weights.bits={setting[1]}",
        f"quant.activations.bits={setting[3]}",
        f"runs={given.files}",
        "threads=1",
    ]
    if network == "digits":
        weights = given.files / "digits.safetensors"
        if not weights.is_file():
            train_digits(weights, DRAWS[0])
        return make_recipe(FIELDS, [*bits, f"model.weights={weights}", *extra])
    config, weights, own = NETWORKS[network]
    small = "cifar10" in config
    where = [f"data.root={given.data / ('cifar-10-batches-bin' if small else 'imagenet')}"]
    where += [] if network in LIVE else [f"model.weights={given.data / 'weights' / weights}"]
    count = f"calibration.count={1024 if small else 200}"
    return load_recipe(ROOT / "configs" / config, [*where, *own, *bits, count, *extra])


def network_of(given: Namespace, name: str) -> nn.Module | None:
    """A network that the recipe does not build; None leaves it to the recipe."""
    return LIVE[name](given.data / "weights" / NETWORKS[name][1]) if name in LIVE else None


def quantized(given: Namespace, name: str, setting: str, *extra: str) -> tuple[Recipe, Run]:
    recipe, network = recipe_of(given, name, setting, *extra), network_of(given, name)
    if network is None:
        return recipe, calibquant.quantize(recipe)
    images = (open_set(recipe, "calibration"), open_set(recipe, "evaluation"))
    return recipe, calibquant.quantize(recipe, network, *images)


# --- codes ------------------------------------------------------------------------------------------------------------


def codes_row(given: Namespace, name: str, setting: str) -> Row:
    recipe, run = quantized(given, name, setting)
    program, m = make_program(run.model), run.metrics
    found = [_compared(program, (run.folder / "deploy.onnx").read_bytes(), x) for x in _images(recipe)]
    steps = {s.output: s for s in program.steps}
    approximate = sorted(set().union(*(f["approximate"] for f in found)))
    return {
        "float": m["float"]["top1"], "simulation": m["quantized"]["top1"], "deployed": m["deployed"]["top1"],
        "agreement": m["deployed"]["agreement"], "images": m["quantized"]["count"],
        "code_images": sum(f["images"] for f in found), "codes": sum(f["codes"] for f in found),
        "differing": sum(f["differing"] for f in found), "float_codes": sum(f["float_codes"] for f in found),
        "float_differing": sum(f["float_differing"] for f in found), "largest": max(f["largest"] for f in found),
        "saturating_differing": sum(f["saturating"] for f in found),
        "approximate": [f"{name} ({steps[name].op})" for name in approximate], "exact_on": m["parity"]["exact_on"],
    }  # fmt: skip


def _images(recipe: Recipe) -> Iterator[np.ndarray]:
    images = open_set(recipe, "evaluation")
    for batch in batches(images, CHUNK, range(min(CODES, len(images)))):
        yield batch.images.numpy()


def _compared(program: Program, data: bytes, images: np.ndarray) -> Row:
    names = [step.output for step in program.steps if step.grid is not None]
    session = open_session("deploy.onnx", with_outputs(data, names), 1)
    values = dict(zip(session.outputs, session.run(images), strict=True))
    own = {name: values[name] for name in names}
    exact = execute(program, images, keep=True, given=own)
    paired = execute(program, images, keep=True, given=own, saturating=True)
    row: Row = {"images": len(images), "approximate": exact.approximate, "largest": 0}
    row |= dict.fromkeys(("codes", "differing", "float_codes", "float_differing", "saturating"), 0)
    for name in names:
        difference = _difference(exact, own, name)
        kind = "float_" if name in exact.approximate else ""
        row[f"{kind}codes"] += difference.size
        row[f"{kind}differing"] += int(np.count_nonzero(difference))
        row["largest"] = max(row["largest"], int(difference.max(initial=0)))
        row["saturating"] += int(np.count_nonzero(_difference(exact, paired.values, name)))
    return row


def _difference(done: Execution, other: Any, name: str) -> np.ndarray:
    want = done.values[name].astype(np.int16)
    return np.abs(want - other[name].astype(np.int16).reshape(want.shape))


# --- cost and speed ---------------------------------------------------------------------------------------------------


def cost_row(given: Namespace, name: str, draw: int) -> Row:
    """int8 with both reaches, from the same draw."""
    runs = {}
    for reach in ("full", "auto"):
        extra = (f"seed={draw}", f"quant.weights.reach={reach}", "export.onnx=false")
        _, runs[reach] = quantized(given, name, "W8A8", *extra)
    right = {reach: run.evaluation.predictions == run.evaluation.labels for reach, run in runs.items()}
    return {
        "images": len(right["full"]), "float": runs["full"].metrics["float"]["top1"],
        **{reach: run.metrics["quantized"]["top1"] for reach, run in runs.items()},
        **{f"agreement_{reach}": run.metrics["quantized"]["agreement"] for reach, run in runs.items()},
        "only_full": np.flatnonzero(right["full"] & ~right["auto"]).tolist(),
        "only_auto": np.flatnonzero(right["auto"] & ~right["full"]).tolist(),
    }  # fmt: skip


def speed_row(given: Namespace, name: str, batch: int) -> Row:
    files: dict[str, bytes] = {}
    for reach in ("full", "auto"):
        recipe, run = quantized(
            given, name, "W8A8", f"quant.weights.reach={reach}", "export.evaluate=false", "evaluation.count=50",
            "export.images=8", "quant.weights.rounding=nearest", "quant.bias_correction=none",
        )  # fmt: skip
        files[reach] = _deploy(run, recipe)
        files["float"] = (run.folder / "float.onnx").read_bytes()
    sessions = {key: open_session(key, data, 1) for key, data in files.items()}
    images = np.repeat(next(_images(recipe))[:1], batch, axis=0)
    times: dict[str, list[float]] = {}
    for times in measure(sessions, images, ROUNDS, SECONDS):  # noqa: B007
        pass
    base = np.array(times["float"])
    return {
        key: [float(q) for q in np.percentile(base / np.array(values), (25, 50, 75))] for key, values in times.items()
    }


def _deploy(run: Run, recipe: Recipe) -> bytes:
    """deploy.onnx, also where this processor saturates and the run therefore left it out."""
    from calibquant.export.onnx_deploy import deploy_onnx

    return deploy_onnx(make_program(run.model), torch.from_numpy(next(_images(recipe))))


# --- results ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--files", type=Path, required=True, help="folder for run folders")
    parser.add_argument("--part", action="append", choices=("codes", "cost", "speed"))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    given = parser.parse_args()
    given.files.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    kernels = common.processor()["8-bit kernels"]
    path = common.RESULTS / f"{NAME}.json"
    rows: dict[str, Row] = json.loads(path.read_text())["rows"] if path.is_file() else {}
    processors: dict[str, Any] = json.loads(path.read_text())["processors"] if path.is_file() else {}
    processors[kernels] = common.processor()
    for part in given.part or ("codes", "cost", "speed"):
        for key, make in _cells(part, given):
            whole = f"{part} | {key}" if part == "cost" else f"{part} | {key} | {kernels}"
            if whole not in rows:
                print(whole, flush=True)
                rows[whole] = make()
                _write(rows, processors)
    _write(rows, processors)


def _cells(part: str, given: Namespace) -> Iterator[tuple[str, Any]]:
    for name in given.networks:
        if part == "codes":
            for setting in given.settings:
                yield f"{name} | {setting}", lambda n=name, s=setting: codes_row(given, n, s)
        elif part == "cost" and name != "digits":
            for draw in DRAWS:
                yield f"{name} | {draw}", lambda n=name, d=draw: cost_row(given, n, d)
        elif part == "speed" and name != "digits":
            for batch in (1, 8):
                yield f"{name} | {batch}", lambda n=name, b=batch: speed_row(given, n, b)


def _write(rows: dict[str, Row], processors: dict[str, Any]) -> None:
    command = "OMP_NUM_THREADS=1 python benchmarks/processors.py --data DATA --files FOLDER"
    text = _codes_table(rows) + _cost_table(rows) + _speed_table(rows)
    kinds = "\n".join(f"- {kind}: {json.dumps(facts)}" for kind, facts in processors.items())
    common.write(NAME, command, {"processors": processors, "rows": rows}, f"Processors:\n\n{kinds}\n\n{text}")


def _of(rows: dict[str, Row], part: str) -> Iterator[tuple[list[str], Row]]:
    for key, row in rows.items():
        kind, *words = key.split(" | ")
        if kind == part:
            yield words, row


def _codes_table(rows: dict[str, Row]) -> str:
    header = ["network", "setting", "8-bit kernels", "images", "simulation", "deploy.onnx", "code images",
              "codes of exact steps", "differ", "codes of float steps", "differ", "by at most",
              "differ in the saturating mode"]  # fmt: skip
    lines = [
        [*words, str(r["images"]), f"{100 * r['simulation']:.2f}", f"{100 * r['deployed']:.2f}", str(r["code_images"]),
         f"{r['codes']:,}", f"{r['differing']:,}", f"{r['float_codes']:,}", f"{r['float_differing']:,}",
         str(r["largest"]), f"{r['saturating_differing']:,}"]
        for words, r in _of(rows, "codes")
    ]  # fmt: skip
    return "## Codes\n\nTop-1 in percent. W8A8 is the preset int8.\n\n" + common.table(header, lines) + "\n"


def _cost_table(rows: dict[str, Row]) -> str:
    by_network: dict[str, list[Row]] = {}
    for (name, _), row in _of(rows, "cost"):
        by_network.setdefault(name, []).append(row)
    lines = []
    for name, own in by_network.items():
        differences = [100 * (r["auto"] - r["full"]) for r in own]
        of = spread(differences)
        lines.append([
            name, str(own[0]["images"]), f"{100 * own[0]['float']:.2f}", str(len(own)),
            f"{100 * np.mean([r['full'] for r in own]):.2f}", f"{100 * np.mean([r['auto'] for r in own]):.2f}",
            f"{of.mean:+.2f}", _interval(own), "–" if of.sd is None else f"{of.sd:.2f}",
            f"{100 * np.mean([r['agreement_full'] for r in own]):.2f}",
            f"{100 * np.mean([r['agreement_auto'] for r in own]):.2f}",
        ])  # fmt: skip
    header = ["network", "images", "float", "draws", "reach full", "reach auto", "difference", "95 % interval",
              "sd of draws", "agreement full", "agreement auto"]  # fmt: skip
    told = (
        "Preset int8 (boundary none, placement integer, Gram rounding, empirical bias correction), top-1 in percent. "
        "The interval is over the images: each image's difference is the mean over the draws.\n\n"
    )
    return "## What the 7-bit reach costs\n\n" + told + common.table(header, lines) + "\n"


def _interval(rows: list[Row]) -> str:
    """95 % interval of the mean difference over the images, each image's difference a mean over the draws."""
    difference = np.zeros(rows[0]["images"])
    for row in rows:
        difference[row["only_auto"]] += 1 / len(rows)
        difference[row["only_full"]] -= 1 / len(rows)
    half = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
    return f"{100 * (difference.mean() - half):+.2f} to {100 * (difference.mean() + half):+.2f}"


def _speed_table(rows: dict[str, Row]) -> str:
    lines = [
        [*words, *(f"{r[key][1]:.2f} ({r[key][0]:.2f}–{r[key][2]:.2f})" for key in ("full", "auto"))]
        for words, r in _of(rows, "speed")
    ]
    header = ["network", "batch", "8-bit kernels", "reach full", "reach auto"]
    return "## Speed, times float, one thread (median and quartiles)\n\n" + common.table(header, lines)


if __name__ == "__main__":
    main()
