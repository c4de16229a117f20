"""Is the table of fields without effect right? Every field is changed under many recipes, on a tiny network.

    python benchmarks/idle_fields.py [BASE …]

For each base recipe and field one run with another value of the field: its codes, scales, chosen images and scores are
compared with the base's. A field that changes nothing must be warned of, and one that is warned of must change nothing.
Prints what is wrong, and the counts; takes about 20 minutes.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibquant.errors import CalibQuantError
from calibquant.pipeline import quantize, train
from calibquant.recipe import Recipe, idle_fields, make_recipe
from calibquant.recipe.idle import READS, Command, value_at
from calibquant.recipe.section import leaves

COMMON = [
    "data.kind=digits", "data.preprocess={mean: [0.4], std: [0.5]}", "calibration.count=72",
    "calibration.batch_size=36", "evaluation.count=20", "export.onnx=false", "quant.weights.bits=2",
    "quant.activations.bits=3",
]  # fmt: skip
LEARNED = ["reconstruct.iterations=6", "reconstruct.rounding_lr=0.3", "reconstruct.scale_lr=0.01",
           "reconstruct.never_worse=false", "reconstruct.regularizer=0.01"]  # fmt: skip
TUNED = ["finetune.iterations=3", "finetune.batch_size=16", "finetune.precision=float32", "finetune.holdout=0",
         "reconstruct.method=none"]  # fmt: skip
# Recipes by name, as overrides of COMMON.
BASES: dict[str, list[str]] = {
    "nearest": [],
    "gram": ["quant.weights.rounding=gram"],
    "percentile": ["quant.weights.observer=percentile", "quant.activations.observer=percentile"],
    "adaround": [*LEARNED, "reconstruct.method=adaround"],
    "brecq": [*LEARNED, "reconstruct.method=brecq"],
    "qdrop": [*LEARNED, "reconstruct.method=qdrop"],
    "unregularized": [*LEARNED, "reconstruct.method=qdrop", "reconstruct.regularizer=0"],
    "network": [*LEARNED, "reconstruct.method=adaround", "reconstruct.network.iterations=4"],
    "dynamic": ["quant.activations.dynamic=true"],
    "dynamic brecq": [
        *LEARNED,
        "reconstruct.method=brecq",
        "quant.activations.dynamic=true",
        "reconstruct.network.iterations=2",
    ],
    "academic": ["quant.placement=academic", "quant.boundary=none"],
    "eight": ["quant.weights.bits=8", "quant.activations.bits=8"],
    "codebook": ["quant.weights.grid=codebook", "quant.boundary=none"],
    "levels": ["quant.weights.grid=codebook", "quant.weights.levels=5"],
    "apot": ["quant.weights.grid=apot", "quant.weights.bits=3", "quant.boundary=none"],
    "nuq": ["quant.weights.grid=nuq", "quant.weights.bits=8"],
    "activation levels": ["quant.activations.grid=codebook"],
    "per channel": ["quant.weights.allocation=banner", "quant.activations.granularity=per_channel"],
    "mixed": ["quant.mixed={limit: 3, images: 8, choices: [2, 4]}"],
    "mixed both": ["quant.mixed={budget: bops, limit: 300000, images: 8, choices: [2, 4], tensors: both}"],
    "corrected": ["quant.bias_correction=empirical", "calibration.strategy=best-of-random", "calibration.pool=200"],
    "augmented": ["calibration.augment=true", "data.augment={pad: 1}"],
    "cropped": ["calibration.augment=true", "data.augment={scale: [0.3, 0.9]}", "data.preprocess.crop=8"],
    "resized": ["data.preprocess.resize=12", "data.calibration_preprocess={mean: [0.4], std: [0.5], resize: 12}"],
    "lsq": TUNED,
    "arq": [*TUNED, "finetune.weights=arq", "finetune.activations=fixed"],
    "sgd": [*TUNED, "finetune.optimizer=sgd", "finetune.lr=0.001", "finetune.labels=1", "finetune.distill=0"],
    "tuned dynamic": [*TUNED, "quant.activations.dynamic=true"],
    "train": ["train={epochs: 2, batch_size: 400, lr: 0.05}"],
    "train adamw": ["train={iterations: 4, batch_size: 400, optimizer: adamw, lr: 0.01, holdout: 0.1}"],
}
# Another value of each field than under any of the bases.
OTHER: dict[str, Any] = {
    "preset": "best", "model.options": "{a: 1}", "model.weights": "none.pth",
    "data.root": "elsewhere", "data.calibration": "test", "data.evaluation": "train",
    "data.preprocess.resize": 10, "data.preprocess.crop": 7, "data.preprocess.interpolation": "nearest",
    "data.preprocess.color": "strict", "data.preprocess.mean": "[0.3]", "data.preprocess.std": "[0.4]",
    "data.calibration_preprocess.resize": 10, "data.calibration_preprocess.crop": 7,
    "data.calibration_preprocess.interpolation": "nearest", "data.calibration_preprocess.color": "strict",
    "data.calibration_preprocess.mean": "[0.3]", "data.calibration_preprocess.std": "[0.4]",
    "data.augment.scale": "[0.2, 0.5]", "data.augment.ratio": "[0.4, 0.6]", "data.augment.pad": 2,
    "data.augment.flip": "true", "data.augment.cutout": 3, "data.on_error": "skip",
    "calibration.count": 80, "calibration.range_count": 9, "calibration.strategy": "class-balanced",
    "calibration.pool": 300, "calibration.augment": "true",
    "quant.weights.bits": 6, "quant.weights.grid": "ternary", "quant.weights.levels": 7,
    "quant.weights.codebook": "per_channel", "quant.weights.clustering": "second-order",
    "quant.weights.reach": "full", "quant.weights.symmetric": "true", "quant.weights.granularity": "per_tensor",
    "quant.weights.allocation": "optimal", "quant.weights.observer": "percentile", "quant.weights.percentile": 80,
    "quant.weights.correction": "mean-variance", "quant.weights.rounding": "gram",
    "quant.activations.bits": 5, "quant.activations.grid": "apot", "quant.activations.symmetric": "true",
    "quant.activations.granularity": "per_channel", "quant.activations.allocation": "banner",
    "quant.activations.observer": "minmax", "quant.activations.percentile": 80, "quant.activations.dynamic": "true",
    "quant.placement": "academic", "quant.boundary": "captq", "quant.boundary_bits": 5, "quant.residual_bits": 6,
    "quant.bits": "{}", "quant.equalize": "true", "quant.bias_correction": "analytic",
    "quant.mixed.limit": 2.5, "quant.mixed.choices": "[2, 3, 8]", "quant.mixed.sensitivity": "agreement",
    "quant.mixed.images": 20, "quant.mixed.budget": "weight_bytes", "quant.mixed.tensors": "both",
    "reconstruct.method": "qdrop", "reconstruct.loss": "fisher", "reconstruct.iterations": 9,
    "reconstruct.batch_size": 16, "reconstruct.sampling": "with_replacement", "reconstruct.rounding_lr": 0.9,
    "reconstruct.regularizer": 2, "reconstruct.warm_up": 0.7, "reconstruct.beta": "[9, 1]",
    "reconstruct.scale_lr": 0.2, "reconstruct.relative_scales": "true", "reconstruct.weight_scale_lr": 0.2,
    "reconstruct.bias_lr": 0.3, "reconstruct.views": 3, "reconstruct.zero_point_lr": 2, "reconstruct.drop": 0.1,
    "reconstruct.scale_iterations": 5, "reconstruct.scale_power": 3.5, "reconstruct.scale_inputs": "float",
    "reconstruct.skip_first": "true", "reconstruct.never_worse": "true", "reconstruct.cache": "bfloat16",
    "reconstruct.precision": "bfloat16",
    "reconstruct.network.iterations": 3, "reconstruct.network.batch_size": 20,
    "reconstruct.network.rounding_lr": 0.5, "reconstruct.network.weight_scale_lr": 0.3,
    "reconstruct.network.scale_lr": 0.3, "reconstruct.network.bias_lr": 0.3, "reconstruct.network.rise": 0.6,
    "reconstruct.network.features": 9, "reconstruct.network.temperature": 9, "reconstruct.network.augment": "false",
    "evaluation.count": 30, "seed": 7,
    **{
        f"{part}.{name}": value
        for part in ("finetune", "train")
        for name, value in {
            "epochs": 1, "iterations": 2, "batch_size": 32, "optimizer": "adamw", "lr": 0.02, "momentum": 0.3,
            "nesterov": "false", "weight_decay": 0.3, "schedule": "one-cycle", "warm_up": 0.5, "label_smoothing": 0.4,
            "mixup": 0.7, "ema": 0.5, "clip": 0.01, "holdout": 0.3, "evaluate_every": 2,
        }.items()
    },
    "finetune.weights": "lsq", "finetune.activations": "pact", "finetune.scale_lr": 0.1, "finetune.freeze": 0.3,
    "finetune.labels": 2, "finetune.distill": 3, "finetune.temperature": 7, "finetune.features": 3,
    "finetune.batch_norm": "reestimated",
}  # fmt: skip
# What decides how fast a run is, where it runs or what else it leaves, and no figure of it; and what needs files.
ELSEWHERE = {
    "version", "model.name", "model.submodule", "data.kind", "data.classes", "data.workers", "calibration.manifest",
    "calibration.batch_size", "quant.mixed.max_drop", "reconstruct.time", "reconstruct.cache_limit",
    "evaluation.batch_size", "export.onnx", "export.storage", "export.images", "export.evaluate", "finetune.accumulate",
    "finetune.precision", "train.accumulate", "train.precision", "threads", "device", "runs",
}  # fmt: skip
SECTIONS = ("quant.mixed", "finetune", "train", "data.calibration_preprocess")  # changed only where the base has them


def network() -> nn.Module:
    """Two blocks, one with a sum, and a classifier of 10 classes, for grey images of any size."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                                       nn.Conv2d(6, 6, 3, padding=1))  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.inner(x))

    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), Sum(), nn.Conv2d(6, 8, 3, groups=2)
        made = nn.Sequential(*layers, nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
        with torch.no_grad():
            for _ in range(20):
                made(torch.randn(64, 1, 8, 8))
    return made.eval()


def outcome(recipe: Recipe) -> str:
    """A hash of all that a run finds: codes, scales, chosen images, scores; of a training its weights.

    Raises:
        CalibQuantError: the run is not possible.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe.model_copy(update={"runs": Path(folder)})
        if recipe.train is not None:
            run = train(recipe, network()).folder
            files, kept = ("weights.safetensors",), ("float", "epochs", "best_epoch")
        else:
            run = quantize(recipe, network()).folder
            files, kept = ("model.safetensors", "manifest.csv"), ("float", "quantized", "mixed", "finetune", "skipped")
        metrics = json.loads((run / "metrics.json").read_bytes())
        told = json.dumps({name: _timeless(metrics.get(name)) for name in kept}, sort_keys=True)
        return hashlib.sha256(b"".join((run / name).read_bytes() for name in files) + told.encode()).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key != "seconds"}
    return value


@cache
def base_outcome(base: str) -> str:
    """The outcome of a base recipe as it is."""
    return outcome(recipe_of(base))


def recipe_of(base: str, field: str | None = None) -> Recipe:
    """A base recipe, with the other value of a field."""
    return make_recipe({}, [*COMMON, *BASES[base], *([] if field is None else [f"{field}={OTHER[field]}"])])


def fields_of(base: str) -> Iterator[str]:
    """The fields that can be changed under a base recipe."""
    plain = recipe_of(base)
    read = {*READS["quantize" if plain.train is None else "train"], "seed"}
    for field in leaves(Recipe):
        section = next((name for name in SECTIONS if field.startswith(f"{name}.")), None)
        reads = field.partition(".")[0] in read and field not in ELSEWHERE
        if reads and (section is None or value_at(plain, section) is not None):
            yield field


def verdict(base: str, field: str) -> str:
    """What a change of a field does: "acts", "warned", "refused", "silent" or "false warning"."""
    try:
        recipe = recipe_of(base, field)
        if value_at(recipe, field) == value_at(recipe_of(base), field):
            return "same value"
        command: Command = "train" if recipe.train is not None else "quantize"
        warned = field in [idle.field for idle in idle_fields(recipe, command)]
        acts = outcome(recipe) != base_outcome(base)
    except CalibQuantError:
        return "refused"
    if warned:
        return "false warning" if acts else "warned"
    return "acts" if acts else "silent"


def main() -> None:
    torch.set_num_threads(1)
    counts = Counter[str]()
    for base in sys.argv[1:] or BASES:
        for field in fields_of(base):
            found = verdict(base, field)
            counts[found] += 1
            if found in ("silent", "false warning"):
                print(f"{base}: {field}={OTHER[field]}: {found}", flush=True)
        print(f"{base} done: {dict(counts)}", file=sys.stderr, flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
