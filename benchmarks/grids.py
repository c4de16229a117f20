"""Grids beyond uniform: weights of ResNet-20 at 1 to 4 bits with reconstruction, NUQ on 8-bit networks, activations.

    OMP_NUM_THREADS=1 python benchmarks/grids.py --data DATA [--studies bits …] [--bits 2 …] [--grids …] [--preset best]

DATA holds weights/, cifar-10-batches-bin/ and imagenet/. `bits`: what `calibquant compare --methods fast --grids` runs,
with activations of 16 bits; codebooks also clustered by second-order sensitivity, and with levels for each channel.
`nuq`: the preset `int8` with 32 and 16 of its 256 levels beside all, on ResNet-20 and MobileNetV2. `activations`: the
preset `analytic` with weights of 4 uniform bits and activations on each grid, on the same networks. What was done is
kept in the results, so that the same command goes on; delete them to measure again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

from calibquant.pipeline import Run, quantize
from calibquant.recipe import has_bits, load_recipe
from calibquant.studies.compare.figure import pareto_png
from calibquant.studies.paired import over_seeds, spread

CONFIGS = Path(__file__).parents[1] / "configs"
GRIDS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "codebook": ("quant.weights.grid=codebook",),
    "codebook, second order": ("quant.weights.grid=codebook", "quant.weights.clustering=second-order"),
    "codebook, each channel": ("quant.weights.grid=codebook", "quant.weights.codebook=per_channel"),
    "apot": ("quant.weights.grid=apot",),
    "power-of-two": ("quant.weights.grid=power-of-two",),
    "ternary": ("quant.weights.grid=ternary",),
    "binary": ("quant.weights.grid=binary",),
}
BASELINE, PRESET = "uniform", "fast"
ACTIVATION_GRIDS = ("uniform", "codebook", "apot", "power-of-two")
ACTIVATION_BITS = {"ResNet-20": (4, 3, 2), "MobileNetV2": (4,)}
ONE_DRAW = ("calibration.strategy=first", "quant.placement=academic", "quant.boundary=qdrop", "export.onnx=false")
NETWORKS = {
    "ResNet-20": ("resnet20-cifar10.yaml", "resnet20-12fca82f.th", "cifar-10-batches-bin", 1024),
    "MobileNetV2": ("mobilenetv2-imagenet.yaml", "mobilenetv2_tf_1.0_224_fp32.pt", "imagenet", 256),
}
NUQ, SECOND, GRAM = "quant.weights.grid=nuq", "quant.weights.clustering=second-order", "quant.weights.rounding=gram"
LEVELS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "32 levels": (NUQ,),
    "32 levels, second order": (NUQ, SECOND),
    "32 levels, second order, Gram rounding": (NUQ, SECOND, GRAM),
    "16 levels": (NUQ, "quant.weights.levels=16"),
    "16 levels, second order, Gram rounding": (NUQ, "quant.weights.levels=16", SECOND, GRAM),
}


def source_of(network: str, given: Any) -> tuple[Path, list[str]]:
    """A network's recipe, and the keys that name its weights and images."""
    config, weights, root, _ = NETWORKS[network]
    keys = [f"model.weights={given.data / 'weights' / weights}", f"data.root={given.data / root}"]
    return CONFIGS / config, [*keys, f"threads={given.threads}"]


def run_of(network: str, given: Any, keys: list[str]) -> Run:
    """A run without its folder."""
    config, source = source_of(network, given)
    run = quantize(load_recipe(config, [*source, f"runs={given.runs / 'grids'}", *keys]))
    shutil.rmtree(run.folder)
    return run


def few_bits(given: Any, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """A row for each setting and grid, with the top-1 of each seed."""
    found = {(row["setting"], row["grid"]): row for row in rows}
    for bits, seed, grid in ((b, s, g) for b in given.bits for s in given.seeds for g in given.grids):
        setting = f"W{bits}A16" + ("" if given.preset == PRESET else f", {given.preset}")
        if not has_bits(grid.partition(",")[0], bits) or str(seed) in found.get((setting, grid), {"top1": {}})["top1"]:
            continue
        own = [f"preset={given.preset}", f"quant.weights.bits={bits}", "quant.activations.bits=16", f"seed={seed}"]
        metrics = run_of("ResNet-20", given, [*ONE_DRAW, *own, *GRIDS[grid]]).metrics
        row = found.setdefault((setting, grid), {
            "setting": setting, "grid": grid, "weight_bits": metrics["size"]["weight_bits"],
            "bytes": metrics["size"]["file"], "float_top1": metrics["float"]["top1"], "top1": {},
        })  # fmt: skip
        row["top1"][str(seed)] = metrics["quantized"]["top1"]
        yield sorted(found.values(), key=lambda r: (r["setting"], [*GRIDS].index(r["grid"])))


def draw_pareto(rows: list[dict[str, Any]]) -> None:
    """results/grids.png: bytes against accuracy."""
    table = [
        {**row, "method": row["grid"], "top1": {"mean": s.mean, "sd": s.sd}}
        for row in rows for s in [spread(list(row["top1"].values()))]
    ]  # fmt: skip
    grids = [grid for grid in GRIDS if any(row["grid"] == grid for row in rows)]
    (common.RESULTS / "grids.png").write_bytes(pareto_png({"measure": "top1", "methods": grids, "table": table}))


def few_levels(given: Any, known: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """8-bit networks and the same with few of the levels."""
    rows = {(row["network"], row["levels"]): row for row in known if row["levels"] in LEVELS}
    for network in NETWORKS:
        wanted = None
        for name, keys in LEVELS.items():
            if (network, name) in rows and (name != BASELINE or all((network, other) in rows for other in LEVELS)):
                continue
            run = run_of(network, given, ["preset=int8", f"calibration.count={NETWORKS[network][3]}", *keys])
            wanted = run.evaluation.predictions if wanted is None else wanted
            size = run.metrics["size"]
            rows[network, name] = {
                "network": network, "levels": name, "top1": run.metrics["quantized"]["top1"],
                "agreement": float((run.evaluation.predictions == wanted).mean()), "images": len(wanted),
                "entropy": size["code_entropy"], "codes": size["codes"], "compressed": size["compressed_codes"],
            }  # fmt: skip
            yield [rows[n, levels] for n in NETWORKS for levels in LEVELS if (n, levels) in rows]


def activation_grids(given: Any, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Weights of 4 uniform bits, and activations on each grid."""
    cells = [(n, b, g) for n, settings in ACTIVATION_BITS.items() for b in settings for g in ACTIVATION_GRIDS]
    known = {(row["network"], row["bits"], row["grid"]) for row in rows}
    for network, bits, grid in cells:
        if (network, bits, grid) in known or (grid == "power-of-two" and bits > 3):  # there is none for activations
            continue
        own = ["preset=analytic", f"calibration.count={NETWORKS[network][3]}", "quant.weights.bits=4",
               f"quant.activations.bits={bits}", f"quant.activations.grid={grid}", "export.onnx=false"]  # fmt: skip
        scores = run_of(network, given, own).metrics["quantized"]
        rows = [*rows, {
            "network": network, "bits": bits, "grid": grid, "top1": scores["top1"],
            "agreement": scores["agreement"], "images": scores["count"],
        }]  # fmt: skip
        yield rows


STUDIES = {"bits": few_bits, "nuq": few_levels, "activations": activation_grids}


def text_of(facts: dict[str, Any]) -> str:
    parts = (bits_text, "bits"), (levels_text, "nuq"), (activations_text, "activations")
    return "".join(text(facts.get(study, [])) for text, study in parts)


def activations_text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    cells = {(r["network"], r["bits"], r["grid"]): f"{100 * r['top1']:.2f}, {100 * r['agreement']:.2f}" for r in rows}
    body = [
        [f"{network} W4A{bits}", *(cells.get((network, bits, grid), "–") for grid in ACTIVATION_GRIDS)]
        for network, settings in ACTIVATION_BITS.items()
        for bits in settings
    ]
    return (
        "\n" + common.table(["top-1 %, agreement %: activations on", *ACTIVATION_GRIDS], body)
        + "\nPreset `analytic` (Gram rounding and bias correction, nothing learned), weights on uniform grids, "
        "placement `integer`, boundary `qdrop`, one draw.\n"
    )  # fmt: skip


def bits_text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    base = {row["setting"]: row["top1"] for row in rows if row["grid"] == BASELINE}
    body = []
    for row in rows:
        found, other = spread([100 * v for v in row["top1"].values()]), base.get(row["setting"], {})
        sd, against = "" if found.sd is None else f" ± {found.sd:.2f}", "–"
        shared = [100 * (v - other[seed]) for seed, v in row["top1"].items() if seed in other]
        if row["grid"] != BASELINE and shared:
            test = over_seeds(shared)
            ends = "" if test.interval is None else f" [{test.interval[0]:+.2f}, {test.interval[1]:+.2f}]"
            against = f"{test.difference.mean:+.2f}{ends}, {test.verdict}"
        body.append([row["setting"], row["grid"], str(found.n), f"{found.mean:.2f}{sd}", f"{row['weight_bits']:.2f}",
                     f"{row['bytes']:,}", against])  # fmt: skip
    header = ["setting", "grid", "seeds", "top-1 %", "bits a weight", "bytes", "against uniform"]
    return common.table(header, body) + (
        f"\nFloat top-1 {100 * rows[0]['float_top1']:.2f} %. Preset `fast` where none is named, the first 1,024 "
        "training images, placement `academic`, boundary `qdrop` (8 bits at both ends), 5,000 test images. Against "
        "uniform levels: mean difference in points with its 95 % interval over the seeds, and whether that excludes "
        "0.\n\n![](grids.png)\n\n"
    )


def levels_text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    body = [
        [r["network"], r["levels"], f"{100 * r['top1']:.2f}", f"{100 * r['agreement']:.2f}", f"{r['entropy']:.2f}",
         f"{r['codes']:,}", f"{r['compressed']:,}"]
        for r in rows
    ]  # fmt: skip
    header = ["network", "8-bit weights", "top-1 %", "decides as uniform %", "entropy, bits a code", "packed codes",
              "deflated codes"]  # fmt: skip
    images = " and ".join(f"{r['images']:,}" for r in rows if r["levels"] == "uniform")
    return common.table(header, body) + (
        f"\nPreset `int8`, {images} evaluation images. Bytes of all weights' codes: packed, and after deflate.\n"
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--studies", nargs="+", choices=[*STUDIES], default=[*STUDIES])
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1005, 1006, 1007])
    parser.add_argument("--preset", choices=[PRESET, "best"], default=PRESET, help="of the study bits")
    parser.add_argument("--grids", nargs="+", choices=[*GRIDS], default=[*GRIDS])
    given = parser.parse_args()
    path = common.RESULTS / "grids.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    facts = {study: facts[study] for study in STUDIES if study in facts}
    for study in given.studies:
        for rows in STUDIES[study](given, facts.get(study, [])):
            facts[study] = rows
            if study == "bits":
                draw_pareto(rows)
            command = "OMP_NUM_THREADS=1 python benchmarks/grids.py --data DATA"
            common.write("grids", command, facts, text_of(facts))


if __name__ == "__main__":
    main()
