"""Peak memory of whole runs against what --dry-run predicts, and what keeping freed memory saves.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --data DATA [--cases NAME …]

DATA holds weights/, imagenet/ and cifar-10-batches-bin/. Each run has a process of its own. Memory is what the process
holds beside torch itself (RssAnon, looked at every 20 ms), so that mapped files, which the system can take back, do not
count.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import common
import torch

from calibquant import parallel
from calibquant.pipeline import dry_run, quantize
from calibquant.recipe import Recipe, load_recipe

Result = TypeVar("Result")
CONFIGS = Path(__file__).parents[1] / "configs"
IMAGENET = ("calibration.batch_size=16", "evaluation.count=50", "export.onnx=false")
RECONSTRUCTED = ("reconstruct.method=qdrop", "reconstruct.iterations=20", "quant.weights.bits=4",
                 "quant.activations.bits=4")  # fmt: skip
CASES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "ResNet-20, nearest": ("resnet20-cifar10.yaml", "resnet20-12fca82f.th", ".", ("export.onnx=false",)),
    "ResNet-20, qdrop": (
        "resnet20-cifar10.yaml", "resnet20-12fca82f.th", ".", ("export.onnx=false", *RECONSTRUCTED),
    ),
    "ResNet-20, trained further for 20 steps": (
        "qat/resnet20-w4a4.yaml", "resnet20-12fca82f.th", "cifar-10-batches-bin",
        ("export.onnx=false", "reconstruct.method=none", "evaluation.count=500", "finetune.iterations=20"),
    ),
    "MobileNetV2, nearest": (
        "mobilenetv2-imagenet.yaml", "mobilenetv2_tf_1.0_224_fp32.pt", "imagenet", ("calibration.count=64", *IMAGENET),
    ),
    "MobileNetV2, qdrop, 64 images": (
        "mobilenetv2-imagenet.yaml", "mobilenetv2_tf_1.0_224_fp32.pt", "imagenet",
        ("calibration.count=64", *RECONSTRUCTED, *IMAGENET),
    ),
    "SqueezeNet 1.1, qdrop, 256 images": (
        "squeezenet-imagenet.yaml", "squeezenet1_1_gluon_fp32.pt", "imagenet",
        ("calibration.count=256", *RECONSTRUCTED, *IMAGENET),
    ),
    "ResNet-101 (random weights), qdrop, 256 images": (
        "squeezenet-imagenet.yaml", "", "imagenet",
        ("model.name=resnet101", "calibration.count=256", *RECONSTRUCTED, *IMAGENET),
    ),
}  # fmt: skip
LONG = ("ResNet-101 (random weights), qdrop, 256 images",)  # not run with glibc's defaults


def recipe_of(name: str, given: Any, keeping: bool) -> Recipe:
    config, weights, root, options = CASES[name]
    keys = [f"data.root={given.data / root}", f"runs={given.runs}", f"threads={given.threads}", *options]
    keys += [f"model.weights={given.data / 'weights' / weights}"] if weights else []
    if not keeping:
        setattr(parallel, "_keep_freed_memory", lambda: None)  # noqa: B010 - what glibc does by itself
    return load_recipe(CONFIGS / config, keys)


def measured(name: str, given: Any, keeping: bool) -> dict[str, Any]:
    """A run in this process."""
    recipe = recipe_of(name, given, keeping)
    predicted = dry_run(recipe) if keeping else None
    begin = time.process_time()
    run, peak = watched(lambda: quantize(recipe))
    seconds = time.process_time() - begin
    units = run.metrics["units"]
    return {
        "case": name, "peak": peak, "predicted": predicted and predicted.peak_bytes,
        "predicted_seconds": predicted and predicted.seconds, "cpu_seconds": seconds, "units": len(units),
        "learning_seconds": sum(u["seconds"] for u in units), "iterations": recipe.reconstruct.iterations,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def watched(action: Callable[[], Result]) -> tuple[Result, int]:
    """What it returns, and by how many bytes the process grew meanwhile at most."""
    before, stop, peak = anonymous(), threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = action()
    finally:
        stop.set()
        watcher.join()
    return result, peak[0] - before


def anonymous() -> int:
    """Bytes of memory of this process that are no file's."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1000


def child(name: str, given: Any, keeping: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--data", str(given.data), "--runs", str(given.runs), "--threads",
               str(given.threads), "--child", name, "--cases", "keeping" if keeping else "giving back"]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def text_of(rows: list[dict[str, Any]]) -> str:
    header = ["run", "peak GB", "predicted GB", "CPU seconds", "with glibc's defaults: CPU seconds", "peak GB",
              "s an iteration of all units"]  # fmt: skip
    lines = []
    for row in rows:
        kept, given_back = row["kept"], row["given_back"]
        before = ["–", "–"]
        if given_back:
            before = [f"{given_back['cpu_seconds']:.0f}", f"{given_back['peak'] / 1e9:.2f}"]
        each = f"{kept['learning_seconds'] / kept['iterations']:.2f}" if kept["units"] else "–"
        lines.append([
            row["case"], f"{kept['peak'] / 1e9:.2f}", f"{kept['predicted'] / 1e9:.2f}", f"{kept['cpu_seconds']:.0f}",
            *before, each,
        ])  # fmt: skip
    return common.table(header, lines) + (
        f"\n{rows[0]['kept']['threads']} thread(s); W4A4 (ImageNet networks without reconstruction: W8A8); "
        "20 iterations a unit, batch 32; training in batches of 128, in bfloat16 where the processor has it.\n"
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=[*CASES])
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measured(given.child, given, given.cases == ["keeping"])))
        return
    path = common.RESULTS / "memory.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    for name in given.cases:
        row = {"case": name, "kept": child(name, given, True)}
        row["given_back"] = None if name in LONG else child(name, given, False)
        known = [*(r for r in known if r["case"] != name), row]
        known.sort(key=lambda r: [*CASES].index(r["case"]))
        command = "OMP_NUM_THREADS=1 python benchmarks/memory.py --data DATA"
        common.write("memory", command, {"rows": known}, text_of(known))


if __name__ == "__main__":
    main()
