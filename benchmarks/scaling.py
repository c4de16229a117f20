"""Throughput of quantization-aware training in one process and two: ResNet-20 on CIFAR-10 at W4A4, on this machine.

    python benchmarks/scaling.py --data DATA [--steps 30] [--rounds 3]

DATA holds weights/ and cifar-10-batches-bin/. Images a second of the steps alone; the ways take turns, so that a
ratio compares runs of the same minutes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import common

CONFIG = Path(__file__).parents[1] / "configs" / "qat" / "resnet20-w4a4.yaml"
WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
BATCH = 128
COMMAND = "import sys; from calibquant.cli import main; sys.exit(main())"


def rate(processes: int, threads: int, given: Any) -> float:
    """Images a second."""
    keys = [
        "finetune", str(CONFIG), "--json", f"model.weights={given.data / 'weights' / 'resnet20-12fca82f.th'}",
        f"data.root={given.data / 'cifar-10-batches-bin'}", "reconstruct.method=none", "export.onnx=false",
        "calibration.count=64", "evaluation.count=50", f"finetune.iterations={given.steps}", f"threads={threads}",
        f"finetune.batch_size={BATCH}", f"runs={given.runs / 'scaling'}", "device=cpu",
    ]  # fmt: skip
    script = given.runs / "scaling.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(COMMAND + "\n", encoding="utf-8")
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *many, str(script), *keys], env=environment, stdout=subprocess.PIPE, check=True
    )
    (epoch,) = json.loads(done.stdout)["finetune"]["epochs"]
    return given.steps * BATCH / float(epoch["seconds"])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(given.rounds):
        for name, (processes, threads) in WAYS.items():
            found[name].append(rate(processes, threads, given))
    first = next(iter(found.values()))
    body = [
        [name, f"{statistics.median(rates):.0f}",
         f"{statistics.median(r / f for r, f in zip(rates, first, strict=True)):.2f}"]
        for name, rates in found.items()
    ]  # fmt: skip
    text = common.table(["processes", "images a second", "of one thread's"], body) + (
        f"\nResNet-20 on CIFAR-10 at W4A4, batches of {BATCH} in all, {given.steps} steps a run, median of "
        f"{given.rounds} rounds; {os.cpu_count()} cores, gloo.\n"
    )
    common.write("scaling", "python benchmarks/scaling.py --data DATA", {"rates": found}, text)


if __name__ == "__main__":
    main()
