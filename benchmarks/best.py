"""What `fast` and `best` reach beside `qdrop`, and what each of their mechanisms adds.

    OMP_NUM_THREADS=1 python benchmarks/best.py --data DATA [--studies NAME …] [--seeds 1005 …]

DATA holds weights/, imagenet/ and cifar-10-batches-bin/. Studies: `table` (ResNet-20 at four settings), `others`
(ResNet-20 with convolved shortcuts and ResNet-56 at W2A2 and W4A4), `time` (plain `qdrop`, for its seconds beside
QDrop's code), `mechanisms` (W2A2, one mechanism after another), `large` (at W4A4, `best`, and its units without the
network's stage, in the time that `qdrop` takes for 500 iterations: MobileNetV2, and with --trained ResNet-18 trained on
Imagenette), `short` (the same networks in the time of 100 iterations), `integer` (the integer placement at W4A4, and
its deploy.onnx). A cell is a run; what was done is kept in the results, so that the same command goes on. --trained is
the run of `calibquant train configs/train/resnet18-imagenette.yaml`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np

from calibquant.evaluation import evaluate
from calibquant.pipeline import quantize
from calibquant.pipeline.deployed import evaluate_onnx
from calibquant.pipeline.preparing import build, open_set
from calibquant.recipe import load_recipe
from calibquant.studies.paired import over_images, spread

CONFIGS = Path(__file__).parents[1] / "configs"
# As QDrop's code sets it, and as benchmarks/reconstruction.py.
CIFAR = (
    "calibration.strategy=first", "calibration.range_count=256", "calibration.batch_size=256", "quant.boundary=qdrop",
    "quant.placement=academic", "quant.activations.observer=mse-batch", "export.onnx=false",
)  # fmt: skip
CONVOLVED = ("model.options={shortcut: conv}", "data.preprocess.mean=[0.491, 0.482, 0.447]",
             "data.preprocess.std=[0.247, 0.243, 0.262]")  # fmt: skip
INTEGER = ("quant.placement=integer", "export.onnx=true")
IMAGENET = ("calibration.count=256", "reconstruct.batch_size=8", "reconstruct.network.batch_size=16",
            "export.onnx=false")  # fmt: skip
NETWORKS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "ResNet-20": ("resnet20-cifar10.yaml", "resnet20-12fca82f.th", "cifar-10-batches-bin", CIFAR),
    "ResNet-20, convolved shortcuts": (
        "resnet20-cifar10.yaml", "cifar_resnet20_convshortcut_apot_fp32.pt", "cifar-10-batches-bin",
        (*CIFAR, *CONVOLVED),
    ),
    "ResNet-56": (
        "resnet20-cifar10.yaml", "resnet56-4bfd9763.th", "cifar-10-batches-bin", (*CIFAR, "model.name=cifar_resnet56"),
    ),
    "ResNet-20, integer": (
        "resnet20-cifar10.yaml", "resnet20-12fca82f.th", "cifar-10-batches-bin", (*CIFAR, *INTEGER),
    ),
    "MobileNetV2": ("mobilenetv2-imagenet.yaml", "mobilenetv2_tf_1.0_224_fp32.pt", "imagenet", IMAGENET),
    "ResNet-18, Imagenette": ("train/resnet18-imagenette.yaml", "", "imagenette10", IMAGENET),
}  # fmt: skip
SHORT = "reconstruct.iterations=500"
RATE = "reconstruct.rounding_lr=0.02"
SCALES = ("reconstruct.relative_scales=true", "reconstruct.scale_lr=0.005")
WEIGHTS, BIASES = "reconstruct.weight_scale_lr=0.005", "reconstruct.bias_lr=0.01"
ALONE = ("reconstruct.network.iterations=500", "reconstruct.network.features=0", "reconstruct.network.augment=false",
         "reconstruct.network.temperature=1")  # fmt: skip
VARIANTS: dict[str, tuple[str, ...]] = {
    "qdrop": ("preset=qdrop", "reconstruct.iterations=2000"),
    "qdrop, bfloat16": ("preset=qdrop", "reconstruct.iterations=2000", "reconstruct.precision=auto"),
    "fast": ("preset=fast",),
    "best": ("preset=best",),
    "best, units alone": ("preset=best", "reconstruct.network.iterations=0"),
    "qdrop, 500 iterations": ("preset=qdrop", SHORT),
    "+ higher rounding rate": ("preset=qdrop", SHORT, RATE),
    "+ relative scale rate": ("preset=qdrop", SHORT, RATE, *SCALES),
    "+ learned weight scales": ("preset=qdrop", SHORT, RATE, *SCALES, WEIGHTS),
    "+ learned biases": ("preset=qdrop", SHORT, RATE, *SCALES, WEIGHTS, BIASES),
    "+ bfloat16": ("preset=best", SHORT, "reconstruct.network.iterations=0"),
    "+ network stage, 500 iterations": ("preset=best", SHORT, *ALONE),
    "+ features": ("preset=best", SHORT, *ALONE[:1], *ALONE[2:]),
    "+ changed images": ("preset=best", SHORT, *ALONE[:1], *ALONE[3:]),
    "+ temperature 2": ("preset=best", SHORT, *ALONE[:1]),
    "qdrop, 500 iterations of 8": ("preset=qdrop", SHORT, "reconstruct.rounding_lr=0.01"),
    "best in the time of 100": ("preset=best",),
    "qdrop, 100 iterations of 8": ("preset=qdrop", "reconstruct.iterations=100", "reconstruct.rounding_lr=0.01"),
}
LARGE = ("MobileNetV2", "ResNet-18, Imagenette")
STUDIES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "table": (("ResNet-20",), ("W4A4", "W3A3", "W2A4", "W2A2"), ("fast", "best")),
    "others": (
        ("ResNet-20, convolved shortcuts", "ResNet-56"), ("W2A2", "W4A4"), ("qdrop, 500 iterations", "fast", "best"),
    ),
    "time": (("ResNet-20",), ("W4A4", "W2A2"), ("qdrop", "qdrop, bfloat16")),
    "mechanisms": (("ResNet-20",), ("W2A2",), ("qdrop, 500 iterations", *(v for v in VARIANTS if v[0] == "+"))),
    "large": (LARGE, ("W4A4",), 
              ("qdrop, 500 iterations of 8", "best", "best, units alone")),
    "short": (LARGE, ("W4A4",), ("qdrop, 100 iterations of 8", "best in the time of 100")),
    "integer": (("ResNet-20, integer",), ("W4A4",), ("best",)),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A run."""

    network: str
    setting: str
    variant: str
    seed: int

    def run(self, given: Any, seconds: float | None = None) -> dict[str, Any]:
        """Its figures; of a large network also on which images it decides as the float network does."""
        config, keys = source_of(self.network, given)
        keys += [*VARIANTS[self.variant], f"quant.weights.bits={self.setting[1]}", f"seed={self.seed}"]
        keys += [f"quant.activations.bits={self.setting[3]}", f"threads={given.threads}", f"runs={given.runs / 'best'}"]
        keys += [f"reconstruct.time={seconds}"] if seconds else []
        run = quantize(load_recipe(config, keys))
        metrics, agrees = run.metrics, None
        if self.network in LARGE:
            recipe = load_recipe(config, keys)
            float_network = evaluate(build(recipe), open_set(recipe, "evaluation"))
            agrees = packed_bits(run.evaluation.predictions == float_network.predictions)
        return {
            "network": self.network, "setting": self.setting, "variant": self.variant, "seed": self.seed,
            "float_top1": metrics["float"]["top1"], "top1": metrics["quantized"]["top1"],
            "agreement": metrics["quantized"]["agreement"], "seconds": metrics["seconds"]["reconstruct"],
            "iterations": metrics.get("iterations"), "deployed": deployed_of(run.folder),
            "images": metrics["quantized"]["count"], "agrees": agrees,
            "kept": sum(u["kept"] for u in metrics["units"]), "units": len(metrics["units"]),
        }  # fmt: skip


def packed_bits(flags: Any) -> str:
    """Flags as hexadecimal digits, so that a test over the images needs the results alone."""
    return np.packbits(flags).tobytes().hex()


def unpacked_bits(text: str, count: int) -> Any:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(np.int64)


def source_of(network: str, given: Any) -> tuple[Path, list[str]]:
    """A network's recipe, and the keys that name its weights and images."""
    config, weights, root, options = NETWORKS[network]
    path = given.data / "weights" / weights if weights else given.trained / "weights.safetensors"
    return CONFIGS / config, [f"model.weights={path}", f"data.root={given.data / root}", *options]


def deployed_of(folder: Path) -> dict[str, float] | None:
    """What the run's deploy.onnx gives on the evaluation images; None without one."""
    if not (folder / "deploy.onnx").is_file():
        return None
    found = evaluate_onnx(folder / "deploy.onnx")
    return {"top1": found["deployed"]["top1"], "agreement_with_simulation": found["agreement_with_simulation"]}


def cell_of(row: dict[str, Any]) -> Cell:
    return Cell(row["network"], row["setting"], row["variant"], row["seed"])


def text_of(rows: list[dict[str, Any]], tests: list[dict[str, Any]]) -> str:
    header = ["network", "setting", "recipe", "seeds", "top-1 %", "drop", "agreement %", "seconds of reconstruction"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["setting"], row["variant"]), []).append(row)
    body = []
    for (network, setting, variant), found in groups.items():
        top1, agreement = (spread([100 * r[key] for r in found]) for key in ("top1", "agreement"))
        sd = "" if top1.sd is None else f" ± {top1.sd:.2f}"
        body.append([
            network, setting, variant, str(top1.n), f"{top1.mean:.2f}{sd}",
            f"{100 * found[0]['float_top1'] - top1.mean:.2f}", f"{agreement.mean:.2f}",
            f"{np.mean([r['seconds'] for r in found]):.0f}",
        ])  # fmt: skip
    text = common.table(header, body) + (
        '\nBoundary `qdrop`, placement `academic` (MobileNetV2 and "integer": `integer`); CIFAR-10: the first 1,024 '
        "training images calibrate, 5,000 test images; MobileNetV2: 256 training images, 8 a step, 650 validation "
        "images. Mean ± sd over seeds; one thread.\n"
    )
    for row in (r for r in rows if r.get("deployed")):
        text += (
            f"\n{row['network']} {row['setting']}, {row['variant']}, seed {row['seed']}: deploy.onnx "
            f"{100 * row['deployed']['top1']:.2f} % in ONNX Runtime, deciding as the simulation on "
            f"{100 * row['deployed']['agreement_with_simulation']:.2f} % of the images.\n"
        )
    for test in tests:
        text += (
            f"\n{test['network']} {test['setting']}, seeds {', '.join(map(str, test['seeds']))}: {test['a']} against "
            f"{test['b']}, agreement with the float network {100 * test['agreement_a']:.2f} and "
            f"{100 * test['agreement_b']:.2f} %, exact test over the images (of one seed McNemar's) "
            f"p = {test['p']:.2g}.\n"
        )
    return text


def tests_of(rows: list[dict[str, Any]], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Large networks: whether `best` agrees on more images with the float network than `qdrop` does."""
    tests = {(t["network"], t["setting"], t["a"]): t for t in known}
    found = {cell_of(r): unpacked_bits(r["agrees"], r["images"]) for r in rows if r.get("agrees")}
    compared = [
        (network, setting, baseline, variant)
        for networks, (setting,), (baseline, *others) in (STUDIES["large"], STUDIES["short"])
        for network in networks for variant in others
    ]  # fmt: skip
    for network, setting, baseline, variant in compared:
        pairs = {
            cell.seed: (found[cell], found[other]) for cell in found
            if (cell.network, cell.variant) == (network, variant)
            and (other := Cell(network, setting, baseline, cell.seed)) in found
        }  # fmt: skip
        if not pairs:
            continue
        ours, theirs = np.array([*pairs.values()]).transpose(1, 0, 2)
        tests[network, setting, variant] = {
            "network": network, "setting": setting, "seeds": sorted(pairs), "a": variant, "b": baseline,
            "agreement_a": float(ours.mean()), "agreement_b": float(theirs.mean()),
            "p": over_images((ours - theirs).sum(0)),
        }  # fmt: skip
    return list(tests.values())


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--studies", nargs="+", choices=[*STUDIES], default=[*STUDIES])
    parser.add_argument("--trained", type=Path, help="run folder of the ResNet-18 trained on Imagenette")
    parser.add_argument("--settings", nargs="+", help="only these")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1005, 1006, 1007])
    given = parser.parse_args()
    path = common.RESULTS / "best.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": [], "tests": []}
    rows, tests = stored["rows"], stored["tests"]
    for study in given.studies:
        networks, settings, variants = STUDIES[study]
        for seed in given.seeds:
            wanted = [Cell(n, s, v, seed) for n in networks for s in settings for v in variants]
            for cell in wanted:
                skip = (given.settings and cell.setting not in given.settings) or (
                    given.variants and cell.variant not in given.variants
                )
                skip = skip or (cell.network.endswith("Imagenette") and given.trained is None)
                if skip or cell in map(cell_of, rows):
                    continue
                same = [r["seconds"] for r in rows if cell_of(r) == Cell(cell.network, cell.setting, variants[0], seed)]
                seconds = same[0] if study in ("large", "short") and cell.variant != variants[0] else None
                rows.append(cell.run(given, seconds))
                order = [*NETWORKS], [*VARIANTS]
                rows.sort(key=lambda r: (order[0].index(r["network"]), r["setting"], order[1].index(r["variant"])))
                tests = tests_of(rows, tests)
                command = "OMP_NUM_THREADS=1 python benchmarks/best.py --data DATA"
                common.write("best", command, {"rows": rows, "tests": tests}, text_of(rows, tests))


if __name__ == "__main__":
    main()
