"""Mixed precision against one bit width for all weights, at the same bytes: ResNet-20 and MobileNetV2.

    python benchmarks/mixed.py --data DATA [--networks ResNet-20]

DATA holds weights/, cifar-10-batches-bin/ and imagenet/. Nearest rounding, ranges of least error, A8, placement
`integer`, boundary `qdrop`: first and last weights have 8 bits everywhere. Bits are chosen on calibration images alone,
for each of three draws of them. A network that was measured is kept in --runs and taken from there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch

from calibquant.data import batches
from calibquant.evaluation import evaluate
from calibquant.export.artifact import size_of
from calibquant.pipeline.preparing import Prepared, prepare
from calibquant.quantization import QuantModel, calibrate_activations, fit_biases, make_plan
from calibquant.quantization.mixed import budget_of, choose_bits, combined
from calibquant.quantization.sensitivity import Models, choice_models, free_tensors, one_at_a_time, second_order
from calibquant.recipe import Recipe, load_recipe
from calibquant.studies.paired import spread

CONFIGS = Path(__file__).parents[1] / "configs"
SEEDS, CHOICES = (1005, 1006, 1007), (2, 3, 4, 8)
MEASURED = ("logits", "interactions", "loss", "gradient", "fisher")


@dataclass(frozen=True)
class Case:
    """A network, its files, the averages of bits, what chooses them and from how many of its calibration images."""

    config: str
    weights: str
    root: str
    limits: tuple[int, ...]
    sensitivities: tuple[str, ...]
    images: int
    overrides: tuple[str, ...] = ()


NETWORKS = {
    "ResNet-20": Case("resnet20-cifar10.yaml", "resnet20-12fca82f.th", "cifar-10-batches-bin", (3,), MEASURED, 64),
    "MobileNetV2": Case(
        "mobilenetv2-imagenet.yaml", "mobilenetv2_tf_1.0_224_fp32.pt", "imagenet", (3, 4), ("gradient",), 64,
        ("calibration.count=100",),
    ),
}  # fmt: skip


def costs_of(recipe: Recipe, prepared: Prepared, models: Models, names: tuple[str, ...], case: Case) -> dict[str, Any]:
    """For each sensitivity the costs of single tensors, and interactions where it has them."""
    size = recipe.calibration.batch_size
    images = [b.images for b in batches(prepared.images.subset(range(case.images)), size)]
    found: dict[str, Any] = {}
    if {"logits", "interactions", "loss"} & set(case.sensitivities):
        measured = one_at_a_time(models, names, images)
        found |= {"logits": (measured.logits, None), "loss": (measured.loss, None)}
        found["interactions"] = (measured.logits, measured.interactions)
    for name in {"gradient", "fisher"} & set(case.sensitivities):
        found[name] = (second_order(models, names, images, seed=recipe.seed, of_loss=name == "fisher"), None)
    return found


def measure(name: str, case: Case, data: Path) -> list[dict[str, Any]]:
    """One row for each average, draw and way to choose."""
    recipe = load_recipe(CONFIGS / case.config, [
        f"model.weights={data / 'weights' / case.weights}", f"data.root={data / case.root}",
        "quant.activations.bits=8", "quant.weights.bits=4", *case.overrides,
    ])  # fmt: skip
    prepared, rows = prepare(recipe), []
    names = free_tensors(make_plan(prepared.teacher, recipe.quant))
    models = choice_models(prepared.teacher, recipe.quant, names, CHOICES)  # weights do not depend on the draw
    size, test = recipe.evaluation.batch_size, prepared.evaluation
    assert test is not None
    reference = evaluate(prepared.teacher, test, size)
    print(name, "float", reference.scores.top1, flush=True)
    for seed in SEEDS:
        recipe = recipe.model_copy(update={"seed": seed})
        prepared = prepare(recipe)
        costs = costs_of(recipe, prepared, models, names, case)
        base = next(iter(models.values()))
        images = (b.images for b in batches(prepared.images, recipe.calibration.batch_size))
        calibrate_activations(base, recipe.quant.activations, images)
        for limit in case.limits:
            budget = budget_of("average_bits", models, names, {})
            choices = {"uniform": [CHOICES.index(limit)] * len(names)}
            choices |= {way: choose_bits(budget, limit, *costs[way]) for way in case.sensitivities}
            for way, choice in choices.items():
                bits = {n: CHOICES[c] for n, c in zip(names, choice, strict=True)}
                model: QuantModel = combined(models, base, bits)
                fit_biases(model.biases())
                scores = evaluate(model, test, size, reference=reference.predictions).scores
                rows.append({
                    "network": name, "limit": limit, "seed": seed, "bits_by": way, "float_top1": reference.scores.top1,
                    "top1": scores.top1, "agreement": scores.agreement, "images": scores.count,
                    "average": budget.of(choice), "size": asdict(size_of(model)), "bits": bits,
                    "calibration_images": len(prepared.images), "sensitivity_images": case.images,
                })  # fmt: skip
                print(name, limit, seed, way, scores.top1, scores.agreement, list(bits.values()), flush=True)
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the draws, and the paired difference to one width."""
    lines = []
    for network, limit, way in dict.fromkeys((r["network"], r["limit"], r["bits_by"]) for r in rows):
        mine = [r for r in rows if (r["network"], r["limit"], r["bits_by"]) == (network, limit, way)]
        plain = [r for r in rows if (r["network"], r["limit"], r["bits_by"]) == (network, limit, "uniform")]
        top1, agreement = spread([r["top1"] for r in mine]), spread([r["agreement"] for r in mine])
        gain = spread([a["top1"] - b["top1"] for a, b in zip(mine, plain, strict=True)])
        codes = max(r["size"]["codes"] for r in mine)
        lines.append([
            network, f"{limit}", way, f"{codes:,}", f"{100 * mine[0]['float_top1']:.2f}",
            f"{100 * top1.mean:.2f} ± {100 * (top1.sd or 0):.2f}",
            f"{100 * agreement.mean:.2f} ± {100 * (agreement.sd or 0):.2f}",
            "–" if way == "uniform" else f"{100 * gain.mean:+.2f} ± {100 * (gain.sd or 0):.2f}",
        ])  # fmt: skip
    header = ["network", "average bits", "chosen by", "bytes of codes", "float top-1", "top-1", "agreement", "gain"]
    return common.table(header, lines)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.runs.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, case in NETWORKS.items():
        kept = given.runs / f"mixed-{name}.json"
        if name in given.networks and not kept.is_file():
            kept.write_text(json.dumps(measure(name, case, given.data)), encoding="utf-8")
        if kept.is_file():
            rows += json.loads(kept.read_text(encoding="utf-8"))
    facts = [
        f"{n}: {r['images']} test images, {r['calibration_images']} calibration images, bits chosen on "
        f"{r['sensitivity_images']} of them."
        for n in NETWORKS
        for r in [next((r for r in rows if r["network"] == n), None)]
        if r is not None
    ]
    text = table_of(rows) + (
        f"\nMean ± sd over {len(SEEDS)} draws of the calibration images. Average bits: of all weights but the "
        "first and the last, which have 8; `uniform` gives all of them that width; the others have at most the same "
        f"bytes, with choices {', '.join(map(str, CHOICES))}. Gain: paired difference of top-1 to `uniform`. "
        "Nearest rounding, observer `mse`, A8, placement `integer`, boundary `qdrop`.\n\n" + "\n".join(facts) + "\n"
    )
    common.write("mixed", "python benchmarks/mixed.py --data DATA", {"rows": rows}, text)


if __name__ == "__main__":
    main()
