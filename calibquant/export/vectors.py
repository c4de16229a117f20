"""Test vectors: what every step of an integer program reads and makes, as files, to bring up hardware layer by layer.

A folder holds index.json and .npy files (NumPy format 1.0, C order, little endian, no pickle). The index is written
last, so a folder without one is not complete.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calibquant.export.executor import execute, multiplier_of
from calibquant.export.program import ActivationGrid, IntegerWeight, Program, Step, names_of
from calibquant.runfolder import make_folder, write_atomic

INDEX, FORMAT = "index.json", 1

Array = npt.NDArray[Any]


def write_vectors(program: Program, images: Array | Sequence[Array], folder: str | Path) -> Path:
    """Write the test vectors of a program for some images.

    A step reads the codes that the step before it made, so that each can be checked by itself. index.json lists values,
    parameters and steps; docs, "Test vectors", describes its fields.

    Args:
        program: integer program.
        images: float32 (N, C, H, W); a sequence of arrays if the network takes several.
        folder: made if it is not there; files of the same names are replaced.

    Returns:
        the index.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written.
    """
    return _Writer(program, images, Path(folder)).write()


class _Writer:
    """Writes one folder."""

    def __init__(self, program: Program, images: Array | Sequence[Array], folder: Path) -> None:
        self.program, self.folder = program, folder
        inputs = (images,) if isinstance(images, np.ndarray) else tuple(images)
        done = execute(program, inputs, keep=True)
        self.values = {**dict(zip(program.inputs, inputs, strict=True)), **done.values}
        self.approximate = done.approximate
        self.taken: set[str] = set()

    def write(self) -> Path:
        make_folder(self.folder)
        (self.folder / INDEX).unlink(missing_ok=True)  # an old one would describe files that are being replaced
        grids = self.program.grids
        index = {
            "format": FORMAT,
            "inputs": list(self.program.inputs),
            "output": self.program.output,
            "values": {name: self._value(name, value, grids[name]) for name, value in self.values.items()},
            "parameters": {name: self._array(name, value) for name, value in self.program.parameters.items()},
            "steps": [self._step(step) for step in self.program.steps],
        }
        text = json.dumps(index, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        return write_atomic(self.folder / INDEX, text.encode())

    def _step(self, step: Step) -> dict[str, Any]:
        row: dict[str, Any] = {
            "op": step.op,
            "inputs": _plain(step.inputs),
            "output": step.output,
            "attributes": {key: _plain(value) for key, value in step.attributes.items()},
            "kernel": "codes" if step.on_codes else "integer" if step.integer else "float",
            "exact": step.output not in self.approximate,
            "reads": list(names_of(step.inputs)),
        }
        if step.weight is not None:
            row["weight"] = self._weight(step.output, step.weight)
        if step.table is not None:
            row["table"] = self._array(f"{step.output}.table", step.table)
        if step.is_product:
            row["bias"] = None if step.bias is None else self._array(f"{step.output}.bias", step.bias)
            row["multiplier"] = self._array(f"{step.output}.multiplier", multiplier_of(step, self.program.grids))
        return row

    def _value(self, name: str, value: Array, grid: ActivationGrid | None) -> dict[str, Any]:
        meaning = None if grid is None else {
            "scale": float(grid.scale), "zero_point": grid.zero_point, "bits": grid.bits, "low": grid.low,
            "high": grid.high, **({} if grid.levels is None else {"levels": list(grid.levels)}),
        }  # fmt: skip
        return {**self._array(name, value), "grid": meaning}

    def _weight(self, step: str, weight: IntegerWeight) -> dict[str, Any]:
        return {
            "name": weight.name, "bits": weight.bits, "signed": weight.signed, "axis": weight.axis,
            "shift": weight.shift,
            "codes": self._array(f"{step}.weight", weight.codes),
            "zero_point": self._array(f"{step}.weight.zero_point", weight.zero_point),
            "scale": self._array(f"{step}.weight.scale", weight.scale),
        }  # fmt: skip

    def _array(self, name: str, value: Array) -> dict[str, Any]:
        """Write an array and say where and what it is."""
        buffer = io.BytesIO()
        plain = np.ascontiguousarray(value)
        np.lib.format.write_array(buffer, plain.astype(plain.dtype.newbyteorder("<")), (1, 0), allow_pickle=False)
        file = self._file(name)
        write_atomic(self.folder / file, buffer.getvalue())
        return {"file": file, "shape": list(plain.shape), "dtype": plain.dtype.name}

    def _file(self, name: str) -> str:
        """A file name that every file system takes, and only once."""
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".") or "_"
        number, file = 0, f"{stem}.npy"
        while file.lower() in self.taken:
            number += 1
            file = f"{stem}.{number}.npy"
        self.taken.add(file.lower())
        return file


def _plain(value: Any) -> Any:
    """Tuples as lists, mappings as dictionaries, for JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
