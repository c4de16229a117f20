"""One thread or all, by the size of the network: the measurement behind `calibquant.parallel.SMALL`.

    python benchmarks/threads.py [--busy N] [--rounds R]

Times a forward pass and a learning step (forward and backward) of zoo networks with random weights, on one thread and
on all, alternating. --busy N runs N processes beside it that keep a core busy each. OpenMP's threads wait as the
command lets them (`calibquant.cli.waiting`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from busy import busy_processes
from common import table, write

import torch  # isort: skip  # common has set how its threads wait
from calibquant.parallel import SMALL, products_of
from calibquant.zoo import build

CASES = (
    ("digits_resnet", (1, 16, 16), 32), ("digits_resnet", (1, 24, 24), 32), ("mobilenet_v1_vww", (3, 96, 96), 32),
    ("digits_resnet", (1, 32, 32), 32), ("resnet8", (3, 32, 32), 32), ("cifar_resnet20", (3, 32, 32), 32),
    ("mobilenet_v2", (3, 96, 96), 32), ("mobilenet_v2", (3, 224, 224), 10), ("resnet18", (3, 224, 224), 10),
)  # fmt: skip
AT_LEAST = 0.2  # seconds of one timing


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--busy", type=int, default=0, help="busy processes beside it")
    arguments.add_argument("--rounds", type=int, default=7, help="timings of each")
    given = arguments.parse_args()
    threads = torch.get_num_threads()
    with busy_processes(given.busy):
        found = [_measure(name, shape, batch, threads, given.rounds) for name, shape, batch in CASES]
    found.sort(key=lambda row: row["products"])
    header = ["network", "image", "million multiply-adds", "batch"]
    for what in ("forward", "step"):
        header += [f"{what}: ms on 1 thread", f"on {threads}", "times as fast"]
    rows = [
        [row["network"], "x".join(map(str, row["image"])), f"{row['products'] / 1e6:.1f}", str(row["batch"]),
         *(f"{number:.2f}" for what in ("forward", "step") for number in
           (row[what][0], row[what][1], row[what][0] / row[what][1]))]
        for row in found
    ]  # fmt: skip
    own = f" --busy {given.busy}" if given.busy else ""
    text = table(header, rows) + (
        f"\n{threads} cores, {given.busy} busy processes beside it; medians of {given.rounds}. "
        f"Networks of less than {SMALL / 1e6:.0f} million multiply-adds an image take one thread.\n"
    )
    name = f"threads-busy{given.busy}" if given.busy else "threads"
    write(name, f"python benchmarks/threads.py{own}", {"threads": threads, "busy": given.busy, "rows": found}, text)


def _measure(name: str, shape: tuple[int, ...], batch: int, threads: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    network, images = build(name).eval(), torch.randn(batch, *shape)

    def forward() -> None:
        with torch.inference_mode():
            network(images)

    def step() -> None:
        network(images).square().mean().backward()

    row = {"network": name, "image": shape, "batch": batch, "products": products_of(network, images[:1])}
    return row | {what: _both(work, threads, rounds) for what, work in (("forward", forward), ("step", step))}


def _both(work: Callable[[], None], threads: int, rounds: int) -> list[float]:
    """Median milliseconds on one thread and on all."""
    work()
    often = max(1, round(AT_LEAST / _seconds(work, 1)))
    times: dict[int, list[float]] = {1: [], threads: []}
    for _ in range(rounds):
        for count, found in times.items():
            torch.set_num_threads(count)
            work()
            found.append(_seconds(work, often))
    return [1e3 * median(times[count]) for count in (1, threads)]


def _seconds(work: Callable[[], None], often: int) -> float:
    start = time.perf_counter()
    for _ in range(often):
        work()
    return (time.perf_counter() - start) / often


if __name__ == "__main__":
    main()
