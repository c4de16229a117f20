"""What choosing calibration images costs, and whether `judge` knows which sets are good; ResNet-20 on CIFAR-10.

    python benchmarks/selecting.py --data DATA [--studies cost judge]

DATA holds weights/ and cifar-10-batches-bin/. `cost`: each strategy, 1,024 of 5,000 to 50,000 images, in a process of
its own; time of the whole choice, scoring included, and the process's peak memory, torch included. `judge`: 30 sets of
256 images of mixed quality, each judged and quantized with `fast` at W2A2; the rank correlation of score and accuracy,
and where deliberately bad sets of 1,024 images stand among random ones. What was done is kept in the results, so that
the same command goes on.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

from calibquant.parallel import set_threads
from calibquant.pipeline import quantize, select
from calibquant.pipeline.preparing import open_candidates, open_set
from calibquant.recipe import Recipe, load_recipe
from calibquant.selection import Pool, judge
from calibquant.selection import select as choose

CONFIG = Path(__file__).parents[1] / "configs" / "resnet20-cifar10.yaml"
STRATEGIES = ("random", "class-balanced", "captq", "k-center", "facility", "herding", "moments", "tail")
SIZES = (5_000, 15_000, 50_000)
COUNT, SMALL = 1024, 256
SEED = 1005
# Of each strategy so many sets; then sets that lack classes, and bad ones.
MIXED = {"random": 6, "class-balanced": 3, "moments": 3, "herding": 3, "captq": 2, "rough": 2, "hard": 2, "easy": 1,
         "tail": 1, "k-center": 1}  # fmt: skip
FEW_CLASSES = (7, 4, 2)


def recipe_of(given: Any, *keys: str) -> Recipe:
    weights = given.data / "weights" / "resnet20-12fca82f.th"
    own = [f"model.weights={weights}", f"data.root={given.data / 'cifar-10-batches-bin'}", f"threads={given.threads}"]
    return load_recipe(CONFIG, [*own, f"runs={given.runs / 'selecting'}", "export.onnx=false", *keys])


def cost(strategy: str, size: int, given: Any) -> dict[str, Any]:
    """One choice, in this process."""
    keys = (f"calibration.strategy={strategy}", f"calibration.pool={size}", f"calibration.count={COUNT}")
    recipe = recipe_of(given, *keys)
    set_threads(given.threads)
    begin = time.perf_counter()
    manifest = select(recipe)
    seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert len({row.path for row in manifest.rows}) == COUNT
    return {"strategy": strategy, "size": size, "seconds": seconds, "peak": peak}


def child(strategy: str, size: int, given: Any) -> dict[str, Any]:
    options = {"data": given.data, "runs": given.runs, "threads": given.threads}
    command = [sys.executable, __file__, *(str(part) for key, value in options.items() for part in (f"--{key}", value))]
    done = subprocess.run([*command, "--child", strategy, str(size)], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def mixed_sets(pool: Pool) -> list[tuple[str, list[int]]]:
    """Names and rows of 30 sets of SMALL images."""
    sets = [
        (f"{name} {seed}", choose(_part(pool, seed), SMALL, name, seed).rows)
        for name, number in MIXED.items()
        for seed in range(number)
    ]
    found = [(name, [_part_rows(pool, int(name.split()[-1]))[r] for r in rows]) for name, rows in sets]
    random = np.random.default_rng(SEED)
    for classes in FEW_CLASSES:
        rows = np.flatnonzero(pool.classes < classes)
        found.append((f"{classes} classes", random.permutation(rows)[:SMALL].tolist()))
    return found + bad_sets(pool, SMALL)


def bad_sets(pool: Pool, count: int) -> list[tuple[str, list[int]]]:
    """One class; only dark images; copies of ten."""
    random = np.random.default_rng(SEED)
    ten = random.permutation(len(pool))[:10]
    return [
        ("one class", random.permutation(np.flatnonzero(pool.classes == 3))[:count].tolist()),
        ("dark", np.argsort(pool.values["brightness"])[:count].tolist()),
        ("copies of ten", np.resize(ten, count).tolist()),
    ]


def _part_rows(pool: Pool, seed: int) -> list[int]:
    """Half of the pool, another for each seed: so that a strategy gives different sets."""
    return np.sort(np.random.default_rng([SEED, seed]).permutation(len(pool))[: len(pool) // 2]).tolist()


def _part(pool: Pool, seed: int) -> Pool:
    return pool.take(_part_rows(pool, seed))


def judged(given: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Score and accuracy of each set; those known are taken."""
    recipe = recipe_of(given, "preset=fast", "quant.weights.bits=2", "quant.activations.bits=2",
                       "calibration.pool=10000", "quant.placement=academic")  # fmt: skip
    set_threads(given.threads)
    _, candidates = open_candidates(recipe)
    pool, images = candidates.pool(), candidates.images
    evaluation, rows = open_set(recipe, "evaluation"), {row["set"]: row for row in known.get("sets", [])}
    for name, chosen in mixed_sets(pool):
        if name not in rows:
            rated = _rated(pool, chosen)
            own = recipe.calibration.model_copy(update={"count": SMALL, "strategy": "first", "pool": None})
            given_set = images.subset(pool.indices[chosen].tolist())
            run = quantize(recipe.model_copy(update={"calibration": own}), None, given_set, evaluation)
            rows[name] = {"set": name, **rated, "top1": run.metrics["quantized"]["top1"]}
            write({"sets": list(rows.values())})
    bad = [{"set": name, **_rated(pool, chosen)} for name, chosen in bad_sets(pool, COUNT)]
    return {"sets": list(rows.values()), "bad": bad}


def _rated(pool: Pool, rows: list[int]) -> dict[str, float]:
    found = judge(pool, pool.take(rows), SEED)
    return {"score": found.score, "percentile": found.percentile}


def text_of(facts: dict[str, Any]) -> str:
    text = ""
    if facts.get("cost"):
        body = []
        for strategy in STRATEGIES:
            cells = {r["size"]: r for r in facts["cost"] if r["strategy"] == strategy}
            found = [cells.get(size) for size in SIZES]
            shown = ["–" if c is None else f"{c['seconds']:.0f} s, {c['peak'] / 1e9:.2f} GB" for c in found]
            body.append([strategy, *shown])
        text += (
            f"## Cost of choosing {COUNT:,} images\n\n"
            + common.table(["strategy", *(f"of {size:,}" for size in SIZES)], body)
            + f"\nScoring included; peak memory of the process, torch included; {facts['threads']} thread(s).\n\n"
        )
    if len(facts.get("sets", [])) > 2:
        from scipy.stats import spearmanr

        rows = sorted(facts["sets"], key=lambda r: -r["top1"])
        correlation = spearmanr([r["score"] for r in rows], [r["top1"] for r in rows])
        body = [[r["set"], f"{r['score']:.2f}", f"{r['percentile']:.0f}", f"{100 * r['top1']:.2f}"] for r in rows]
        text += (
            f"## Judging {len(rows)} sets of {SMALL} images\n\n"
            + common.table(["set", "score", "percentile", "top-1 % of W2A2 `fast`"], body)
            + f"\nSpearman's rank correlation of score and top-1: {correlation.statistic:.2f} "
            f"(p = {correlation.pvalue:.1g}). Placement `academic`, boundary `qdrop`, 5,000 test images, one seed.\n"
        )
    for row in facts.get("bad", []):
        text += f"\nBad set of {COUNT:,} images, {row['set']}: percentile {row['percentile']:.1f} of random sets.\n"
    return text


def stored() -> dict[str, Any]:
    """What the results have."""
    path = common.RESULTS / "selecting.json"
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return facts


def write(new: dict[str, Any]) -> None:
    known = stored()
    facts = {key: known[key] for key in ("cost", "sets", "bad", "threads") if key in known} | new
    common.write("selecting", "python benchmarks/selecting.py --data DATA", facts, text_of(facts))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--studies", nargs="+", choices=["cost", "judge"], default=["cost", "judge"])
    parser.add_argument("--child", nargs=2)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(cost(given.child[0], int(given.child[1]), given)))
        return
    if "cost" in given.studies:
        known = stored()
        rows = known.get("cost", []) if known.get("threads") == given.threads else []
        for size, strategy in ((size, strategy) for size in SIZES for strategy in STRATEGIES):
            if not any((r["strategy"], r["size"]) == (strategy, size) for r in rows):
                rows.append(child(strategy, size, given))
                write({"cost": rows, "threads": given.threads})
    if "judge" in given.studies:
        write(judged(given, stored()))


if __name__ == "__main__":
    main()
