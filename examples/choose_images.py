"""Choose calibration images of handwritten digits, judge good and bad choices, and quantize to codebooks of few levels.

    python examples/choose_images.py

Writes to a temporary folder only. Half a minute.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import calibquant
from calibquant.studies.digits import train_digits


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as runs:
        weights = train_digits(Path(runs) / "digits.safetensors", seed=1005)
        fields = {
            "model": {"name": "digits_resnet", "weights": str(weights)},
            "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}},
            "export": {"onnx": False},
            "runs": runs,
        }
        for strategy in ("random", "moments", "rough", "hard"):
            recipe = calibquant.Recipe.model_validate(fields | {"calibration": {"count": 64, "strategy": strategy}})
            manifest = Path(runs) / f"{strategy}.csv"
            calibquant.select(recipe, out=manifest)
            found = calibquant.judge(recipe, manifest).judgement
            print(f"{strategy}: score {found.score:+.2f}, better than {found.percentile:.0f} % of random sets")
        calibration = {"manifest": str(Path(runs) / "moments.csv")}
        for grid, bits in (("uniform", 2), ("codebook", 2), ("binary", 1)):
            quant = {"weights": {"grid": grid, "bits": bits, "rounding": "gram"}, "activations": {"bits": 4}}
            recipe = calibquant.Recipe.model_validate(fields | {"calibration": calibration, "quant": quant})
            run = calibquant.quantize(recipe)
            size, top1 = run.metrics["size"], run.metrics["quantized"]["top1"]
            print(f"{grid}, {size['weight_bits']:.2f} bits a weight, {size['packed']} bytes: top-1 {100 * top1:.2f} %")


if __name__ == "__main__":
    main()
