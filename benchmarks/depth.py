"""Time and memory of reconstruction against the depth of the network: ResNet-20, -32, -56 and -110, random weights.

    OMP_NUM_THREADS=1 python benchmarks/depth.py --data DATA [--iterations 20]

DATA holds cifar-10-batches-bin/. The preset `best` at W4A4 with few iterations, 512 images, once with all features in
memory and once with 50 MB of them at most (the rest in mapped files). Each run has a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
from memory import watched

from calibquant.pipeline import quantize
from calibquant.recipe import load_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
DEPTHS = (20, 32, 56, 110)
LIMITS = (4.0, 0.05)  # gigabytes of features in memory
COUNT = 512


def measured(depth: int, limit: float, given: Any) -> dict[str, Any]:
    keys = ["preset=best", f"model.name=cifar_resnet{depth}", f"data.root={given.data / 'cifar-10-batches-bin'}"]
    keys += [f"reconstruct.iterations={given.iterations}", f"reconstruct.network.iterations={given.iterations}"]
    keys += [f"reconstruct.cache_limit={limit}", f"calibration.count={COUNT}", "evaluation.count=50"]
    keys += [f"runs={given.runs}", f"threads={given.threads}", "export.onnx=false"]
    recipe = load_recipe(CONFIGS / "resnet20-cifar10.yaml", keys)
    run, peak = watched(lambda: quantize(recipe))
    units = run.metrics["units"]
    whole = run.metrics["seconds"]["reconstruct"]
    network = sum(u["seconds"] for u in units if u["phase"] == "network")
    learning = sum(u["seconds"] for u in units) - network
    return {
        "depth": depth, "limit": limit, "units": len(units) - 1, "collecting": whole - learning - network,
        "learning": learning, "network": network, "peak": peak,
    }  # fmt: skip


def child(depth: int, limit: float, given: Any) -> dict[str, Any]:
    options = {"data": given.data, "runs": given.runs, "threads": given.threads, "iterations": given.iterations}
    command = [sys.executable, __file__, *(str(part) for key, value in options.items() for part in (f"--{key}", value))]
    command += ["--child", str(depth), str(limit)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def text_of(rows: list[dict[str, Any]], given: Any) -> str:
    header = ["network", "features in memory, GB", "collecting s", "units s", "network s", "s a layer", "peak GB"]
    body = [
        [f"ResNet-{r['depth']}", f"{r['limit']:g}", *(f"{r[key]:.1f}" for key in ("collecting", "learning", "network")),
         f"{(r['collecting'] + r['learning'] + r['network']) / r['depth']:.2f}", f"{r['peak'] / 1e9:.2f}"]
        for r in rows
    ]  # fmt: skip
    text = common.table(header, body)
    for limit in LIMITS:
        found = [r for r in rows if r["limit"] == limit]
        if len(found) < 3:
            continue
        depths = np.array([r["depth"] for r in found], float)
        seconds = np.array([r["collecting"] + r["learning"] + r["network"] for r in found])
        exponent = np.polyfit(np.log(depths), np.log(seconds), 1)[0]
        text += f"\nWith {limit:g} GB the time grows as depth to the power of {exponent:.2f} (1 is linear)."
    return text + (
        f"\n\nW4A4, {COUNT} images of 32 x 32, {given.iterations} iterations of 32 images a unit and as many of 64 of "
        f"the network, {given.threads} thread(s); random weights.\n"
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--child", nargs=2)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measured(int(given.child[0]), float(given.child[1]), given)))
        return
    rows: list[dict[str, Any]] = []
    for limit in LIMITS:
        for depth in DEPTHS:
            rows.append(child(depth, limit, given))
            command = "OMP_NUM_THREADS=1 python benchmarks/depth.py --data DATA"
            common.write("depth", command, {"rows": rows}, text_of(rows, given))


if __name__ == "__main__":
    main()
