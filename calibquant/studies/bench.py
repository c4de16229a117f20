"""Latency and throughput in ONNX Runtime: the float network, the integer network, and ONNX Runtime's own 8 bits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calibquant.errors import ModelError, RunFolderError
from calibquant.export.artifact import load_artifact
from calibquant.export.file_names import DEPLOY, FLOAT
from calibquant.export.session import Session, import_runtime, open_session
from calibquant.pipeline import Reporter, run_recipe
from calibquant.pipeline.reporting import Silent, begin, note
from calibquant.pipeline.run_inputs import run_inputs
from calibquant.runfolder import RunFolder, open_run
from calibquant.studies.external import PEER, static_peer

BATCHES = (1, 8)  # latency, throughput
ROUNDS = 15
SECONDS = 0.05  # of one measurement: as many runs as that takes

Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Timing:
    """One network at one batch size and thread count.

    Args:
        network: its name.
        bytes: of its file.
        batch, threads: how it was run.
        milliseconds: median of the rounds, of one batch.
        images_per_second: the same as a rate.
        ratio: how many times as fast as the float network: median over the rounds, each measured side by side.
        ratio_low, ratio_high: quartiles of the rounds.
    """

    network: str
    bytes: int
    batch: int
    threads: int
    milliseconds: float
    images_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float


def bench(
    run: Path,
    also: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    rounds: int = ROUNDS,
    reporter: Reporter | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Measure a run's files and, on the same images, what ONNX Runtime's own quantizer makes of float.onnx.

    All networks are measured in turn in each round, so that a slow moment of the machine meets all alike.

    Args:
        run: run folder with float.onnx and deploy.onnx.
        also: further runs of the same network, whose deploy.onnx is measured too.
        overrides: dotted recipe keys, such as another data.root.
        rounds: measurements of each network at each batch size and thread count.
        reporter: hears of steps and progress.
        trust_code: whether code that the run's recipe names may be run, where the float network is needed.

    Returns:
        `run`, `runtime`, `rounds`, `timings` (fields of `Timing`) and `notes`.

    Raises:
        CalibQuantError: a run cannot be read, or lacks its ONNX files.
    """
    reporter = reporter or Silent()
    begin(reporter, 1, 2, "Open the networks")
    folder = open_run(run)
    recipe, notes = run_recipe(folder, list(overrides), trust_code), list[str]()
    inputs = run_inputs(folder, recipe, load_artifact(folder))
    images: Images = inputs.tensors[0].numpy()
    if len(inputs.tensors) != 1:
        raise RunFolderError(run, f"is a network with {len(inputs.tensors)} inputs", "measure one with one input")
    files = {"float": _file(folder, FLOAT), f"{recipe.setting} {run.name}": _file(folder, DEPLOY)}
    for path in also:
        files[f"{run_recipe(open_run(path)).setting} {path.name}"] = _file(open_run(path), DEPLOY)
    try:
        files[PEER] = static_peer(files["float"], np.split(images, len(images)))
    except ModelError as error:
        notes.append(str(error))
        note(reporter, str(error))
    begin(reporter, 2, 2, f"Measure {len(files)} networks in {rounds} rounds")
    cases = [(batch, threads) for threads in sorted({1, _cores()}) for batch in BATCHES]
    timings: list[Timing] = []
    for i, (batch, threads) in enumerate(cases):
        sessions = {name: open_session(name, data, threads) for name, data in files.items()}
        repeats = -(-batch // len(images))
        chosen = np.concatenate([images] * repeats)[:batch]
        times: dict[str, list[float]] = {}
        for done, times in enumerate(measure(sessions, chosen, rounds, SECONDS)):  # noqa: B007
            reporter.progress(i * rounds + done + 1, len(cases) * rounds, f"batch {batch}, {threads} threads")
        timings += _timings(times, files, batch, threads)
    version = import_runtime().__version__
    return {
        "run": str(run), "runtime": version, "rounds": rounds, "timings": [asdict(t) for t in timings], "notes": notes,
    }  # fmt: skip


def measure(
    sessions: dict[str, Session], images: Images, rounds: int, seconds: float
) -> Iterator[dict[str, list[float]]]:
    """Time sessions side by side.

    Yields:
        after each round, the seconds of one batch in the rounds so far, for each session.
    """
    times: dict[str, list[float]] = {name: [] for name in sessions}
    counts = {}
    for name, session in sessions.items():
        session.run(images)  # ONNX Runtime allocates at its first run
        counts[name] = max(1, round(seconds / max(_time(partial(session.run, images), 2), 1e-6)))
    for _ in range(rounds):
        for name, session in sessions.items():
            times[name].append(_time(partial(session.run, images), counts[name]))
        yield times


def _time(run: Callable[[], Any], count: int) -> float:
    """Seconds of one run."""
    begun = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begun) / count


def _timings(seconds: dict[str, list[float]], files: dict[str, bytes], batch: int, threads: int) -> Iterator[Timing]:
    base = np.array(seconds["float"])
    for name, values in seconds.items():
        median = float(np.median(values))
        low, middle, high = (float(q) for q in np.percentile(base / np.array(values), (25, 50, 75)))
        yield Timing(name, len(files[name]), batch, threads, 1e3 * median, batch / median, middle, low, high)


def _file(folder: RunFolder, name: str) -> bytes:
    if not folder.has(name):
        mend = f"make it with calibquant export {folder.path}"
        raise RunFolderError(folder.path, f"holds no {name}", mend)
    return folder.read(name)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
