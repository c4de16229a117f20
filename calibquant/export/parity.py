"""Parity: what exported files compute in ONNX Runtime, compared with the simulation and the integer executor.

Every file is opened in a default session. Outputs are compared with the network that the file stands for, and the codes
of the integer network with the simulation's and the executor's, value by value. The simulation is computed in float64:
in float32 its own rounding errors carry values near a tie to another code than the integer network's exact sums do.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibquant.errors import ModelError, RunFolderError
from calibquant.export.executor import execute
from calibquant.export.onnx_files import with_outputs
from calibquant.export.program import Program, Step, names_of
from calibquant.export.session import Session, open_session
from calibquant.numerics.affine import aligned
from calibquant.quantization import QuantModel

FLOAT, FAKE_QUANT, DEPLOY = "float.onnx", "fake_quant.onnx", "deploy.onnx"
NETWORK, SIMULATION = "float network", "simulation"
IMAGES = 64  # calibration images that an export is checked on
CHUNK = 8  # images at a time: every value of the network is held at once, three times
RELATIVE = 1e-3  # bound on float.onnx: of the largest output
CHANGED, CHANGED_AT_LEAST = 0.01, 2  # bound on changed decisions: a share, or a number on few images
CPU_INFO = Path("/proc/cpuinfo")
MEAN = 0.01  # bound on outputs that are no logits: mean difference, of the largest output

Array = npt.NDArray[Any]


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
        against: NETWORK or SIMULATION.
        relative: largest difference of an output, relative to the largest output (at least 1).
        largest: largest difference of an output.
        mean: mean difference of the outputs, relative as above.
        decisions: how many were compared; None if the outputs are no logits (N, classes).
        flips: those that changed.
    """

    file: str
    against: str
    relative: float
    largest: float
    mean: float
    decisions: int | None
    flips: tuple[Flip, ...] = ()


@dataclass(frozen=True)
class CodeParity:
    """The codes of one step of the integer network.

    Args:
        step: name of its value.
        count: codes compared.
        differing: codes that differ.
        largest: largest difference in steps of the grid.
    """

    step: str
    count: int
    differing: int
    largest: int


@dataclass(frozen=True)
class Parity:
    """How far exported files are from what they stand for.

    Args:
        images: how many were compared.
        files: each file's outputs.
        simulation: codes of deploy.onnx against the simulation.
        executor: codes of deploy.onnx against the integer executor.
        approximate: steps whose codes need not equal the executor's: ONNX Runtime computes them in float32 in an order
            of its own, or they read such values.
        runtime: version of ONNX Runtime.
        threads: of each session; None left it to ONNX Runtime.
        saturating: this machine's 8-bit kernels may saturate sums of this network (x86 without VNNI), so that codes
            may differ from the executor's.
    """

    images: int
    files: tuple[FileParity, ...]
    simulation: tuple[CodeParity, ...] = ()
    executor: tuple[CodeParity, ...] = ()
    approximate: tuple[str, ...] = ()
    runtime: str = ""
    threads: int | None = None
    saturating: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries, ready for JSON."""
        return asdict(self)


def check_parity(
    files: Mapping[str, bytes],
    model: QuantModel,
    program: Program | None,
    images: Tensor | Sequence[Tensor],
    threads: int | None = None,
) -> Parity:
    """Compare exported files with what they stand for.

    Args:
        files: bytes by name; FLOAT, FAKE_QUANT and DEPLOY are compared as far as they are there.
        model: the quantized network; its teacher stands for FLOAT.
        program: its integer program, for DEPLOY.
        images: what enters the network, (N, ...); one tensor for each of its inputs.
        threads: of each session; None leaves it to ONNX Runtime.

    Raises:
        RunFolderError: a file does not load, or deviates beyond its bound.
    """
    inputs = (images,) if isinstance(images, Tensor) else tuple(images)
    try:
        parity = _measure(files, model, program, inputs, threads)
    except ModelError as error:
        raise RunFolderError(error.where, error.problem, error.mend) from error
    _check(parity)
    return parity


def _measure(
    files: Mapping[str, bytes],
    model: QuantModel,
    program: Program | None,
    inputs: tuple[Tensor, ...],
    threads: int | None,
) -> Parity:
    sessions = {name: open_session(name, files[name], threads) for name in (FLOAT, FAKE_QUANT, DEPLOY) if name in files}
    exact, codes = copy.deepcopy(model).double(), None
    if DEPLOY in files and program is not None:
        codes = _Codes(files[DEPLOY], program, model, threads)
    outputs: dict[str, list[Array]] = {name: [] for name in (NETWORK, SIMULATION, *sessions)}
    for chunk in _chunks(inputs):
        arrays = tuple(x.numpy() for x in chunk)
        with torch.inference_mode():
            outputs[NETWORK].append(model.teacher(*chunk).numpy())
        with _simulated_codes(exact) as simulated, torch.inference_mode():
            wide = (x.double() if x.is_floating_point() else x for x in chunk)
            outputs[SIMULATION].append(exact(*wide).float().numpy())
        for name, session in sessions.items():
            outputs[name].append(session.run(*arrays)[0])
        if codes is not None:
            codes.add(arrays, simulated)
    joined = {name: np.concatenate(parts) for name, parts in outputs.items()}
    stands_for = {name: NETWORK if name == FLOAT else SIMULATION for name in sessions}
    compared = tuple(_file_parity(name, other, joined[other], joined[name]) for name, other in stands_for.items())
    return Parity(
        len(inputs[0]),
        compared,
        *(((), (), ()) if codes is None else codes.result()),
        runtime=next((s.runtime for s in sessions.values()), ""),
        threads=threads,
        saturating=program is not None and _saturates(program),
    )


def _chunks(inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    for i in range(0, len(inputs[0]), CHUNK):
        yield tuple(x[i : i + CHUNK].detach().cpu() for x in inputs)


# --- outputs ----------------------------------------------------------------------------------------------------------


def _file_parity(name: str, against: str, want: Array, got: Array) -> FileParity:
    if want.shape != got.shape or not np.isfinite(got).all():
        return FileParity(name, against, np.inf, np.inf, np.inf, None)
    difference = np.abs(want.astype(np.float64) - got)
    scale, largest = max(1.0, float(np.abs(want).max(initial=0))), float(difference.max(initial=0))
    logits = want.ndim == 2 and want.shape[1] > 1
    return FileParity(
        name, against, largest / scale, largest, float(difference.mean()) / scale, len(want) if logits else None,
        tuple(_flips(want, got, largest)) if logits else (),
    )  # fmt: skip


def _flips(want: Array, got: Array, error: float) -> Iterator[Flip]:
    before, after = want.argmax(axis=1), got.argmax(axis=1)
    for i in np.flatnonzero(before != after):
        second, first = np.partition(want[i], -2)[-2:]
        margin = float(first) - float(second)
        yield Flip(int(i), int(before[i]), int(after[i]), margin, margin <= error)


# --- codes ------------------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    count: int = 0
    differing: int = 0
    largest: int = 0

    def add(self, want: Array, got: Array) -> None:
        difference = np.abs(want.astype(np.int32) - got.astype(np.int32).reshape(want.shape))
        self.count += difference.size
        self.differing += int(np.count_nonzero(difference))
        self.largest = max(self.largest, int(difference.max(initial=0)))


@dataclass
class _Codes:
    """Compares the codes of deploy.onnx, chunk by chunk."""

    data: bytes
    program: Program
    model: QuantModel
    threads: int | None
    simulation: dict[str, _Tally] = field(default_factory=dict)
    executor: dict[str, _Tally] = field(default_factory=dict)
    approximate: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        steps = [step.output for step in self.program.steps if step.grid is not None]
        self.session: Session = open_session(DEPLOY, with_outputs(self.data, steps), self.threads)
        self.steps = [name for name in steps if name in self.session.outputs]
        self.sites = {name: site for step in self.program.steps if (name := step.output) in self.steps
                      and (site := _site(step, self.model)) is not None}  # fmt: skip

    def add(self, inputs: tuple[Array, ...], simulated: Mapping[str, Array]) -> None:
        """Compare the codes of some images."""
        values = dict(zip(self.session.outputs, self.session.run(*inputs), strict=True))
        done = execute(self.program, inputs, keep=True)
        self.approximate |= set(done.approximate)
        for name in self.steps:
            self.executor.setdefault(name, _Tally()).add(done.values[name], values[name])
            if name in self.sites:
                self.simulation.setdefault(name, _Tally()).add(simulated[self.sites[name]], values[name])

    def result(self) -> tuple[tuple[CodeParity, ...], tuple[CodeParity, ...], tuple[str, ...]]:
        """The codes against the simulation and the executor, and the steps that need not be equal."""
        rows = (
            tuple(CodeParity(name, t.count, t.differing, t.largest) for name, t in tallies.items())
            for tallies in (self.simulation, self.executor)
        )
        return next(rows), next(rows), _downstream(self.program, self.approximate)


def _site(step: Step, model: QuantModel) -> str | None:
    """The quantizer of the simulation that makes a step's codes; None where it makes them elsewhere."""
    name = step.output.removesuffix(".codes")
    quantizer = model.activation_quantizers.get(name)
    if quantizer is None or step.grid is None:
        return None
    scale, zero_point = quantizer.get()
    return name if (np.float32(scale.item()), int(zero_point)) == (step.grid.scale, step.grid.zero_point) else None


@contextmanager
def _simulated_codes(model: QuantModel) -> Iterator[dict[str, Array]]:
    """The codes that the quantizers of the simulation give within the context."""
    codes: dict[str, Array] = {}

    def keep(name: str) -> Any:
        def hook(quantizer: Any, _inputs: object, value: Tensor) -> None:
            if not quantizer.dynamic:
                span = quantizer.plan.granularity
                scale, zero_point = (aligned(t, value, span) for t in quantizer.get())
                codes[name] = (torch.round(value / scale) + zero_point).to(torch.int32).numpy()

        return hook

    handles = [q.register_forward_hook(keep(name)) for name, q in model.activation_quantizers.items()]
    try:
        yield codes
    finally:
        for handle in handles:
            handle.remove()


def _downstream(program: Program, sources: set[str]) -> tuple[str, ...]:
    """Steps that are among the sources or read one, in order."""
    found: dict[str, None] = {}
    for step in program.steps:
        if step.output in sources or any(name in found for name in names_of(step.inputs)):
            found[step.output] = None
    return tuple(found)


# --- bounds -----------------------------------------------------------------------------------------------------------


def _check(parity: Parity) -> None:
    """Raise where a file deviates beyond its bound."""
    for file in parity.files:
        problem = _beyond(file)
        if problem is not None:
            mend = "report it with the recipe, or try another quant.activations.observer"
            raise RunFolderError(file.file, f"{problem} on {parity.images} images", mend)
    exact = [row for row in parity.executor if row.step not in parity.approximate and row.differing]
    if exact and not parity.saturating:
        row = exact[0]
        raise RunFolderError(
            DEPLOY,
            f"differs from the integer executor in {row.differing} of {row.count} codes of '{row.step}', "
            f"by up to {row.largest} steps (ONNX Runtime {parity.runtime})",
            "report it with the recipe and this version of ONNX Runtime",
        )


def _beyond(file: FileParity) -> str | None:
    """What deviates beyond the bound, in words."""
    if not np.isfinite(file.relative):
        return f"gives outputs of another shape than the {file.against}, or NaN,"
    if file.file == FLOAT and file.relative > RELATIVE:
        return f"is {file.relative:.1e} off the {file.against}"
    if file.decisions is None:
        return None if file.mean <= MEAN else f"is {100 * file.mean:.1f} % off the {file.against}"
    if len(file.flips) > max(CHANGED * file.decisions, CHANGED_AT_LEAST):
        return f"changes {len(file.flips)} of {file.decisions} decisions of the {file.against}"
    return None


def _saturates(program: Program) -> bool:
    """Whether kernels that add pairs of products in 16 bits may saturate; x86 machines without VNNI have only those."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if CPU_INFO.is_file() and "vnni" in CPU_INFO.read_text(encoding="utf-8", errors="replace"):
        return False
    grids = program.grids
    for step in program.steps:
        if step.is_product and step.weight is not None:
            grid = grids[str(step.inputs[0])]
            if (
                grid is not None
                and 2 * grid.high * int(np.abs(step.weight.centered.astype(np.int32)).max()) > 2**15 - 1
            ):
                return True
    return False
