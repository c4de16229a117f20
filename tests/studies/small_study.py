"""A study small enough to run: the digits with random weights and a reconstruction of a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibquant.studies.compare import Comparison
from calibquant.studies.digits import FIELDS
from calibquant.zoo import build, save_weights

Study = Callable[..., Comparison]


class Told:
    """A reporter that keeps what it hears."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, str]] = []
        self.notes: list[str] = []
        self.worked = 0

    def step(self, number: int, total: int, title: str) -> None:
        self.steps.append((number, total, title))

    def progress(self, done: int, total: int, where: str = "") -> None:
        self.worked += 1

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def ways(self) -> list[str]:
        """How each cell came about."""
        return [note.rsplit(", ", 1)[1] for note in self.notes if not note.startswith("warning: ")]


def study_fields(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    save_weights(build("digits_resnet"), folder / "digits.safetensors")
    return FIELDS | {
        "model": {"name": "digits_resnet", "weights": str(folder / "digits.safetensors")},
        "calibration": {"count": 16},
        "evaluation": {"count": 60},
        "quant": {"weights": {"observer": "minmax"}, "activations": {"observer": "minmax"}},
        "reconstruct": {"iterations": 3, "rounding_lr": 0.05},
        "runs": str(folder / "runs"),
        "threads": 1,
    }


def predictions(comparison: Comparison, cell: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    with np.load((comparison.folder / cell["run"]).parent / "predictions.npz", allow_pickle=False) as stored:
        return stored["predictions"], stored["labels"]


def without_seconds(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in cell.items() if key != "seconds"} for cell in result["cells"]]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
