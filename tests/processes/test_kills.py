"""After `kill -9` at random moments a command ends with the bytes of an undisturbed one and leaves no rubbish."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"


def test_killed_commands_end_as_undisturbed_ones(tmp_path: Path) -> None:
    arguments = ["--kills", "2", "--commands", "train", "select", "--seed", "3", "--dry"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| train | 2 |" in done.stdout
    assert "| select | 2 | 0 | 2 | 2 of 2 |" in done.stdout
    assert done.stdout.count("2 of 2") == 2
    assert list(tmp_path.iterdir()) == []
