"""MobileNetV2 and SqueezeNet 1.1 by MSE ranges, nearest rounding, on a small ImageNet validation set.

    python benchmarks/imagenet.py --data DATA

DATA holds weights/ and imagenet/ (calibration.csv, val.csv and their images).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common

from calibquant.pipeline import quantize
from calibquant.recipe import load_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
NETWORKS = {
    "MobileNetV2": ("mobilenetv2-imagenet.yaml", "mobilenetv2_tf_1.0_224_fp32.pt", []),
    "MobileNetV2, plain padding": ("mobilenetv2-imagenet.yaml", "mobilenetv2_tf_1.0_224_fp32.pt",
                                   ["model.options.padding=torch"]),
    "SqueezeNet 1.1": ("squeezenet-imagenet.yaml", "squeezenet1_1_gluon_fp32.pt", []),
}  # fmt: skip
CASES = [(8, "integer"), (8, "academic"), (6, "integer"), (6, "academic")]


def main() -> None:
    given = common.parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    for network, (config, weights, options) in NETWORKS.items():
        for bits, placement in CASES if "plain" not in network else CASES[:1]:
            recipe = load_recipe(CONFIGS / config, [
                f"model.weights={given.data / 'weights' / weights}", f"data.root={given.data / 'imagenet'}",
                f"quant.weights.bits={bits}", f"quant.activations.bits={bits}", f"quant.placement={placement}",
                f"runs={given.runs}", f"threads={given.threads}", *options,
            ])  # fmt: skip
            metrics = quantize(recipe).metrics
            quantized = metrics["quantized"]
            rows.append({
                "network": network, "setting": recipe.setting, "placement": placement, "boundary": metrics["boundary"],
                "calibration_images": metrics["calibration_images"], "images": quantized["count"],
                "float_top1": metrics["float"]["top1"], "top1": quantized["top1"],
                "top1_interval": quantized["top1_interval"], "agreement": quantized["agreement"],
                "agreement_interval": quantized["agreement_interval"], "bytes": metrics["size"]["file"],
                "float_bytes": metrics["size"]["float32"], "seconds": metrics["seconds"],
            })  # fmt: skip
    header = ["network", "setting", "placement", "float top-1", "top-1", "agreement (95 % interval)", "MB"]
    body = [
        [
            r["network"], r["setting"], r["placement"], f"{100 * r['float_top1']:.2f}", f"{100 * r['top1']:.2f}",
            "{:.2f} ({:.1f}–{:.1f})".format(*(100 * v for v in (r["agreement"], *r["agreement_interval"]))),
            f"{r['bytes'] / 1e6:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    text = common.table(header, body) + (
        f"\n{rows[0]['images']} validation images, {rows[0]['calibration_images']} training images for calibration, "
        "one draw; boundary `qdrop`; observer `mse` for weights and activations.\n"
    )
    common.write("imagenet", "python benchmarks/imagenet.py --data DATA", {"rows": rows}, text)


if __name__ == "__main__":
    main()
