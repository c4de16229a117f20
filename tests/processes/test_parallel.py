"""Threads and memory of the process."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calibquant.data import TensorImages
from calibquant.parallel import decoding_threads, fit_threads, products_of, set_threads
from calibquant.pipeline import quantize

FAULTS = """
import resource, torch
from calibquant.parallel import set_threads
{before}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(25_000_000)  # 100 MB
start = faults()
for _ in range(40):
    torch.zeros(25_000_000)
print(faults() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeps memory with glibc only")
def test_freed_memory_is_used_again() -> None:
    counts = []
    for before in ("set_threads(1)", ""):
        code = FAULTS.format(before=before)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        counts.append(int(done.stdout))
    kept, given_back = counts
    assert kept < given_back / 2


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process has three threads of its own, and nobody has set OMP_NUM_THREADS."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def layer(size: int) -> tuple[nn.Module, torch.Tensor]:
    """A convolution of 9 * 4 * 8 * size² products for an image, and two images."""
    return nn.Conv2d(4, 8, 3, padding=1), torch.zeros(2, 4, size, size)


def test_products_are_counted_as_by_hand() -> None:
    network, images = layer(10)
    assert products_of(network, images[:1]) == 9 * 4 * 8 * 100
    linear = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 5))
    assert products_of(linear, torch.zeros(3, 4, 10, 10)) == 3 * (9 * 4 * 16 + 64 * 5)


@pytest.mark.parametrize(
    ("size", "count", "environment", "expected"),
    [
        (185, None, {}, 1),  # 9.86 million products
        (187, None, {}, 3),  # 10.07 million
        (8, 2, {}, 2),
        (8, None, {"OMP_NUM_THREADS": "3"}, 3),
    ],
)
def test_a_small_network_takes_one_thread_unless_the_user_has_said_how_many(
    size: int, count: int | None, environment: dict[str, str], expected: int, threads: None, monkeypatch: Any
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert fit_threads(count, *layer(size)) == torch.get_num_threads() == expected
    assert decoding_threads() == (count or 3)


def test_what_one_run_sets_is_not_the_next_one_s_default(threads: None) -> None:
    assert fit_threads(None, *layer(8)) == 1
    assert set_threads(None) == 3
    assert set_threads(2) == 2
    assert set_threads(None) == 3
    torch.set_num_threads(4)  # the user's own
    assert (decoding_threads(), set_threads(None)) == (4, 4)


def test_a_run_says_how_many_threads_it_took(threads: None, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3))
    images = TensorImages(torch.rand(8, 3, 6, 6))
    recipe = {"runs": str(tmp_path), "calibration": {"count": 8}, "export": {"onnx": False}}
    run = quantize(recipe, network, images)
    assert json.loads((run.folder / "receipt.json").read_text())["threads"] == 1
    assert "INFO threads: 1" in (run.folder / "log.txt").read_text()
