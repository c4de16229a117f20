"""Compare two methods on handwritten digits: mean ± sd over three seeds, and whether the difference is shown. A minute.

    python examples/compare.py

Writes to a temporary folder only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from calibquant.studies.compare import compare
from calibquant.studies.digits import train_digits


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as runs:
        weights = train_digits(Path(runs) / "digits.safetensors", seed=1005)
        recipe = {
            "model": {"name": "digits_resnet", "weights": str(weights)},
            "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}},
            "calibration": {"count": 128},
            # Few steps for an example; rounding variables move about one learning rate a step.
            "reconstruct": {"iterations": 60, "rounding_lr": 0.03, "scale_lr": 0.001},
            "runs": runs,
        }
        comparison = compare(recipe, methods=["nearest", "qdrop"], bits=["w4a4", "w2a2"], seeds=3)
        page = (comparison.folder / "compare.md").read_text(encoding="utf-8")
    print("\n".join(line for line in page.splitlines() if line.startswith("|")))
    for test in comparison.result["tests"]:
        interval = test["interval"] and [round(100 * end, 2) for end in test["interval"]]
        print(f"{test['method']} at {test['setting']}: {test['verdict']}, 95 % interval of the difference {interval}")


if __name__ == "__main__":
    main()
