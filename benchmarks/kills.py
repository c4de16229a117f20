"""Kills every command that writes at random moments, and lets it continue or run again each time.

    OMP_NUM_THREADS=1 python benchmarks/kills.py [--kills 5] [--commands quantize finetune …] [--seed 0] [--dry]

Each command does its work once undisturbed, then so many times with a `kill -9` at a random moment of it. Afterwards
it is resumed if it left a checkpoint, and else run again. Both ways it has to leave the same files with the same bytes,
and nothing else. Needs no data; a few minutes. Exits with 1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import common
import torch

import calibquant
from calibquant.pipeline import resume, resume_training
from calibquant.recipe import make_recipe
from calibquant.runfolder import CHECKPOINT
from calibquant.studies import compare, selection
from calibquant.studies.digits import FIELDS
from calibquant.zoo import build, save_weights

SMALL: dict[str, Any] = FIELDS | {
    "model": {"name": "digits_resnet", "weights": "digits.safetensors"},
    "calibration": {"count": 48, "batch_size": 24},
    "evaluation": {"count": 16},
    "export": {"onnx": False},
    "quant": {"weights": {"bits": 2}, "activations": {"bits": 2}},
    "threads": 1,
}
LEARNED = SMALL | {"reconstruct": {"method": "qdrop", "iterations": 4, "rounding_lr": 0.05}}
TRAINING = SMALL | {
    "train": {"epochs": 3, "batch_size": 200, "lr": 0.05},
    "data": FIELDS["data"] | {"augment": {"pad": 1}},
}
# Files whose bytes have to be equal; the others hold times.
LASTING = {
    "model.safetensors", "graph.json", "record.json", "record.txt", "manifest.csv", "weights.safetensors",
    "recipe.yaml", "predictions.npz", "plan.json",
}  # fmt: skip


def quantize() -> None:
    """A reconstruction with a checkpoint after each unit."""
    calibquant.quantize(LEARNED)


def train() -> None:
    """A float training with a checkpoint after each epoch."""
    calibquant.train(TRAINING)


def finetune() -> None:
    """A training of the quantized network that `start` holds."""
    calibquant.finetune(Path("start/run"), ["runs=runs", "finetune.epochs=2", "finetune.batch_size=300"])


def compare_two() -> None:
    """A comparison of two methods."""
    fields = {key: value for key, value in SMALL.items() if key != "quant"} | {
        "reconstruct": {"iterations": 4, "rounding_lr": 0.05},
    }  # fmt: skip
    compare.compare(fields, ["nearest", "qdrop"], ["w2a2"], seeds=1, out=Path("study"))


def select() -> None:
    """A choice of images."""
    herding = {"calibration": {"count": 64, "strategy": "herding"}}
    calibquant.select(make_recipe(SMALL | herding), out=Path("chosen.csv"))


def study() -> None:
    """A study of two strategies."""
    Path("recipe.yaml").write_text(make_recipe(LEARNED).to_yaml(), encoding="utf-8")
    planned = selection.make_selection_study(
        "recipe.yaml", ["random", "class-balanced"], [32], draws=[0], seeds=[1], out=Path("study")
    )
    selection.study_selection(planned)


COMMANDS: dict[str, Callable[[], None]] = {
    "quantize": quantize, "finetune": finetune, "train": train, "compare": compare_two, "select": select,
    "study": study,
}  # fmt: skip


def again(name: str) -> str:
    """Continue what has a checkpoint, else run the command again; says which."""
    stopped = list(Path("runs").glob(f".*.partial/{CHECKPOINT}"))
    if not stopped:
        COMMANDS[name]()
        return "run again"
    run = Path("runs", stopped[0].parent.name.removeprefix(".").removesuffix(".partial"))
    (resume_training if name == "train" else resume)(run)
    return "resumed"


def child(folder: Path, work: Callable[[], object]) -> int:
    """A process that does the work in a folder; its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    with suppress(BaseException):
        os.chdir(folder)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 2)
        try:
            work()
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(code)


def finished(process: int, folder: Path) -> None:
    """Wait for a process, which has to end well."""
    if os.waitpid(process, 0)[1] != 0:
        raise SystemExit(f"{folder}: {(folder / 'said').read_text(encoding='utf-8')}")


def content(folder: Path) -> dict[str, str]:
    """Every path below a folder, with the hash of what has to be equal."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.parent.name == "cells":
            row = json.loads(path.read_bytes())
            found[name] = json.dumps({key: value for key, value in row.items() if key != "seconds"})
        elif path.is_file() and (path.name in LASTING or path.suffix == ".csv"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = ""
    return found


def killed(name: str, start: Path, folder: Path, whole: dict[str, str], moment: float) -> dict[str, Any] | None:
    """What came of one kill; None where the command had ended before."""
    shutil.copytree(start, folder)
    process = child(folder, COMMANDS[name])
    time.sleep(moment)
    os.kill(process, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(process, 0)[1]):
        return None
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob(".*"))
    way = "resumed" if list(folder.glob(f"runs/.*.partial/{CHECKPOINT}")) else "run again"
    finished(child(folder, lambda: again(name)), folder)
    ends = content(folder)
    return {
        "command": name, "seconds": round(moment, 2), "left": left, "then": way,
        "differs": sorted(key for key in ends.keys() | whole.keys() if ends.get(key) != whole.get(key)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="leave the results as they are")
    given = parser.parse_args()
    torch.set_num_threads(1)
    drawn, rows = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as place:
        start = Path(place, "begin")
        start.mkdir()
        torch.manual_seed(0)
        save_weights(build("digits_resnet"), start / "digits.safetensors")
        if "finetune" in given.commands:
            finished(child(start, lambda: calibquant.quantize(SMALL | {"runs": "start"})), start)
            next(start.glob("start/*-001")).rename(start / "start/run")
        for name in given.commands:
            whole = Path(place, f"{name}-whole")
            shutil.copytree(start, whole)
            begun = time.perf_counter()
            finished(child(whole, COMMANDS[name]), whole)
            seconds, expected = time.perf_counter() - begun, content(whole)
            done = 0
            while done < given.kills:
                folder = Path(place, f"{name}-{len(rows)}")
                row = killed(name, start, folder, expected, drawn.uniform(0.02, 0.98) * seconds)
                shutil.rmtree(folder)
                if row is not None:
                    rows.append(row)
                    done += 1
                    print(row, flush=True)
    if given.dry:
        print(table(rows))
    else:
        kept = [row for row in stored() if row["command"] not in given.commands] + rows
        kept.sort(key=lambda row: list(COMMANDS).index(row["command"]))
        command = f"python benchmarks/kills.py --kills {given.kills} --seed {given.seed}"
        common.write("kills", command, {"kills": kept}, table(kept))
    raise SystemExit(any(row["differs"] for row in rows))


def stored() -> list[dict[str, Any]]:
    """The kills of an earlier call, whose other commands stay in the table."""
    path = common.RESULTS / "kills.json"
    return json.loads(path.read_bytes())["kills"] if path.is_file() else []


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each command."""
    lines = []
    for name in dict.fromkeys(row["command"] for row in rows):
        own = [row for row in rows if row["command"] == name]
        resumed = sum(row["then"] == "resumed" for row in own)
        same = sum(not row["differs"] for row in own)
        lines.append([name, str(len(own)), str(resumed), str(len(own) - resumed), f"{same} of {len(own)}"])
    return common.table(["command", "kills", "resumed", "run again", "same bytes, no other file"], lines)


if __name__ == "__main__":
    main()
