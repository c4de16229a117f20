"""Bits shared among channels: ResNet-20 on CIFAR-10, weights and activations, min-max and MSE ranges.

    python benchmarks/allocation.py --data DATA

DATA holds weights/ and cifar-10-batches-bin/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common

from calibquant.pipeline import quantize
from calibquant.recipe import load_recipe

CONFIG = Path(__file__).parents[1] / "configs" / "resnet20-cifar10.yaml"
OBSERVERS = ("minmax", "mse")
CALIBRATION, IMAGES = 256, 2000
WEIGHTS = [(bits, 8, "per_tensor", shared, "none") for bits in (3, 2) for shared in ("none", "banner", "optimal")]
ACTIVATIONS = [
    (8, 4, "per_tensor", "none", "none"),
    *((8, 4, "per_channel", "none", shared) for shared in ("none", "banner", "optimal")),
]


def main() -> None:
    given = common.parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    for observer in OBSERVERS:
        for weights, activations, granularity, weight_bits, activation_bits in [*WEIGHTS, *ACTIVATIONS]:
            recipe = load_recipe(CONFIG, [
                f"model.weights={given.data / 'weights' / 'resnet20-12fca82f.th'}", f"data.root={given.data}",
                f"calibration.count={CALIBRATION}", f"evaluation.count={IMAGES}", f"quant.weights.bits={weights}",
                f"quant.weights.observer={observer}", f"quant.weights.allocation={weight_bits}",
                f"quant.activations.bits={activations}", f"quant.activations.observer={observer}",
                f"quant.activations.granularity={granularity}", f"quant.activations.allocation={activation_bits}",
                f"runs={given.runs}", f"threads={given.threads}", "export.onnx=false",
            ])  # fmt: skip
            metrics = quantize(recipe).metrics
            quantized, size = metrics["quantized"], metrics["size"]
            rows.append({
                "setting": recipe.setting, "observer": observer, "activations": granularity,
                "weight_allocation": weight_bits, "activation_allocation": activation_bits,
                "float_top1": metrics["float"]["top1"], "top1": quantized["top1"],
                "top1_interval": quantized["top1_interval"], "agreement": quantized["agreement"],
                "agreement_interval": quantized["agreement_interval"], "weight_bits": size["weight_bits"],
                "bytes": size["packed"], "seconds": metrics["seconds"],
            })  # fmt: skip
    header = ["setting", "observer", "weight bits shared", "activations", "their bits shared", "top-1 (95 % interval)",
              "agreement", "bits a weight", "bytes"]  # fmt: skip
    body = [
        [
            r["setting"], r["observer"], r["weight_allocation"], r["activations"], r["activation_allocation"],
            "{:.2f} ({:.1f}–{:.1f})".format(*(100 * v for v in (r["top1"], *r["top1_interval"]))),
            f"{100 * r['agreement']:.2f}", f"{r['weight_bits']:.3f}", f"{r['bytes']:,}",
        ]
        for r in rows
    ]  # fmt: skip
    text = common.table(header, body) + (
        f"\nFloat top-1 {100 * rows[0]['float_top1']:.2f}. {IMAGES} test images, {CALIBRATION} training images for "
        "calibration, one draw, seed 1005; placement `integer`, boundary `qdrop`, nearest rounding; `bytes` are those "
        "of all tensors.\n"
    )
    common.write("allocation", "python benchmarks/allocation.py --data DATA", {"rows": rows}, text)


if __name__ == "__main__":
    main()
