"""Parity: what exported files compute in ONNX Runtime, compared with what they stand for.

Every file is opened in a default session. float.onnx and fake_quant.onnx are compared by their outputs. deploy.onnx is
compared with the integer network, code by code, and by its decisions; also with the simulation, which is computed in
float64 here: in float32 its own rounding errors carry values near a tie to another code than the exact sums do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibquant.errors import ModelError
from calibquant.export.at_node import REPORT
from calibquant.export.audit import saturating_steps
from calibquant.export.code_parity import CodeParity, Codes, simulated_codes
from calibquant.export.executor import execute
from calibquant.export.file_names import DEPLOY, FAKE_QUANT, FLOAT
from calibquant.export.processor import EVERY, NOT_SATURATING, runtime_saturates
from calibquant.export.program import Program
from calibquant.export.session import Session, open_session
from calibquant.parallel import images_at_once
from calibquant.quantization import QuantModel

NETWORK, SIMULATION, INTEGER = "float network", "simulation", "integer network"
IMAGES = 256  # that the decisions of deploy.onnx are compared on
CODED = 32  # of these, whose every code and every file's outputs are compared
VALUES, FEWEST = 256 * 3 * 224 * 224, 16  # of large images as many are compared as hold so many values, or so few
CHUNK = 8  # images at a time at the most: every value of the network is held at once, three times
RELATIVE = 1e-3  # bound on float.onnx: of the largest output
CHANGED, CHANGED_AT_LEAST = 0.01, 2  # bound on changed decisions: a share, or a number on few images
MEAN = 0.01  # bound on the mean difference of outputs, of the largest output
AVX2 = "this processor (x86 without VNNI) saturates sums of 8-bit products"

Array = npt.NDArray[Any]
Chunk = tuple[Tensor, ...]


@dataclass(frozen=True)
class Flip:
    """A changed decision.

    Args:
        image: which image.
        reference, exported: classes.
        margin: largest minus second largest logit of the reference.
        within: the margin is at most the largest logit error on all images.
    """

    image: int
    reference: int
    exported: int
    margin: float
    within: bool


@dataclass(frozen=True)
class FileParity:
    """What a file computes, against what it stands for.

    Args:
        file: its name.
        against: NETWORK, SIMULATION or INTEGER.
        images: how many were compared.
        relative: largest difference of an output, relative to the largest output (at least 1).
        largest: largest difference of an output.
        mean: mean difference of the outputs, relative as above.
        decisions: how many were compared; None if the outputs are no logits (N, classes).
        flips: those that changed.
    """

    file: str
    against: str
    images: int
    relative: float
    largest: float
    mean: float
    decisions: int | None
    flips: tuple[Flip, ...] = ()


@dataclass(frozen=True)
class Parity:
    """How far exported files are from what they stand for.

    Args:
        images: how many were compared; codes, and outputs of the other files, on the first CODED of them.
        files: each file's outputs.
        simulation: codes of deploy.onnx against the simulation.
        executor: codes of deploy.onnx against the integer executor, each step fed the runtime's own codes.
        approximate: steps computed in float, whose codes may differ from the executor's by one step of the grid.
        faults: file -> why it must not be used; it deviates beyond its bound, or does not run.
        runtime: version of ONNX Runtime.
        threads: of each session; None left it to ONNX Runtime.
        exact_on: the processors on which deploy.onnx gives the integer network's codes; empty without deploy.onnx.
        saturating: this machine's 8-bit kernels add pairs of products in 16 bits (x86 without VNNI).
    """

    images: int
    files: tuple[FileParity, ...]
    simulation: tuple[CodeParity, ...] = ()
    executor: tuple[CodeParity, ...] = ()
    approximate: tuple[str, ...] = ()
    faults: Mapping[str, str] = field(default_factory=dict)
    runtime: str = ""
    threads: int | None = None
    exact_on: str = ""
    saturating: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries, ready for JSON."""
        return asdict(self)


def in_chunks(images: Tensor | Sequence[Tensor]) -> Iterator[Chunk]:
    """Images, one tensor (N, ...) for each input, in chunks that `check_parity` can hold with all their values."""
    inputs = (images,) if isinstance(images, Tensor) else tuple(images)
    size = chunk_size(inputs[0].shape)
    for i in range(0, len(inputs[0]), size):
        yield tuple(x[i : i + size].detach().cpu() for x in inputs)


def chunk_size(shape: Sequence[int]) -> int:
    """How many images of a shape (N, ...) are compared at a time."""
    return images_at_once(shape, CHUNK)


def image_count(shape: Sequence[int], most: int = IMAGES) -> int:
    """How many images of a shape (N, ...) are compared: `most`, or fewer where they are large.

    Example:
        >>> image_count((1, 3, 32, 32)), image_count((1, 3, 500, 500)), image_count((1, 3, 2000, 2000))
        (256, 51, 16)
    """
    return min(most, max(FEWEST, VALUES // math.prod(shape[1:])))


def check_parity(
    files: Mapping[str, bytes],
    model: QuantModel,
    program: Program | None,
    chunks: Iterable[Chunk],
    threads: int | None = None,
) -> Parity:
    """Compare exported files with what they stand for.

    Args:
        files: bytes by name; FLOAT, FAKE_QUANT and DEPLOY are compared as far as they are there.
        model: the quantized network; its teacher stands for FLOAT.
        program: its integer program, for DEPLOY.
        chunks: what enters the network, some images at a time, see `in_chunks`.
        threads: of each session; None leaves it to ONNX Runtime.

    Returns:
        what was found. A file that does not run or deviates beyond its bound is among the `faults`.
    """
    comparison = _Comparison(files, model, program, threads)
    for chunk in chunks:
        comparison.add(tuple(x.detach().cpu() for x in chunk))
    return comparison.result()


class _Comparison:
    """The outputs of files and of what they stand for, chunk by chunk."""

    def __init__(
        self, files: Mapping[str, bytes], model: QuantModel, program: Program | None, threads: int | None
    ) -> None:
        self.model, self.program, self.threads = model, program, threads
        self.exact = copy.deepcopy(model).double()
        self.faults: dict[str, str] = {}
        self.sessions: dict[str, Session] = {}
        self.codes: Codes | None = None
        for name in (FLOAT, FAKE_QUANT, DEPLOY):
            if name in files:
                self._attempt(name, lambda name=name: self._open(name, files[name]))
        self.runtime = next((s.runtime for s in self.sessions.values()), "")
        self.compared = [name for name in (FLOAT, FAKE_QUANT, DEPLOY) if name in files]
        self.outputs: dict[str, list[Array]] = {n: [] for n in (NETWORK, SIMULATION, INTEGER, *self.compared)}
        self.images = 0

    def _open(self, name: str, data: bytes) -> None:
        self.sessions[name] = open_session(name, data, self.threads)
        if name == DEPLOY and self.program is not None:
            self.codes = Codes(data, self.program, self.model, self.threads)

    def _attempt(self, name: str, what: Any) -> Any:
        """The result of something that a file may fail at; its first failure ends its comparison."""
        if name in self.faults:
            return None
        try:
            return what()
        except ModelError as error:
            where = "" if error.where == name else f"{error.where}: "
            self.faults[name] = f"{where}{error.problem}; {error.mend}"
            return None

    def add(self, chunk: Chunk) -> None:
        """Compare some images: everything on the first CODED, the decisions of deploy.onnx on all."""
        arrays, whole = tuple(x.numpy() for x in chunk), self.images < CODED
        self.images += len(arrays[0])
        for name in self.compared:
            if whole or name == DEPLOY:
                self._run(name, arrays)
        if whole:
            self._references(chunk, arrays)
        elif self.program is not None and DEPLOY not in self.faults:
            self.outputs[INTEGER].append(execute(self.program, arrays).output)

    def _run(self, name: str, arrays: tuple[Array, ...]) -> None:
        got = self._attempt(name, lambda: self.sessions[name].run(*arrays)[0])
        if got is not None:
            self.outputs[name].append(got)

    def _references(self, chunk: Chunk, arrays: tuple[Array, ...]) -> None:
        with torch.inference_mode():
            self.outputs[NETWORK].append(self.model.teacher(*chunk).numpy())
        with simulated_codes(self.exact) as simulated, torch.inference_mode():
            wide = (x.double() if x.is_floating_point() else x for x in chunk)
            self.outputs[SIMULATION].append(self.exact(*wide).float().numpy())
        if self.codes is not None:
            codes = self.codes
            done = self._attempt(DEPLOY, lambda: codes.add(arrays, simulated))
            if done is not None:
                self.outputs[INTEGER].append(done)

    def result(self) -> Parity:
        """What was found."""
        rows = []
        for name in self.compared:
            for against in self._stands_for(name):
                row = self._row(name, against)
                if row is not None:
                    rows.append(row)
                    problem = _beyond(row)
                    if problem is not None:
                        self.faults.setdefault(name, f"{problem}; {REPORT}")
        deployed = DEPLOY in self.compared and self.program is not None
        suspects = saturating_steps(self.program) if deployed and self.program is not None else []
        codes = None if self.codes is None else self.codes.result()
        if codes is not None and codes.fault is not None:
            self.faults[DEPLOY] = _reason(codes.fault, suspects, self.runtime)
        return Parity(
            self.images,
            tuple(rows),
            *((), (), ()) if codes is None else (codes.simulation, codes.executor, codes.approximate),
            faults=self.faults,
            runtime=self.runtime,
            threads=self.threads,
            exact_on="" if not deployed else NOT_SATURATING if suspects else EVERY,
            saturating=deployed and runtime_saturates(),
        )

    def _stands_for(self, name: str) -> tuple[str, ...]:
        integer = (INTEGER,) if self.program is not None else ()
        return {FLOAT: (NETWORK,), FAKE_QUANT: (SIMULATION,)}.get(name, (SIMULATION, *integer))

    def _row(self, name: str, against: str) -> FileParity | None:
        if name in self.faults or not self.outputs[against]:
            return None
        want, got = np.concatenate(self.outputs[against]), np.concatenate(self.outputs[name])
        return _file_parity(name, against, want, got[: len(want)])


# --- outputs ----------------------------------------------------------------------------------------------------------


def _file_parity(name: str, against: str, want: Array, got: Array) -> FileParity:
    count = len(want)
    if want.shape != got.shape or not np.isfinite(got).all():
        return FileParity(name, against, count, np.inf, np.inf, np.inf, None)
    difference = np.abs(want.astype(np.float64) - got)
    scale, largest = max(1.0, float(np.abs(want).max(initial=0))), float(difference.max(initial=0))
    logits = want.ndim == 2 and want.shape[1] > 1
    return FileParity(
        name, against, count, largest / scale, largest, float(difference.mean()) / scale, count if logits else None,
        tuple(_flips(want, got, largest)) if logits else (),
    )  # fmt: skip


def _flips(want: Array, got: Array, error: float) -> Iterator[Flip]:
    before, after = want.argmax(axis=1), got.argmax(axis=1)
    for i in np.flatnonzero(before != after):
        second, first = np.partition(want[i], -2)[-2:]
        margin = float(first) - float(second)
        yield Flip(int(i), int(before[i]), int(after[i]), margin, margin <= error)


# --- bounds -----------------------------------------------------------------------------------------------------------


def _beyond(row: FileParity) -> str | None:
    """What deviates beyond the bound, in words."""
    on = f"on {row.images} images"
    if not np.isfinite(row.relative):
        return f"gives outputs of another shape than the {row.against}, or NaN, {on}"
    if row.file == FLOAT and row.relative > RELATIVE:
        return f"is {row.relative:.1e} off the {row.against} {on}"
    if row.decisions is not None and len(row.flips) > max(CHANGED * row.decisions, CHANGED_AT_LEAST):
        return f"changes {len(row.flips)} of {row.decisions} decisions of the {row.against}"
    return None if row.mean <= MEAN else f"is {100 * row.mean:.1f} % off the {row.against} on average, {on}"


def _reason(row: CodeParity, suspects: Sequence[str], runtime: str) -> str:
    """Why codes differ, and what to do."""
    found = (
        f"node {row.step}: {row.differing:,} of {row.count:,} codes differ from the integer network, by up to "
        f"{row.largest} steps"
    )
    if row.step in suspects and runtime_saturates():
        return f"{found}, because {AVX2}; use quant.weights.reach=auto"
    return f"{found} (ONNX Runtime {runtime}); {REPORT}"
