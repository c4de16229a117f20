"""The place where a bad input is tried: an own folder with two good recipes and images, and the means to spoil them."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from calibquant import zoo

DIGITS = """\
model: {name: digits_resnet}
data: {kind: digits, preprocess: {resize: 16, mean: [0.5], std: [0.5]}}
calibration: {count: 16}
evaluation: {count: 16}
quant: {weights: {observer: minmax}, activations: {observer: minmax}}
threads: 1
runs: runs
"""
FOLDER = """\
model: {name: cifar_resnet20, options: {num_classes: 2}}
data: {kind: folder, root: images}
calibration: {count: 4}
quant: {weights: {observer: minmax}, activations: {observer: minmax}}
threads: 1
runs: runs
"""


class Mine:
    """A pickle of this makes the folder `mark` when it is loaded without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("mark",)


@dataclass(frozen=True)
class Site:
    """The current folder of one case.

    Attributes:
        root: the folder; holds digits.yaml, folder.yaml and images/{train,val}/{cat,dog}/{0,1}.png of 12 x 16 pixels.
        monkeypatch: of the test.
        finished: a complete run to copy.
    """

    root: Path
    monkeypatch: pytest.MonkeyPatch
    finished: Path

    def prepare(self) -> None:
        """Write what every case may use, and go there."""
        self.write("digits.yaml", DIGITS)
        self.write("folder.yaml", FOLDER)
        for split in ("train", "val"):
            for name in ("cat/0", "cat/1", "dog/0", "dog/1"):
                self.image(f"images/{split}/{name}.png")
        self.monkeypatch.chdir(self.root)

    def write(self, name: str, content: str | bytes) -> Path:
        """A file of the given content."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def image(self, name: str, mode: str = "RGB", height: int = 12, width: int = 16) -> Path:
        """A random image file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if mode == "I;16":
            Image.fromarray(np.arange(height * width, dtype=np.uint16).reshape(height, width) * 200).save(path)
        else:
            pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(path)
        return path

    def tar(self, name: str, *members: str) -> None:
        """images/NAME: a tar of some of images/train."""
        with tarfile.open(self.root / "images" / name, "w") as tar:
            for member in members:
                tar.add(self.root / "images/train" / member, arcname=member)

    def cut(self, name: str, keep: float) -> None:
        """Keep the first part of a file."""
        path = self.root / name
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    def state(self) -> dict[str, Tensor]:
        """Weights that fit digits_resnet."""
        return zoo.build("digits_resnet").state_dict()

    def pth(self, change: Callable[[dict[str, Tensor]], Any]) -> None:
        """w.pth: a state_dict after a change."""
        state = self.state()
        changed = change(state)
        torch.save(state if changed is None else changed, self.root / "w.pth")

    def safetensors(self) -> None:
        """w.safetensors: a good file."""
        save_file(self.state(), self.root / "w.safetensors")

    def cifar(self, name: str, content: bytes) -> None:
        """A file of CIFAR-10 at images/."""
        self.write(f"images/{name}", content)

    def run(self, change: Callable[[Path], Any] = lambda run: None) -> None:
        """runs/done: a complete run after a change."""
        shutil.copytree(self.finished, self.root / "runs/done")
        change(self.root / "runs/done")

    def fail(self, target: str, error: BaseException) -> None:
        """Make a function raise."""

        def broken(*_: Any, **__: Any) -> NoReturn:
            raise error

        self.monkeypatch.setattr(target, broken)

    def full_disk(self, target: str) -> None:
        """Make a function meet a full disk."""
        self.fail(target, OSError(errno.ENOSPC, "No space left on device"))

    def network(self, network: nn.Module) -> None:
        """Let the zoo build this network."""
        self.monkeypatch.setattr("calibquant.pipeline.preparing.build_model", lambda recipe, tell: network.eval())


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def mine() -> bytes:
    """A pickle that runs code, in the place of CIFAR-10's pixels."""
    return pickle.dumps({b"data": Mine(), b"labels": [0]}, protocol=2)
