"""The demo from Python: train a small network on handwritten digits, quantize it, print a table. Half a minute.

    python examples/digits.py

Writes to a temporary folder only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import calibquant
from calibquant.studies.digits import train_digits


def main() -> None:
    # Threads that wait for each other on a busy machine cost more than they give to a network this small.
    torch.set_num_threads(1)
    print(f"{'weights':>7} {'activations':>11} {'boundary':>8} {'bytes':>7} {'top-1':>6} {'agreement':>9}")
    with tempfile.TemporaryDirectory() as runs:
        weights = train_digits(Path(runs) / "digits.safetensors", seed=1005)
        for w, a, boundary in [(8, 8, "none"), (4, 4, "qdrop"), (4, 4, "none"), (2, 4, "qdrop")]:
            run = calibquant.quantize({
                "model": {"name": "digits_resnet", "weights": str(weights)},
                "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}},
                "calibration": {"count": 256},
                "quant": {"weights": {"bits": w}, "activations": {"bits": a}, "boundary": boundary},
                "runs": runs,
            })  # fmt: skip
            scores, size = run.metrics["quantized"], run.metrics["size"]["packed"]
            print(f"{w:>7} {a:>11} {boundary:>8} {size:>7} {scores['top1']:>6.4f} {scores['agreement']:>9.4f}")
        top1, size = run.metrics["float"]["top1"], run.metrics["size"]["float32"]
        print(f"{'float':>7} {'float':>11} {'–':>8} {size:>7} {top1:>6.4f} {'–':>9}")


if __name__ == "__main__":
    main()
