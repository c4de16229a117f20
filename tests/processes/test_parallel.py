"""Threads and memory of the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
