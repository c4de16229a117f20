"""Many thousands of damaged files for every loader; see tests/fuzz/.

    python benchmarks/fuzz.py [--seconds 600] [--cases 20000] [--loader NAME …] [--again]

Each loader is tried in its own process, with limits on memory and on the time of a case. If a process dies or hangs,
the case that it was at counts as a fault, and a new process continues with the next case. Loaders take turns in slices
of `SLICE` cases until the time is up. The same command continues after the last case of every loader in
results/fuzz.json, so that no case is tried twice. Use --again after a change of the package: it starts from case 0.
"""

from __future__ import annotations

import argparse
import json
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

TESTS = Path(__file__).parents[1] / "tests"
SLICE = 250
PATIENCE = 25.0  # seconds without a word from a process: 10 of a case, and those that it needs to start
COMMAND = "python benchmarks/fuzz.py"


def table_of_loaders() -> dict[str, Any]:
    sys.path.insert(0, str(TESTS))
    from fuzz import LOADERS

    return LOADERS


# --- in the process that tries a loader -------------------------------------------------------------------------------


def work(name: str, first: int, count: int) -> None:
    """Print a line of JSON when ready, then one for each case."""
    import torch

    torch.set_num_threads(1)
    loader = table_of_loaders()[name]
    from fuzz import Site

    with tempfile.TemporaryDirectory() as folder:
        site = Site(loader, Path(folder) / "site")
        good = site.good()
        print(json.dumps({"seed": None, "word": good.word, "text": good.text}), flush=True)
        for seed in range(first, first + count):
            found = site.run(seed)
            text = found.text if found.word == "fault" else ""
            line = {"seed": seed, "word": found.word, "text": text, "damage": found.damage, "seconds": found.seconds}
            print(json.dumps(line), flush=True)


# --- in the process that counts ---------------------------------------------------------------------------------------


def outcomes(name: str, first: int, count: int) -> Iterator[dict[str, Any]]:
    """The outcomes of the cases; one in which the process hangs or dies is a fault too."""
    end = first + count
    while first < end:
        arguments = [sys.executable, __file__, "--work", name, str(first), str(end - first)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1)
        started = False
        try:
            for line in _lines(process):
                found = json.loads(line)
                if found["seed"] is None:
                    started = True
                    if found["word"] != "accepted":
                        raise SystemExit(f"{name}: its good files are not accepted: {found['text']}")
                    continue
                first = found["seed"] + 1
                yield found
        finally:
            if first < end:  # it hangs, or nobody asks for more
                process.kill()
            code = process.wait()
        if first < end:
            if not started:
                raise SystemExit(f"{name}: its process ended with {code} before the first case")
            text = f"the process hung or died (exit code {code})"
            yield {"seed": first, "word": "fault", "text": text, "damage": [], "seconds": PATIENCE}
            first += 1


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """The lines of a process, which is ended where none comes for too long."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        patience = 120.0  # for imports and good files on a busy machine
        while True:
            if not selector.select(patience):
                process.kill()
                return
            line = process.stdout.readline()
            if not line:
                return
            patience = PATIENCE
            yield line


def empty_row() -> dict[str, Any]:
    return {"cases": 0, "accepted": 0, "refused": 0, "fault": 0, "slowest": 0.0, "faults": []}


def add(row: dict[str, Any], found: dict[str, Any]) -> None:
    row["cases"] = found["seed"] + 1
    row[found["word"]] += 1
    row["slowest"] = max(row["slowest"], round(found["seconds"], 2))
    if found["word"] == "fault":
        row["faults"].append({key: found[key] for key in ("seed", "damage", "text")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--cases", type=int, default=20_000, help="of each loader at most")
    parser.add_argument("--loader", action="append", help="only this one")
    parser.add_argument("--again", action="store_true", help="begin anew")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work[0], int(arguments.work[1]), int(arguments.work[2]))
        return
    names, path = list(table_of_loaders()), common.RESULTS / "fuzz.json"
    rows: dict[str, Any] = {} if arguments.again or not path.is_file() else json.loads(path.read_text())["loaders"]
    end = time.monotonic() + arguments.seconds
    chosen = arguments.loader or names
    while chosen and time.monotonic() < end:
        for name in list(chosen):
            row = rows.setdefault(name, empty_row())
            count = min(SLICE, arguments.cases - row["cases"])
            for found in outcomes(name, row["cases"], count) if count > 0 else ():
                add(row, found)
                if time.monotonic() > end:
                    break
            if row["cases"] >= arguments.cases:
                chosen.remove(name)
            write({name: rows[name] for name in names if name in rows})
            if time.monotonic() > end:
                break


def write(rows: dict[str, Any]) -> None:
    words = ("cases", "accepted", "refused", "fault")
    lines = [[name, *(f"{row[word]:,}" for word in words), f"{row['slowest']:.1f}"] for name, row in rows.items()]
    lines.append(["all", *(f"{sum(row[word] for row in rows.values()):,}" for word in words), ""])
    header = ["loader", "mutations", "accepted", "refused", "faults", "slowest (s)"]
    faults = [f"- {name}, case {f['seed']}: {f['text'][:300]}\n" for name, row in rows.items() for f in row["faults"]]
    markdown = common.table(header, lines) + ("\nFaults:\n\n" + "".join(faults) if faults else "")
    common.write("fuzz", COMMAND, {"loaders": rows}, markdown)


if __name__ == "__main__":
    main()
