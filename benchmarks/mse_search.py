"""Times the exhaustive search for the range of least error against the pruned one, and checks that they agree.

    python benchmarks/mse_search.py

Prints a Markdown table and writes benchmarks/results/mse_search.json. One thread, under three minutes.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from calibquant.numerics.clipping import mse_range, mse_range_exhaustive, mse_range_of
from calibquant.numerics.grid import Granularity, Grid, PerChannel, PerTensor
from calibquant.numerics.histogram import Histogram

RESULT = Path(__file__).parent / "results" / "mse_search.json"


def cases() -> list[tuple[str, Tensor, int, bool, Granularity, bool]]:
    """Name, tensor, bits, symmetric, granularity, and whether the exhaustive search is affordable."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    linear, conv, heavy = normal(1000, 1280) * 0.05, normal(64, 64, 3, 3) * 0.1, normal(512, 512, 3, 3) ** 3
    channel, tensor = PerChannel(0), PerTensor()
    big = normal(4_000_000)
    return [
        ("conv 64x64x3x3", conv, 4, False, channel, True),
        ("conv 64x64x3x3", conv, 8, False, channel, True),
        ("depthwise 512x1x3x3", normal(512, 1, 3, 3), 8, False, channel, True),
        ("linear 1000x1280", linear, 4, False, channel, True),
        ("linear 1000x1280, symmetric", linear, 8, True, channel, True),
        ("activation 4M after ReLU", big.relu(), 4, False, tensor, True),
        ("activation 200k two-sided", big[:200_000], 4, False, tensor, True),
        ("linear 1000x1280", linear, 8, False, channel, False),
        ("conv 512x512x3x3, heavy tails", heavy, 4, False, channel, False),
        ("activation 4M two-sided", big, 4, False, tensor, False),
        ("activation 4M two-sided", big, 8, False, tensor, False),
    ]


def timed(search: object, *arguments: object) -> tuple[float, tuple[Tensor, Tensor]]:
    start = time.perf_counter()
    result = search(*arguments)  # type: ignore[operator]
    return time.perf_counter() - start, result


def measure() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for name, x, bits, symmetric, granularity, affordable in cases():
        fast, ours = timed(mse_range, x, Grid(bits), symmetric, granularity)
        row: dict[str, object] = {"case": name, "bits": bits, "fast_s": round(fast, 3)}
        if affordable:
            slow, exact = timed(mse_range_exhaustive, x, Grid(bits), symmetric, granularity)
            equal = all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
            row |= {"exhaustive_s": round(slow, 3), "speedup": round(slow / fast, 1), "equal": equal}
        if isinstance(granularity, PerTensor):
            binning, histogram = timed(Histogram.empty().add, x)
            row["histogram_s"] = round(binning + timed(mse_range_of, histogram, Grid(bits), symmetric)[0], 3)
        found.append(row)
    return found


def main() -> None:
    torch.set_num_threads(1)
    rows = measure()
    columns = ["case", "bits", "exhaustive_s", "fast_s", "speedup", "equal", "histogram_s"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "–")) for column in columns) + " |")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.machine(), "torch": torch.__version__, "threads": 1}
    RESULT.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    if not all(row.get("equal", True) for row in rows):
        raise SystemExit("the two searches disagree")


if __name__ == "__main__":
    main()
