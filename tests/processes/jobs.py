"""Work for one process or several: python jobs.py NAME OUT, alone or under torchrun. The first process writes OUT."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import calibquant
from calibquant import parallel
from calibquant.cli import main
from calibquant.data import TensorImages
from calibquant.evaluation import evaluate
from calibquant.training import engine


def network() -> nn.Module:
    """Two convolutions and a classifier, whose logits are far apart."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.orthogonal_(parameter, 1.5)
    return net.eval()


def images(count: int = 101) -> TensorImages:
    """Noise; the number is odd, so that shares differ."""
    random = torch.Generator().manual_seed(1)
    return TensorImages(torch.randn(count, 3, 8, 8, generator=random), [i % 4 for i in range(count)])


def run_of(folder: Path, **sections: Any) -> calibquant.Run:
    """A run at 3 bits."""
    recipe = {
        "runs": str(folder / "runs"), "threads": 1, "calibration": {"count": 96, "batch_size": 7},
        "quant": {"weights": {"bits": 3}, "activations": {"bits": 3}}, "export": {"onnx": False},
    } | sections  # fmt: skip
    return calibquant.quantize(recipe, network(), images(), images(53))


def ranges(folder: Path) -> Any:
    """Activation ranges by observers that do not depend on the order of batches, as exact numbers."""
    found = {}
    for observer in ("minmax", "mse", "percentile", "kl"):
        run = run_of(folder, quant={"activations": {"observer": observer}})
        found[observer] = [float(q.get()[0]).hex() for q in run.model.activation_quantizers.values()]
    return found


def scores(_: Path) -> Any:
    """What a network decides on each image, and its scores."""
    result = evaluate(network(), images(), batch_size=8, keep_logits=True)
    assert result.logits is not None
    return {
        "predictions": result.predictions.tolist(), "labels": result.labels.tolist(), "indices": list(result.indices),
        "count": result.scores.count, "top1": result.scores.top1, "logits": len(result.logits),
    }  # fmt: skip


def learned(folder: Path) -> Any:
    """Unit by unit, then the whole network: losses of the units and learned scales.

    After a few steps more a last bit turns a rounding, and results part.
    """
    way = {"method": "qdrop", "drop": 0.0, "iterations": 3, "rounding_lr": 0.01, "bias_lr": 0.01, "scale_lr": 0.001,
           "weight_scale_lr": 0.005, "relative_scales": True,
           "network": {"iterations": 3, "augment": False, "batch_size": 16}}  # fmt: skip
    run = run_of(folder, reconstruct=way)
    return result_of(run)


def result_of(run: calibquant.Run) -> dict[str, Any]:
    """Losses of the units, and all scales."""
    return {
        "losses": [[u["loss_before"], u["loss_after"]] for u in run.metrics["units"]],
        "scales": [float(s) for q in run.model.quantizers for s in q.scale.reshape(-1)],  # type: ignore[union-attr]
    }


def fisher(folder: Path) -> Any:
    """With the importance of outputs in the loss, and roundings alone."""
    run = run_of(folder, reconstruct={"method": "adaround", "loss": "fisher", "views": 2, "iterations": 3,
                                   "rounding_lr": 0.01})  # fmt: skip
    return result_of(run)


def tuned(folder: Path) -> Any:
    """Some steps of training with SGD, so that gradients count by their size."""
    way = {"iterations": 4, "batch_size": 16, "optimizer": "sgd", "lr": 0.001, "scale_lr": 0.001, "labels": 0.5,
           "features": 0.5, "precision": "float32", "holdout": 0.0}  # fmt: skip
    run = run_of(folder, finetune=way)
    return {
        "losses": [e["loss"] for e in run.metrics["finetune"]["epochs"]],
        "processes": run.metrics["finetune"]["processes"],
        "scales": [float(s) for q in run.model.quantizers for s in q.scale.reshape(-1)],  # type: ignore[union-attr]
        "biases": [float(b) for d in run.model.bias_deltas.values() for b in d.delta],  # type: ignore[union-attr]
    }


JOBS: dict[str, Callable[[Path], Any]] = {f.__name__: f for f in (ranges, scores, learned, fisher, tuned)}


def die_in_epoch(number: int) -> None:
    """The second process ends without a word in the middle of an epoch."""
    step, seen = engine._step, []

    def counted(training: Any, *rest: Any) -> Any:
        seen.append(1)
        if parallel.rank() == 1 and len(training.reports) == number and len(seen) % 3 == 0:
            os._exit(9)
        return step(training, *rest)

    engine._step = counted


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, *rest = sys.argv[1:]
    if name == "dying":  # calibquant itself, until an epoch
        die_in_epoch(int(rest[0]))
        sys.exit(main(rest[1:]))
    out = Path(rest[0])
    with parallel.together():
        result = {job: JOBS[job](out.parent / job) for job in name.split(",")}
        if parallel.rank() == 0:
            out.write_text(json.dumps(result))
