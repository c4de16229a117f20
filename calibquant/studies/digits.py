"""The demo: a small ResNet trained on handwritten digits, then quantized in several ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibquant.pipeline import Reporter, Run, quantize
from calibquant.pipeline.reporting import Silent
from calibquant.pipeline.training import open_training, train_network
from calibquant.recipe import Recipe, make_recipe
from calibquant.runfolder import alone, check_place, make_folder
from calibquant.zoo import save_weights

EPOCHS = 12
FIELDS: dict[str, Any] = {
    "model": {"name": "digits_resnet"},
    "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}},
    "calibration": {"count": 256},
    "quant": {"placement": "integer"},
}
TRAINING: dict[str, Any] = {
    "data": FIELDS["data"] | {"augment": {"pad": 1}},
    "train": {"batch_size": 64, "lr": 0.1, "schedule": "one-cycle", "label_smoothing": 0.1},
}
# A tenth of the usual steps at ten times the usual learning rates: rounding variables move about one rate a step.
SHORT = {"iterations": 400, "rounding_lr": 1e-2, "scale_lr": 1e-3}
SETTINGS = ((8, "none"), (4, "none"), (2, "none"), (2, "qdrop"))  # bits of weights and activations, reconstruction


def digits_recipe(weights: Path, bits: int, runs: Path, seed: int, method: str = "none") -> Recipe:
    """The demo's recipe at W`bits`A`bits`, with nearest rounding or a short reconstruction."""
    short = {} if method == "none" else SHORT
    fields = {"runs": str(runs), "seed": seed, "reconstruct": {"method": method, **short}}
    return make_recipe(
        FIELDS | fields,
        [f"model.weights={weights}", f"quant.weights.bits={bits}", f"quant.activations.bits={bits}"],
    )


def train_digits(path: Path, seed: int, reporter: Reporter | None = None) -> Path:
    """Train the demo's network on scikit-learn's digits (1,200 images of 8×8, enlarged to 16×16) and save it.

    Returns:
        `path`, a safetensors file.
    """
    check_place(path.parent)
    make_folder(path.parent)
    recipe = make_recipe(FIELDS | TRAINING | {"seed": seed}, [f"train.epochs={EPOCHS}"])
    job = open_training(recipe)
    if reporter:
        reporter.step(1, 1, f"Train a small ResNet on {len(job.source.images)} digits")
    network = train_network(job, recipe, reporter or Silent())
    with alone(path):
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # what a kill left
            left.unlink(missing_ok=True)
        save_weights(network, path)
    return path


def run_digits(runs: Path, seed: int, reporter: Reporter | None = None) -> list[Run]:
    """Train once, quantize once for each of `SETTINGS`."""
    weights = train_digits(runs / "demo-digits.safetensors", seed, reporter)
    return [quantize(digits_recipe(weights, bits, runs, seed, method), reporter=reporter) for bits, method in SETTINGS]
