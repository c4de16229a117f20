"""Fixtures of all tests. Nothing here is needed by the product; real data is read where it lies, never copied."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from calibquant.cli.waiting import wait_briefly

wait_briefly()  # before torch is imported, and for what the tests start

import torch  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: $CALIBQUANT_DATA, or ../shared/data beside the repository."""
    given = os.environ.get("CALIBQUANT_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "unpack_cifar10.py").is_file():
        pytest.skip(f"real data is not at {folder}; set CALIBQUANT_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def cifar10_bin(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the real CIFAR-10 as cifar-10-batches-bin (50,000 train, 5,000 test), one for all workers."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    ready = shared / "cifar10"
    if not ready.is_dir():
        fresh = tmp_path_factory.mktemp("unpack") / "cifar10"
        subprocess.run([sys.executable, shared_data / "unpack_cifar10.py", fresh], check=True, capture_output=True)
        try:
            fresh.rename(ready)
        except OSError:  # another worker was faster, and its copy is as good
            shutil.rmtree(fresh)
    return ready
