"""Gram rounding against nearest rounding and AdaRound, and as the start of QDrop: ResNet-20 on CIFAR-10.

    python benchmarks/gram.py --data DATA

DATA holds weights/resnet20-12fca82f.th and cifar-10-batches-bin/. The first 1,024 training images; otherwise the
recipe's defaults. All methods of a setting start from the same calibrated network, one after another in one process, so
their times compare; processor time is what a busy machine changes least. What was done is kept in --runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from calibquant.data import batches
from calibquant.numerics.affine import QTensor
from calibquant.parallel import set_threads
from calibquant.pipeline.measuring import measure
from calibquant.pipeline.preparing import Prepared, prepare
from calibquant.pipeline.reporting import Silent
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, fit_biases, make_plan
from calibquant.recipe import Recipe, load_recipe
from calibquant.reconstruction import reconstruct, round_weights

COMMAND = "python benchmarks/gram.py --data DATA"
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
SEEDS = (1005, 1006, 1007)
State = tuple[dict[str, QTensor], dict[str, tuple[Tensor | None, Tensor]]]


class Bench:
    """A calibrated network that methods are tried on."""

    def __init__(self, data: Path, weight_bits: int, activation_bits: int) -> None:
        self.recipe: Recipe = load_recipe(ROOT / "configs" / "resnet20-cifar10.yaml", [
            f"model.weights={data / 'weights' / 'resnet20-12fca82f.th'}", f"data.root={data / 'cifar-10-batches-bin'}",
            "calibration.strategy=first", f"quant.weights.bits={weight_bits}",
            f"quant.activations.bits={activation_bits}",
        ])  # fmt: skip
        self.prepared: Prepared = prepare(self.recipe, None, None, None)
        self.model = QuantModel(self.prepared.teacher, make_plan(self.prepared.teacher, self.recipe.quant))
        calibrate_weights(self.model, self.recipe.quant)
        images = (batch.images for batch in batches(self.prepared.images, 64))
        calibrate_activations(self.model, self.recipe.quant.activations, images)
        fit_biases(self.model.biases())
        self.images = torch.cat(list(self.prepared.inputs(64)))
        self.nearest = self.state()

    def state(self) -> State:
        weights = {name: q.get() for name, q in self.model.weight_quantizers.items()}
        return weights, {name: (q.scale, q.zero_point) for name, q in self.model.activation_quantizers.items()}

    def start(self, state: State) -> None:
        for name, value in state[0].items():
            self.model.weight_quantizers[name].set(value)
        for name, (scale, zero_point) in state[1].items():
            quantizer = self.model.activation_quantizers[name]
            quantizer.scale, quantizer.zero_point = scale, zero_point

    def gram(self) -> None:
        list(round_weights(self.model, self.images, self.recipe.reconstruct, self.recipe.seed))

    def learn(self, method: str, iterations: int, seed: int) -> None:
        settings = self.recipe.reconstruct.model_copy(update={"method": method, "iterations": iterations})
        list(reconstruct(self.model, self.images, settings, seed))

    def row(self, method: str, state: State, work: Callable[[], None] | None, **more: Any) -> dict[str, Any]:
        """What a method makes of the network in a state, and its time."""
        self.start(state)
        wall, processor = time.perf_counter(), time.process_time()
        if work is not None:
            work()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        fit_biases(self.model.biases())
        images = self.prepared.evaluation
        assert images is not None
        result = measure(self.recipe, self.prepared.mount(self.model), images, CPU, Silent())
        scores = result.scores.to_dict()
        return {
            "setting": self.recipe.setting, "method": method, "top1": scores["top1"], "processor_seconds": processor,
            "seconds": wall, **more,
        }  # fmt: skip


def rounding(data: Path, bits: int) -> list[dict[str, Any]]:
    """Nearest, Gram and AdaRound at 8-bit activations."""
    bench = Bench(data, bits, 8)
    return [
        bench.row("nearest", bench.nearest, None),
        bench.row("gram", bench.nearest, bench.gram),
        bench.row(
            "adaround, 2,000 iterations", bench.nearest, lambda: bench.learn("adaround", 2000, bench.recipe.seed)
        ),
    ]


def beginning(data: Path) -> list[dict[str, Any]]:
    """QDrop at W2A4 with few iterations, from nearest and from Gram rounding."""
    bench = Bench(data, 2, 4)
    rows = [bench.row("nearest", bench.nearest, None), bench.row("gram", bench.nearest, bench.gram)]
    starts = {"nearest": bench.nearest, "gram": bench.state()}
    for seed in SEEDS:
        for name, state in starts.items():
            work = lambda: bench.learn("qdrop", 200, seed)  # noqa: B023, E731
            rows.append(bench.row(f"qdrop, 200 iterations, from {name}", state, work, seed=seed))
    return rows


def page(parts: dict[str, list[dict[str, Any]]]) -> str:
    """The tables, and what Gram rounding closes of the gap between nearest rounding and AdaRound."""
    header = ["setting", "method", "seed", "top-1 %", "processor seconds", "seconds"]
    lines = [
        [
            r["setting"], r["method"], str(r.get("seed", "–")), f"{100 * r['top1']:.2f}",
            f"{r['processor_seconds']:.1f}", f"{r['seconds']:.1f}",
        ]
        for rows in parts.values()
        for r in rows
    ]  # fmt: skip
    text = [
        "ResNet-20, CIFAR-10: 10,000 test images, first 1,024 training images; placement integer, boundary qdrop,",
        "asymmetric per-channel weights; one thread. Seconds are of the rounding alone.\n",
        common.table(header, lines),
    ]
    for rows in parts.values():
        nearest, gram, *other = rows
        if other and other[0]["method"].startswith("adaround"):
            closed = (gram["top1"] - nearest["top1"]) / (other[0]["top1"] - nearest["top1"])
            times = gram["processor_seconds"] / other[0]["processor_seconds"]
            text.append(
                f"{gram['setting']}: Gram rounding closes {100 * closed:.0f} % of the gap from nearest rounding to "
                f"AdaRound in {100 * times:.1f} % of its processor time ({gram['seconds'] / other[0]['seconds']:.3f} "
                "of its time).\n"
            )
    return "\n".join(text)


def main() -> None:
    given = common.parser(__doc__).parse_args()
    set_threads(1)
    made: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "W3A8": lambda: rounding(given.data, 3),
        "W2A8": lambda: rounding(given.data, 2),
        "W2A4": lambda: beginning(given.data),
    }
    parts: dict[str, list[dict[str, Any]]] = {}
    for name, make in made.items():
        kept = given.runs / "gram" / f"{name}.json"
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(make()), encoding="utf-8")
        parts[name] = json.loads(kept.read_text(encoding="utf-8"))
        common.write("gram", COMMAND, {"parts": parts}, page(parts))


if __name__ == "__main__":
    main()
