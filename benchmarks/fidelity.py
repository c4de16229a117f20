"""How closely the recipe `qdrop-reference` meets what QDrop's own code computes, before reconstruction.

    python benchmarks/fidelity.py --data DATA --reference qdrop_resnet20_nearest.npz

DATA holds weights/resnet20-12fca82f.th and cifar-10-batches-bin/. The reference file holds, for each setting, QDrop's
quantizers (names, bits, in order), their scales and zero points, and its logits on the 5,000 test images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
import numpy as np

from calibquant.data import open_images
from calibquant.evaluation import evaluate
from calibquant.pipeline import quantize
from calibquant.recipe import load_recipe

CONFIG = Path(__file__).parents[1] / "configs" / "resnet20-cifar10.yaml"


def compare(reference: Any, setting: str, data: Path, runs: Path, threads: int) -> dict[str, Any]:
    """One setting's figures."""
    weights, activations = setting[1], setting[3]
    recipe = load_recipe(CONFIG, [
        "preset=qdrop-reference", "reconstruct.method=none",
        f"model.weights={data / 'weights' / 'resnet20-12fca82f.th'}", f"data.root={data}",
        f"quant.weights.bits={weights}", f"quant.activations.bits={activations}", f"runs={runs}", f"threads={threads}",
    ])  # fmt: skip
    run = quantize(recipe)
    expected = json.loads(str(reference[f"{setting}/quantizers"]))
    ours = run.model.quantizers
    assert [bits for _, bits in expected] == [q.plan.grid.bits for q in ours]
    scales, zeros, differing = [], [], []
    for i, ((name, _), quantizer) in enumerate(zip(expected, ours, strict=True)):
        scale, zero_point = reference[f"{setting}/scale/{i:02d}"], reference[f"{setting}/zero_point/{i:02d}"]
        error = np.abs(quantizer.scale.reshape(-1).numpy() - scale) / scale
        equal = quantizer.zero_point.reshape(-1).numpy() == zero_point
        scales.append(error)
        zeros.append(equal)
        if (error > 1e-5).any() or not equal.all():
            differing.append(name)
    images = open_images(recipe.data, "evaluation")
    logits = evaluate(run.model, images, recipe.evaluation.batch_size, keep_logits=True).logits
    assert logits is not None
    theirs = reference[f"{setting}/nearest_logits"]
    errors, same = np.concatenate(scales), np.concatenate(zeros)
    labels = images.labels()
    return {
        "setting": setting.upper(),
        "quantizers": len(ours),
        "channels": len(errors),
        "scales_within_1e-5": int((errors <= 1e-5).sum()),
        "largest_relative_scale_error": float(errors.max()),
        "zero_points_equal": int(same.sum()),
        "differing_quantizers": differing,
        "decisions_equal": float((logits.numpy().argmax(1) == theirs.argmax(1)).mean()),
        "largest_logit_difference": float(np.abs(logits.numpy() - theirs).max()),
        "float_top1": run.metrics["float"]["top1"],
        "top1": run.metrics["quantized"]["top1"],
        "reference_top1": float((theirs.argmax(1) == labels).mean()),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--reference", type=Path, required=True)
    given = parser.parse_args()
    reference = np.load(given.reference, allow_pickle=False)
    settings = ("w4a4", "w3a3", "w2a4", "w2a2")
    rows = [compare(reference, s, given.data, given.runs, given.threads) for s in settings]
    header = ["setting", "scales within 1e-5", "zero points equal", "decisions equal", "logits differ by at most",
              "top-1", "QDrop's code", "float"]  # fmt: skip
    body = [
        [
            r["setting"], f"{r['scales_within_1e-5']}/{r['channels']}", f"{r['zero_points_equal']}/{r['channels']}",
            f"{100 * r['decisions_equal']:.2f} %", f"{r['largest_logit_difference']:.1e}", f"{100 * r['top1']:.2f}",
            f"{100 * r['reference_top1']:.2f}", f"{100 * r['float_top1']:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    command = "python benchmarks/fidelity.py --data DATA --reference qdrop_resnet20_nearest.npz"
    common.write("fidelity", command, {"rows": rows}, common.table(header, body))


if __name__ == "__main__":
    main()
