"""Times a command alone and beside busy processes.

    python benchmarks/busy.py [--busy 0 2 4] [--rounds R] [--limit SECONDS] -- make demo

Each busy process is a Python loop that keeps one core busy. The order of the numbers is kept in each round, and nothing
else should run on the machine. What the command prints goes to a temporary file, of which the end is shown if it fails.
A time above the limit is printed as such, and the command is ended.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

LOOP = "while True: pass"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Within the context so many other processes keep a core busy each."""
    processes = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def seconds_of(command: Sequence[str], limit: float) -> float | None:
    """How long a command takes; None if it is not done within the limit.

    Raises:
        SystemExit: the command fails.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                process.wait()
        taken = time.perf_counter() - start
        if code:
            output.seek(0)
            end = output.read()[-2000:].decode("utf-8", "replace")
            raise SystemExit(f"{end}\n{' '.join(command)} ended with exit code {code}")
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2, 4], help="numbers of busy processes")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is timed; the median is shown")
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which the command is ended")
    parser.add_argument("command", nargs="+", help="behind --")
    given = parser.parse_args()
    times: dict[int, list[float]] = {count: [] for count in given.busy}
    for _ in range(given.rounds):
        for count, found in times.items():
            with busy_processes(count):
                taken = seconds_of(given.command, given.limit)
            found.append(float("inf") if taken is None else taken)
    first = median(times[given.busy[0]])
    for count, found in times.items():
        middle = median(found)
        known = f"{middle:.1f} s, {middle / first:.2f} times" if middle < float("inf") else f"over {given.limit:.0f} s"
        print(f"{' '.join(given.command)} beside {count} busy processes on {os.cpu_count()} cores: {known}")


if __name__ == "__main__":
    main()
