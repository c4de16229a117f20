"""Decoding in processes: the same batches, errors and skipped images as by threads, and nothing left behind."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calibquant.data import Batch, ImageSet, batches, loading, open_images
from calibquant.errors import DataError
from calibquant.recipe import DataRecipe

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def _few_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "WORTH_PROCESSES", 1)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "val").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 6, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"val/{i:02d}.png")
    return tmp_path


def opened(root: Path, workers: int, on_error: str = "fail") -> ImageSet:
    fields = {"kind": "folder", "root": root, "workers": workers, "on_error": on_error}
    return open_images(DataRecipe.model_validate(fields), "evaluation")


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.indices == b.indices
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_and_no_random_number_is_drawn(pictures: Path, workers: int) -> None:
    chosen = [*range(39, 0, -2), 3, 3]
    threads, processes = (opened(pictures, n) for n in (0, workers))
    state = torch.get_rng_state()
    assert same(list(batches(processes, 18)), list(batches(threads, 18)))
    some = [list(batches(images.subset(chosen).subset(range(20)), 7, range(1, 20))) for images in (threads, processes)]
    assert same(*some)
    assert torch.equal(torch.get_rng_state(), state)
    assert multiprocessing.active_children() == []


def test_small_sets_start_no_process(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for _ in batches(opened(pictures, 2), 8):
        assert multiprocessing.active_children() == []


def test_unreadable_images_fail_or_are_skipped_as_by_threads(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, data in (("03", b""), ("20", b"no image"), ("21", b"no image")):
        (pictures / f"val/{name}.png").write_bytes(data)
    with pytest.raises(DataError, match=r"03.png: is empty; replace"):
        list(batches(opened(pictures, 1), 20))
    assert multiprocessing.active_children() == []
    threads, processes = (opened(pictures, n, "skip") for n in (0, 1))
    with caplog.at_level(logging.WARNING, logger="calibquant"):
        assert same(list(batches(processes, 20)), list(batches(threads, 20)))
    assert processes.skipped == threads.skipped == {"val/03.png", "val/20.png", "val/21.png"}
    assert len(caplog.records) == 6


def test_sizes_that_differ_are_named(pictures: Path) -> None:
    Image.new("RGB", (9, 9)).save(pictures / "val/05.png")
    with pytest.raises(DataError, match=r"val/05.png: is 9 x 9 but val/00.png of the same batch is 6 x 8"):
        list(batches(opened(pictures, 1), 8))


def test_a_killed_process_is_one_clear_line(pictures: Path) -> None:
    reader = batches(opened(pictures, 2), 2)
    next(reader)
    children = multiprocessing.active_children()
    assert len(children) == 2
    assert children[0].pid is not None
    os.kill(children[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"data.workers: a process was ended from outside .*; look for lack of memory"):
        list(reader)
    assert multiprocessing.active_children() == []


def test_a_reader_that_stops_ends_the_processes(pictures: Path) -> None:
    reader = batches(opened(pictures, 1), 2)
    next(reader)
    assert len(multiprocessing.active_children()) == 1
    reader.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


SCRIPT = """
import multiprocessing, signal, sys, time
from calibquant.data import batches, loading, open_images
from calibquant.recipe import DataRecipe

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
    loading.WORTH_PROCESSES = 1
    for _ in batches(open_images(DataRecipe(kind="folder", root=sys.argv[1], workers=1), "evaluation"), 2):
        print(*[p.pid for p in multiprocessing.active_children()], flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_outlives_a_run_that_is_interrupted_or_killed(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", pictures]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    children = [Path("/proc", run.stdout.readline().split()[0].decode()) for run in runs if run.stdout]
    assert all(child.exists() for child in children)
    for run, number in zip(runs, (signal.SIGINT, signal.SIGKILL), strict=True):
        run.send_signal(number)
        run.communicate()
    deadline = time.monotonic() + 30
    while any(child.exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(child.exists() for child in children)


def test_mapped_cifar10_is_not_sent_by_value(tmp_path: Path) -> None:
    records = np.random.default_rng(0).integers(0, 10, (200, 3073), dtype=np.uint8)
    records.tofile(tmp_path / "test_batch.bin")
    images = open_images(DataRecipe(kind="cifar10", root=tmp_path, workers=1), "evaluation")
    sent = pickle.dumps(images)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent).image(7), images.image(7))
    expected = [images.image(i) for i in range(200)]
    assert torch.equal(torch.cat([batch.images for batch in batches(images, 50)]), torch.stack(expected))
