"""ONNX files in ONNX Runtime: a default session on the CPU, and errors of one line."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calibquant.errors import ModelError

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Session:
    """An opened ONNX file.

    Attributes:
        name: of the file, for errors.
        inputs: name and shape of each input; a symbolic size is None.
        outputs: names.
        runtime: version of ONNX Runtime.
    """

    name: str
    inputs: tuple[tuple[str, tuple[int | None, ...]], ...]
    outputs: tuple[str, ...]
    runtime: str
    _session: Any

    def run(self, *images: Array) -> list[Array]:
        """The outputs for one array an input, in the file's order.

        Raises:
            ModelError: the file takes other inputs, or fails at run time.
        """
        if len(images) != len(self.inputs):
            problem = f"takes {len(self.inputs)} inputs, not {len(images)}"
            raise ModelError(self.name, problem, "give a file that takes one batch of images")
        feeds = {name: np.ascontiguousarray(x) for (name, _), x in zip(self.inputs, images, strict=True)}
        try:
            return list(self._session.run(None, feeds))
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise ModelError(self.name, f"does not run in ONNX Runtime ({brief(error)})", FITTING) from None


FITTING = "give images of the size it was exported for, or export it again"


def open_session(name: str, data: bytes, threads: int | None = None) -> Session:
    """Open an ONNX file in a default session: CPU, all optimizations.

    Args:
        name: of the file, for errors.
        data: its bytes.
        threads: within an operation; None leaves it to ONNX Runtime.

    Raises:
        ModelError: ONNX Runtime is not installed, or does not load the file.
    """
    runtime = import_runtime()
    options = runtime.SessionOptions()
    for threads_of in ("intra_op", "inter_op"):  # waiting threads leave the core to others
        options.add_session_config_entry(f"session.{threads_of}.allow_spinning", "0")
    options.log_severity_level = 4  # errors arrive as exceptions
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # see Session.run
        reason = f"ONNX Runtime {runtime.__version__}: {brief(error)}"
        if any(sign in str(error).lower() for sign in ("protobuf parsing failed", "no graph was found")):
            raise ModelError(
                name, f"is not an ONNX file, or is damaged ({reason})", "give a file that calibquant export wrote"
            ) from None
        raise ModelError(
            name, f"does not load ({reason})", "use a newer ONNX Runtime, or export with --storage int8"
        ) from None
    inputs = tuple(
        (i.name, tuple(size if isinstance(size, int) else None for size in i.shape)) for i in session.get_inputs()
    )
    outputs = tuple(o.name for o in session.get_outputs())
    return Session(name, inputs, outputs, runtime.__version__, session)


def import_library(name: str, mend: str) -> Any:
    """A package that ONNX files need, imported where they are used.

    Raises:
        ModelError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ModelError(name, "is not installed", mend) from None


def import_runtime() -> Any:
    """The package onnxruntime; see `import_library`."""
    return import_library("onnxruntime", "pip install 'onnxruntime>=1.25'")


def import_onnx() -> Any:
    """The package onnx; see `import_library`."""
    return import_library("onnx", "pip install onnx")


def brief(error: BaseException) -> str:
    """The first sentence of another library's error."""
    return " ".join(str(error).split()).removeprefix("[ONNXRuntimeError] : ")[:160].rstrip(" ;.")
