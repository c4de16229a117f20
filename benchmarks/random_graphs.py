"""Random small networks: does every exact step of deploy.onnx give the integer executor's codes?

    python benchmarks/random_graphs.py [--count 320] [--seed 0]

Each network is drawn from its seed: size of the image, bits, symmetry, granularity, and 3 to 7 layers from all ops that
have an integer form. It is quantized on min-max ranges, exported, and run in ONNX Runtime. Each step of the executor is
fed the codes that the runtime gave the steps before it. Writes results/random_graphs.json and .md.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from random_networks import RandomNetwork
from torch import Tensor

from calibquant.export.executor import execute
from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import deploy_onnx
from calibquant.export.onnx_files import with_outputs
from calibquant.export.program import Program
from calibquant.export.session import open_session
from calibquant.graph import capture, fold_batch_norm
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Outcome:
    """What the comparison of a network's codes found.

    Args:
        seed, kinds, recipe: which network.
        exact, differing: codes of exact steps, and how many of them differ.
        approximate, near: codes of steps that are computed in float, and how many of them differ by one.
        beyond: steps that differ by more than they may.
        ops: how often each op is a step of codes.
    """

    seed: int
    kinds: list[str]
    recipe: str
    exact: int
    differing: int
    approximate: int
    near: int
    beyond: list[str]
    ops: Counter[str]


def recipe_of(seed: int) -> QuantRecipe:
    """Bits of 2 to 8, symmetry and granularity."""
    pick = random.Random(seed + 10**6).choice
    bits = range(2, 9)
    return QuantRecipe(
        placement="integer",
        residual_bits=pick(bits),
        weights=WeightRecipe(
            bits=pick(bits),
            symmetric=pick((True, False)),
            granularity=pick(("per_channel", "per_tensor")),
            observer="minmax",
        ),
        activations=ActivationRecipe(bits=pick(bits), symmetric=pick((True, False)), observer="minmax"),
    )


def program_of(seed: int) -> tuple[RandomNetwork, QuantRecipe, Program, Tensor]:
    """A drawn network, how it is quantized, its integer program, and images to compare on, (3, C, H, W)."""
    network, recipe = RandomNetwork(seed).eval(), recipe_of(seed)
    images = torch.randn(7, *network.size, generator=torch.Generator().manual_seed(seed))
    graph = fold_batch_norm(capture(network, images[:1]))
    model = QuantModel(graph, make_plan(graph, recipe))
    calibrate_weights(model, recipe)
    calibrate_activations(model, recipe.activations, [images[:4]])
    return network, recipe, make_program(model), images[4:] * 1.2


def compare(seed: int) -> Outcome:
    """Export a drawn network and compare the codes of every step."""
    network, recipe, program, images = program_of(seed)
    coded = [step for step in program.steps if step.grid is not None]
    session = open_session("deploy.onnx", with_outputs(deploy_onnx(program, images), [s.output for s in coded]), 1)
    values = dict(zip(session.outputs, session.run(images.numpy()), strict=True))
    done = execute(program, images.numpy(), keep=True, given={s.output: values[s.output] for s in coded})
    counts, beyond = Counter[str](), []
    for step in coded:
        difference = np.abs(done.values[step.output].astype(int) - values[step.output])
        loose = step.output in done.approximate
        counts["approximate" if loose else "exact"] += difference.size
        counts["near" if loose else "differing"] += int((difference > 0).sum())
        if difference.max(initial=0) > loose:
            beyond.append(f"{step.output} ({step.op})")
    w, a = recipe.weights, recipe.activations
    name = f"W{w.bits}A{a.bits} residual {recipe.residual_bits} {w.granularity}{' symmetric' if w.symmetric else ''}"
    ops = Counter(step.op for step in coded)
    return Outcome(
        seed,
        network.kinds,
        name,
        counts["exact"],
        counts["differing"],
        counts["approximate"],
        counts["near"],
        beyond,
        ops,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.time()
    torch.set_num_threads(1)
    outcomes = [compare(seed) for seed in range(given.seed, given.seed + given.count)]
    write(outcomes, time.time() - started)


def write(outcomes: list[Outcome], seconds: float) -> None:
    """The results as JSON and Markdown."""
    total = {key: sum(getattr(o, key) for o in outcomes) for key in ("exact", "differing", "approximate", "near")}
    ops, kinds = sum((o.ops for o in outcomes), Counter[str]()), Counter(kind for o in outcomes for kind in o.kinds)
    faults = [{"seed": o.seed, "recipe": o.recipe, "kinds": o.kinds, "steps": o.beyond} for o in outcomes if o.beyond]
    result = {
        "networks": len(outcomes), "onnxruntime": onnxruntime.__version__, "torch": torch.__version__,
        "seconds": round(seconds),
        **total, "faults": faults, "steps": dict(ops.most_common()), "layers": dict(kinds.most_common()),
    }  # fmt: skip
    (RESULTS / "random_graphs.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Random networks: codes of deploy.onnx against the integer executor", "",
        f"`python benchmarks/random_graphs.py --count {len(outcomes)}`: {len(outcomes)} networks, "
        f"ONNX Runtime {onnxruntime.__version__}, {seconds:.0f} s on one thread.", "",
        "| steps | codes | differ | by more than one |", "|---|---|---|---|",
        f"| with an exact integer form | {total['exact']:,} | {total['differing']:,} | |",
        f"| computed in float | {total['approximate']:,} | {total['near']:,} | {len(faults)} networks |", "",
        "Steps: " + ", ".join(f"{op} {count}" for op, count in ops.most_common()) + ".", "",
        "Layers drawn: " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()) + ".",
    ]  # fmt: skip
    (RESULTS / "random_graphs.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("networks", *total, "faults", "seconds")}, indent=1))


if __name__ == "__main__":
    main()
