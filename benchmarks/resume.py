"""Kills a reconstruction at random moments, one of them while a checkpoint is written, and goes on with it each time.

    python benchmarks/resume.py [--kills 10]

Shows that the files of the run are those of an uninterrupted one, byte for byte. Needs no data; a few minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

FILES = ("model.safetensors", "graph.json", "record.json", "record.txt", "manifest.csv")
QUANTIZE = """
import sys
from pathlib import Path
from calibquant import pipeline
from calibquant.runfolder import RunFolder
from calibquant.studies.digits import FIELDS
weights, runs, resume, slow = sys.argv[1:]
if slow == "slow":  # stay long inside the writing of a checkpoint
    import os, time
    write = os.fsync
    os.fsync = lambda file: (time.sleep(5), write(file))
fields = FIELDS | {"runs": runs, "threads": 1, "model": {"name": "digits_resnet", "weights": weights},
    "quant": {"weights": {"bits": 2}, "activations": {"bits": 2}},
    "reconstruct": {"method": "qdrop", "iterations": 200, "rounding_lr": 1e-2}}
pipeline.resume(Path(resume)) if resume != "-" else pipeline.quantize(fields)
"""


def run(weights: Path, runs: Path, resume: str, kill_after: float | None, slow: bool = False) -> bool:
    """One process; True when it was killed, False when it finished."""
    arguments = [sys.executable, "-c", QUANTIZE, str(weights), str(runs), resume, "slow" if slow else "-"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    if kill_after is not None:
        if slow:  # wait until a checkpoint is half written
            while not list(runs.glob(".*.partial/.checkpoint*.tmp")) and process.poll() is None:
                time.sleep(0.01)
        else:
            time.sleep(kill_after)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
    assert process.wait() == 0, process.stderr.read().decode() if process.stderr else ""
    return False


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def main() -> None:
    from calibquant.studies.digits import train_digits

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights = train_digits(root / "digits.safetensors", seed=0)
        begin = time.perf_counter()
        run(weights, root / "whole", "-", None)
        seconds = time.perf_counter() - begin
        expected = hashes(next((root / "whole").glob("digits*")))
        kills, moments, runs = 0, list[str](), root / "killed"
        name = runs / "digits_resnet-w2a2-001"
        while kills < given.kills:
            interrupted = list(runs.glob(".*.partial/checkpoint.json"))
            slow = kills == given.kills // 2
            after = draw.uniform(0.3, 0.9) * seconds
            if run(weights, runs, str(name) if interrupted else "-", after, slow):
                kills += 1
                done = [p.name for p in runs.glob(".*.partial/checkpoint-*.safetensors")]
                moments.append(f"{'writing a checkpoint' if slow else f'after {after:.1f} s'}: {done or 'none yet'}")
            if name.exists():  # it finished before it could be killed: check it and begin anew
                assert hashes(name) == expected
                name.rename(root / f"finished-{time.monotonic_ns()}")
            for stale in runs.glob(".*.partial"):  # killed before its first checkpoint: nothing to go on with
                if not (stale / "checkpoint.json").is_file():
                    for path in stale.iterdir():
                        path.unlink()
                    stale.rmdir()
        run(weights, runs, str(name) if list(runs.glob(".*.partial/checkpoint.json")) else "-", None)
        same = {file: value == expected[file] for file, value in hashes(name).items()}
        lines = [[str(i + 1), m] for i, m in enumerate(moments)]
        text = common.table(["kill", "moment: checkpoints there"], lines) + f"\nFiles equal at the end: {same}\n"
        facts = {"kills": kills, "moments": moments, "equal": same, "seconds_uninterrupted": round(seconds, 1)}
        common.write("resume", f"python benchmarks/resume.py --kills {given.kills}", facts, text)
        assert all(same.values())


if __name__ == "__main__":
    main()
