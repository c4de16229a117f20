"""Exporting: from a quantized network to files that load anywhere, each checked before it is left."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, get_args

from calibquant.errors import CalibQuantError, RecipeError, RunFolderError, nearest
from calibquant.export.amct import CONFIG, amct_config
from calibquant.export.artifact import GRAPH, MODEL, load_artifact, size_of
from calibquant.export.at_node import REPORT
from calibquant.export.audit import summarize
from calibquant.export.file_names import DEPLOY, FAKE_QUANT, FLOAT
from calibquant.export.lowering import make_program, refusal
from calibquant.export.onnx_content import opset_of
from calibquant.export.onnx_deploy import Storage, deploy_onnx
from calibquant.export.onnx_writer import fake_quant_onnx, float_onnx
from calibquant.export.parity import (
    CHUNK,
    Chunk,
    Parity,
    check_parity,
    in_chunks,
)
from calibquant.export.program import Program
from calibquant.export.session import brief, import_onnx, import_runtime
from calibquant.export.vectors import write_vectors
from calibquant.parallel import set_threads
from calibquant.pipeline.measuring import run_recipe
from calibquant.pipeline.reporting import Reporter, Silent, begin, note
from calibquant.pipeline.run_inputs import CALIBRATION, PARITY, RunInputs, run_inputs
from calibquant.quantization import QuantModel
from calibquant.recipe import Recipe
from calibquant.runfolder import (
    WAIT,
    RunFolder,
    alone,
    check_place,
    disk_error,
    make_folder,
    open_run,
    shared_folder,
)

Made = TypeVar("Made")
FORMATS = ("onnx", "record", "amct", "packed", "vectors")
VECTORS = "vectors"
VECTOR_IMAGES = 4
_STORED = {"record": ("record.json", "record.txt"), "packed": (MODEL, GRAPH), "amct": ("record.txt",)}


@dataclass(frozen=True, eq=False)
class Exported:
    """The ONNX files of a network, checked.

    Args:
        files: bytes by name: float.onnx, fake_quant.onnx, deploy.onnx as far as they are right, and parity.json.
        parity: how far they are from what they stand for.
        program: the integer program; None where there is none.
        left_out: files that do not exist for such a network, and why.
        faults: files that could not be made, or deviate from what they stand for, and why. They are not among `files`.
        notes: what stays float, and what was changed so that the integer network runs.
    """

    files: dict[str, bytes]
    parity: Parity
    program: Program | None
    left_out: dict[str, str]
    faults: dict[str, str]
    notes: tuple[str, ...]

    def told(self) -> Iterator[str]:
        """A line for each file that is not there."""
        for name, reason in {**self.left_out, **self.faults}.items():
            yield f"{name} was not written: {reason}"


def export_files(
    model: QuantModel,
    chunks: Iterable[Chunk],
    storage: Storage = "packed",
    missing: str = "",
    threads: int | None = None,
    what: str = CALIBRATION,
) -> Exported:
    """Make the ONNX files of a network and check them; writes nothing.

    A file that cannot be made or deviates is left out with its reason; the others stay.

    Args:
        model: a calibrated network on the CPU.
        chunks: what enters it, to compare on: some images at a time, one tensor (N, ...) for each input of the network.
        storage: how deploy.onnx keeps weights below 8 bits: packed, or as INT8 for ONNX Runtime before 1.24.
        missing: why the model's teacher is not the float network; float.onnx is then left out.
        threads: of ONNX Runtime; None leaves it to it.
        what: what the images are, for parity.json.

    Raises:
        ModelError: onnx or ONNX Runtime is not installed.
    """
    import_onnx()
    import_runtime()
    rest = iter(chunks)
    first = next(rest)
    example = tuple(x[:CHUNK].detach().cpu() for x in first)
    reason = refusal(model)
    left_out = {FLOAT: missing} if missing else {}
    left_out |= {} if reason is None else {DEPLOY: reason}
    faults: dict[str, str] = {}
    program = None if reason is not None else _made(DEPLOY, faults, lambda: make_program(model))
    make: dict[str, Callable[[], bytes]] = {
        FLOAT: lambda: float_onnx(model, example),
        FAKE_QUANT: lambda: fake_quant_onnx(model, example),
    }
    if program is not None:
        own = program
        make[DEPLOY] = lambda: deploy_onnx(own, example, storage)
    made = {name: _made(name, faults, how) for name, how in make.items() if name not in left_out}
    files = {name: data for name, data in made.items() if data is not None}
    parity = check_parity(files, model, program, chain([first], rest), threads)
    faults |= parity.faults
    notes = () if program is None else program.notes
    content = {
        "of": what,
        "input": [list(x.shape[1:]) for x in example],
        "storage": storage,
        **parity.to_dict(),
        "left_out": left_out,
        "faults": faults,
        "notes": notes,
    }
    right = {name: data for name, data in files.items() if name not in faults}
    return Exported(right | {PARITY: _json(content)}, parity, program, left_out, faults, notes)


def _made(name: str, faults: dict[str, str], make: Callable[[], Made]) -> Made | None:
    """What is made, or None; then the faults say why, whatever the exception: no run is lost for its export."""
    try:
        return make()
    except CalibQuantError as error:
        faults[name] = str(error)
    except Exception as error:
        faults[name] = f"it cannot be made ({type(error).__name__}: {brief(error)}); {REPORT}"
    return None


def export_run(
    run: Path,
    formats: Sequence[str] = ("onnx",),
    storage: str = "packed",
    out: Path | None = None,
    overrides: Sequence[str] = (),
    shape: Sequence[int] | None = None,
    reporter: Reporter | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Export a saved run.

    Args:
        run: run folder.
        formats: of FORMATS.
        storage: of deploy.onnx, see `export_files`.
        out: folder that receives the files; None adds them to the run.
        overrides: dotted recipe keys, such as another data.root.
        shape: of one image, for runs of live images.
        reporter: hears of steps.
        trust_code: whether code that the run's recipe names may be run, which makes the float network.

    Returns:
        `run`, `out`, `files` (name, bytes, opset, share of the float network's bytes), and with ONNX files `parity`,
        `left_out`, `notes` and `audit`.

    Raises:
        CalibQuantError: an argument is not valid, or the run or its images cannot be read; nothing is written then. Or
            an ONNX file could not be made or deviates; all others are written then.
    """
    reporter = reporter or Silent()
    _check_arguments(formats, storage)
    folder = open_run(run)
    check_place(out or run)
    recipe = run_recipe(folder, list(overrides), trust_code)
    set_threads(recipe.threads)
    begin(reporter, 1, 3, f"Load {run}")
    model = load_artifact(folder)
    result: dict[str, Any] = {"run": str(run), "out": str(out or run)}
    files: dict[str, bytes] = {}
    made: Exported | None = None
    inputs = run_inputs(folder, recipe, model, shape) if {"onnx", "vectors"} & set(formats) else None
    begin(reporter, 2, 3, "Make the files and compare them with the simulation")
    if "onnx" in formats and inputs is not None:
        missing = inputs.missing
        if missing and folder.has(FLOAT):
            missing += "; the one in the run stays"
        made = export_files(inputs.model, in_chunks(inputs.tensors), storage, missing, recipe.threads, inputs.what)  # type: ignore[arg-type]
        files |= made.files
        result |= {"parity": made.parity.to_dict(), "of": inputs.what, "left_out": made.left_out, "notes": made.notes}
        result["audit"] = None if made.program is None else [asdict(row) for row in summarize(made.program)]
        for line in made.told():
            note(reporter, line)
    if "amct" in formats:
        files[CONFIG] = _json(_config(model, recipe))
    begin(reporter, 3, 3, f"Write to {out or run}")
    if "vectors" in formats and inputs is not None:
        _vectors(inputs, out or run)
        result["vectors"] = str((out or run) / VECTORS)
    stored = [name for chosen in formats for name in _STORED.get(chosen, ())]
    _write(folder, files, out, stored)
    if made is not None and made.faults:
        name, reason = next(iter(made.faults.items()))
        raise RunFolderError(name, f"was not written: {reason}", f"the other files are in {out or run}")
    result["files"] = _rows(files | {name: folder.read(name) for name in stored}, model)
    return result


def _check_arguments(formats: Sequence[str], storage: str) -> None:
    for name in formats:
        if name not in FORMATS:
            raise RecipeError("calibquant export, --format", f"'{name}' is unknown", nearest(name, FORMATS))
    if not formats:
        raise RecipeError("calibquant export, --format", "names no format", f"known are {', '.join(FORMATS)}")
    if storage not in get_args(Storage):
        raise RecipeError(
            "calibquant export, --storage", f"'{storage}' is unknown", nearest(storage, get_args(Storage))
        )


def _config(model: QuantModel, recipe: Recipe) -> dict[str, Any]:
    settings = recipe.calibration
    count = min(settings.range_count or settings.count, settings.count)
    learned = recipe.reconstruct.method != "none"
    return amct_config(model, recipe.quant, math.ceil(count / settings.batch_size), learned)


def _write(folder: RunFolder, files: dict[str, bytes], out: Path | None, stored: Sequence[str]) -> None:
    """Into the run, where the receipt learns of them; or with copies of stored files into another folder."""
    if out is None:
        folder.add(files)
        return
    with shared_folder(out) as there:
        for name in stored:
            there.write(name, folder.read(name))
        for name, data in sorted(files.items(), key=lambda item: item[0] == PARITY):  # last: with it all is there
            there.write(name, data)


def _vectors(inputs: RunInputs, out: Path) -> None:
    """Test vectors of a few images; the folder appears when it is complete."""
    program = make_program(inputs.model)
    make_folder(out)
    with alone(out, WAIT), _fresh_folder(out / VECTORS) as folder:
        write_vectors(program, [x[:VECTOR_IMAGES].numpy() for x in inputs.tensors], folder)


@contextmanager
def _fresh_folder(path: Path) -> Iterator[Path]:
    """A folder under a temporary name that takes its place at the end."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        if path.exists():
            shutil.rmtree(path)
        partial.replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rows(files: dict[str, bytes], model: QuantModel) -> list[dict[str, Any]]:
    float_bytes = len(files[FLOAT]) if FLOAT in files else size_of(model).float32
    return [
        {
            "file": name,
            "bytes": len(data),
            "opset": opset_of(name, data) if name.endswith(".onnx") else None,
            "of_float": len(data) / float_bytes,
        }
        for name, data in files.items()
    ]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
