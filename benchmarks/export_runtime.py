"""Runs one ONNX file in the Python that has the runtime: needs NumPy, and ONNX Runtime or OpenVINO.

    PY benchmarks/export_runtime.py onnxruntime|openvino FILE.onnx IMAGES.npy COUNT LOGITS.npy

Runs the first COUNT images, 25 at a time on one thread, in a default session; prints the runtime's version.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

BATCH = 25
Run = Callable[[Any], Any]


def onnxruntime_run(file: str) -> tuple[str, Run]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return onnxruntime.__version__, lambda images: session.run(None, {name: images})[0]


def openvino_run(file: str) -> tuple[str, Run]:
    import openvino

    network = openvino.Core().compile_model(file, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return openvino.__version__, lambda images: np.array(network([images])[0])


def main() -> None:
    runtime, file, images, count, out = sys.argv[1:]
    version, run = (openvino_run if runtime == "openvino" else onnxruntime_run)(file)
    chosen = np.load(images, mmap_mode="r")[: int(count)]
    parts = [run(np.ascontiguousarray(chosen[i : i + BATCH])) for i in range(0, len(chosen), BATCH)]
    np.save(out, np.concatenate(parts))
    print(version.split("-")[0])


if __name__ == "__main__":
    main()
