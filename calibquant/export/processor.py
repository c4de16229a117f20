"""What the processor at hand does with 8-bit products: asked of ONNX Runtime itself, not of a list of processors."""

from __future__ import annotations

from functools import cache

import numpy as np

from calibquant.export.onnx_files import OnnxGraph
from calibquant.export.session import open_session

EVERY = "every processor"
NOT_SATURATING = "processors that add 8-bit products exactly: x86 with VNNI, and Arm"


@cache
def runtime_saturates() -> bool:
    """Whether ONNX Runtime's uint8 x int8 kernels add pairs of products in 16 bits here (x86 without VNNI).

    255 * 127 + 255 * 127 is 64,770; such kernels give 32,767.

    Raises:
        ModelError: onnx or ONNX Runtime is not installed.
    """
    graph = OnnxGraph(["sum", "sum.float"])
    graph.input("codes", (1, 2), np.uint8)
    graph.node("MatMulInteger", ["codes", graph.constant([[127], [127]], np.int8)], "sum")
    graph.node("Cast", ["sum"], "sum.float", to=1)  # TensorProto.FLOAT
    session = open_session("probe", graph.to_bytes("sum.float", (1, 1), 1, {}), threads=1)
    return float(session.run(np.full((1, 2), 255, np.uint8))[0][0, 0]) != 2 * 255 * 127
