"""Small synthetic image files and CIFAR-10 files, made where a test needs them."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def random_pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def save_image(tmp_path: Path) -> Callable[..., Path]:
    """save_image("a/b.png", height, width, mode="RGB", seed=0) -> path of a random image under tmp_path."""

    def save(name: str, height: int = 6, width: int = 8, mode: str = "RGB", seed: int = 0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random_pixels(height, width, 3, seed=seed))
        image.convert(mode).save(path)
        return path

    return save


@pytest.fixture
def cifar_records() -> Callable[[int, int], tuple[Pixels, list[int]]]:
    """cifar_records(count, seed) -> pixels (count, 3072) and labels."""

    def make(count: int, seed: int) -> tuple[Pixels, list[int]]:
        labels = np.random.default_rng(seed + 100).integers(0, 10, count)
        return random_pixels(count, 3072, seed=seed), [int(x) for x in labels]

    return make


@pytest.fixture
def write_bin() -> Callable[[Path, Pixels, list[int]], None]:
    def write(path: Path, pixels: Pixels, labels: list[int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True)))

    return write


@pytest.fixture
def write_py() -> Callable[..., None]:
    """Write a python-form batch: as Python 2 did for the official files, or by this Python's pickle."""

    def write(path: Path, pixels: Pixels, labels: list[int], python2: bool = True, protocol: int = 2) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tree = {"batch_label": "x", "labels": labels, "data": pixels, "filenames": ["a.png"] * len(labels)}
        path.write_bytes(_python2_pickle(pixels, labels) if python2 else pickle.dumps(tree, protocol))

    return write


def _python2_pickle(pixels: Pixels, labels: list[int]) -> bytes:
    """What Python 2's cPickle writes at protocol 2, opcode by opcode: byte strings and numpy's old module names."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    raw = pixels.tobytes()
    out = io.BytesIO()
    out.write(b"\x80\x02}(")
    out.write(text(b"labels") + b"](" + b"".join(number(label) for label in labels) + b"e")
    out.write(text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n")
    out.write(number(0) + b"\x85" + text(b"b") + b"\x87R")
    shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    out.write(b"(" + number(1) + shape + dtype + b"\x89" + b"T" + struct.pack("<i", len(raw)) + raw + b"tb")
    out.write(b"u.")
    return out.getvalue()
