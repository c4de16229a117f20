"""Loaders of networks and runs: weights, the artifact, checkpoints, results of studies and ONNX files."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import calibquant
from calibquant.evaluation.onnx_network import OnnxNetwork
from calibquant.export.artifact import GRAPH, MODEL, load_artifact
from calibquant.export.onnx_content import read_onnx
from calibquant.export.session import open_session
from calibquant.graph.serialize import input_shapes
from calibquant.pipeline.checkpoint import Progress, load_checkpoint, save_checkpoint
from calibquant.pipeline.train_checkpoint import load_training, save_training
from calibquant.recipe import TrainRecipe
from calibquant.runfolder import CHECKPOINT, RECEIPT, RunFolder, newest_run, open_run, sha256
from calibquant.studies.compare.predictions import PREDICTIONS, read_predictions, write_predictions
from calibquant.training.engine import begin_training
from calibquant.zoo.weights import load_weights

from .loaders import Loader, command

SIDE = 8


def _network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3)
    return nn.Sequential(*body, nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


@functools.cache
def _run() -> Path:
    """A small finished run; made once for all loaders."""
    folder = Path(tempfile.mkdtemp(prefix="calibquant-fuzz-"))
    images = calibquant.TensorImages(torch.rand(16, 3, SIDE, SIDE), [i % 3 for i in range(16)])
    recipe: dict[str, Any] = {
        "runs": folder, "threads": 1, "calibration": {"count": 16},
        "quant": {"weights": {"bits": 4, "observer": "minmax"}, "activations": {"observer": "minmax"}},
    }  # fmt: skip
    return Path(calibquant.quantize(recipe, _network(), images).folder)


def _copy(*names: str) -> Callable[[Path], list[Path]]:
    """A copy of the run, of which some files are to be damaged."""

    def make(folder: Path) -> list[Path]:
        shutil.copytree(_run(), folder, dirs_exist_ok=True)
        return [folder / name for name in names]

    return make


def _reseal(folder: Path, target: Path) -> None:
    """The receipt has the damaged file's hash: who makes a hostile run can do that."""
    if target.name != RECEIPT and target.is_file():
        receipt = json.loads((folder / RECEIPT).read_bytes())
        receipt["files"][target.name] = sha256(target.read_bytes())
        (folder / RECEIPT).write_text(json.dumps(receipt))


def _load_artifact(folder: Path) -> None:
    """Load the network, and run two images through it if its shapes were checked; older runs do not name them."""
    model = load_artifact(RunFolder(folder))
    if input_shapes(model.teacher.graph) == [[3, SIDE, SIDE]]:
        with torch.no_grad():
            model(torch.rand(2, 3, SIDE, SIDE))


# --- weights ----------------------------------------------------------------------------------------------------------


def _weights(name: str) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        state, path = _network().state_dict(), folder / name
        if path.suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save({"model": state, "epoch": 3}, path, _use_new_zipfile_serialization=path.suffix == ".pt")
        return [path]

    return make


def _load_weights(name: str) -> Callable[[Path], object]:
    return lambda folder: load_weights(_network(), folder / name)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@functools.cache
def _model() -> Any:
    return load_artifact(RunFolder(_run()))


def _checkpoint(folder: Path) -> list[Path]:
    save_checkpoint(RunFolder(folder), _model(), "path\n", Progress([], {"x": 0.5}, {"calibrate": 1.0}), {})
    return sorted(folder.glob("checkpoint*"))


def _rehash(key: str) -> Callable[[Path, Path], None]:
    """The checkpoint has the damaged file's hash."""

    def mend(folder: Path, target: Path) -> None:
        if target.name != CHECKPOINT and target.is_file():
            stored = json.loads((folder / CHECKPOINT).read_bytes())
            stored["sha256"] = sha256((folder / stored[key]).read_bytes())
            (folder / CHECKPOINT).write_text(json.dumps(stored))

    return mend


def _training() -> Any:
    return begin_training(_network(), TrainRecipe(), 10, torch.device("cpu"))


def _train_checkpoint(folder: Path) -> list[Path]:
    save_training(RunFolder(folder), _training(), "images", {})
    return sorted(folder.glob("checkpoint*"))


# --- ONNX -------------------------------------------------------------------------------------------------------------


def _onnx(name: str) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        shutil.copy(_run() / name, folder / name)
        return [folder / name]

    return make


def _run_onnx(name: str) -> Callable[[Path], object]:
    def load(folder: Path) -> object:
        path = folder / name
        read_onnx(path)
        network = OnnxNetwork(open_session(str(path), path.read_bytes(), 1))
        return network(torch.rand(2, 3, SIDE, SIDE))

    return load


# --- studies ----------------------------------------------------------------------------------------------------------


def _predictions(folder: Path) -> list[Path]:
    write_predictions(folder, np.arange(5), np.arange(5))
    return [folder / PREDICTIONS]


JSON = ("json", "json", "text", "bytes")
RUNS = (
    Loader("weights (.pt)", ("zip", "pickle", "bytes"), _weights("w.pt"), _load_weights("w.pt")),
    Loader("weights (.pth, before zip)", ("pickle", "bytes"), _weights("w.pth"), _load_weights("w.pth")),
    Loader("weights (.safetensors)", ("safetensors", "bytes"), _weights("w.safetensors"),
           _load_weights("w.safetensors")),
    Loader("graph.json", JSON, _copy(GRAPH), _load_artifact, names=(GRAPH, MODEL)),
    Loader("model.safetensors", ("safetensors", "safetensors", "bytes"), _copy(MODEL), _load_artifact,
           names=(GRAPH, MODEL)),
    Loader("receipt.json", JSON, _copy(RECEIPT),
           lambda f: (open_run(f), newest_run(f.parent)), names=("site", RECEIPT)),
    Loader("inspect RUN", JSON, _copy("metrics.json", RECEIPT, GRAPH), lambda f: command("inspect", str(f)),
           names=("site",), mend=_reseal),
    Loader("export RUN", JSON, _copy("parity.json", "recipe.yaml", "manifest.csv"),
           lambda f: command("export", str(f)), names=("site", "onnx"), mend=_reseal),
    Loader("checkpoint", ("json", "safetensors", "text", "bytes"), _checkpoint,
           lambda f: load_checkpoint(RunFolder(f), _model(), "path\n"), names=("checkpoint", "site"),
           mend=_rehash("tensors")),
    Loader("checkpoint of a training", ("json", "zip", "pickle", "bytes"), _train_checkpoint,
           lambda f: load_training(RunFolder(f), _training(), "images"), names=("checkpoint", "site"),
           mend=_rehash("state")),
    Loader("float.onnx", ("onnx", "bytes"), _onnx("float.onnx"), _run_onnx("float.onnx")),
    Loader("deploy.onnx", ("onnx", "bytes"), _onnx("deploy.onnx"), _run_onnx("deploy.onnx")),
    Loader("inspect ONNX", ("onnx", "bytes"), _onnx("deploy.onnx"),
           lambda f: command("inspect", str(f / "deploy.onnx"))),
    Loader("predictions of a study", ("zip", "bytes"), _predictions, lambda f: read_predictions(f, 5)),
)  # fmt: skip
