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
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import common
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fuzz import LOADERS, Site

SLICE = 500
PATIENCE = 25.0  # seconds without a word from a process: 10 of a case, and what a busy machine adds
COMMAND = "python benchmarks/fuzz.py"


# --- in the process that tries a loader -------------------------------------------------------------------------------


def work(name: str, first: int, count: int, results: Connection) -> None:
    """Send a word on the good files, then the outcome of each case."""
    with tempfile.TemporaryDirectory() as folder:
        site = Site(LOADERS[name], Path(folder) / "site")
        good = site.good()
        results.send({"seed": None, "word": good.word, "text": good.text})
        for seed in range(first, first + count):
            found = site.run(seed)
            text = found.text if found.word == "fault" else ""
            results.send({"seed": seed, "word": found.word, "text": text, "damage": found.damage,
                          "seconds": found.seconds})  # fmt: skip


# --- in the process that counts ---------------------------------------------------------------------------------------


def outcomes(name: str, first: int, count: int) -> Iterator[dict[str, Any]]:
    """The outcomes of the cases; one in which the process hangs or dies is a fault too."""
    end = first + count
    fork = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    while first < end:
        results, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=work, args=(name, first, end - first, theirs))
        process.start()
        theirs.close()
        try:
            for found in received(results):
                if found["seed"] is None:
                    if found["word"] != "accepted":
                        raise SystemExit(f"{name}: its good files are not accepted: {found['text']}")
                    continue
                first = found["seed"] + 1
                yield found
        finally:
            if first < end:  # it hangs, or nobody asks for more
                process.kill()
            process.join()
        if first < end:
            text = f"the process hung or died (exit code {process.exitcode})"
            yield {"seed": first, "word": "fault", "text": text, "damage": [], "seconds": PATIENCE}
            first += 1


def received(results: Connection) -> Iterator[dict[str, Any]]:
    """What a process sends until it ends, or says nothing for too long."""
    patience = 120.0  # for the good files on a busy machine
    while results.poll(patience):
        try:
            yield results.recv()
        except EOFError:
            return
        patience = PATIENCE


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
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names, path = list(LOADERS), common.RESULTS / "fuzz.json"
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
