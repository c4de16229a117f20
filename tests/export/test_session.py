"""The one place that opens ONNX Runtime's sessions."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import calibquant
from calibquant.export.session import open_session


@pytest.mark.parametrize("threads", [None, 2])
def test_threads_of_a_session_do_not_spin(threads: int | None) -> None:
    shape = [None, 2]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = open_session("relu.onnx", onnx.ModelProto.SerializeToString(model), threads)
    options = session._session.get_session_options()
    for of in ("intra_op", "inter_op"):
        assert options.get_session_config_entry(f"session.{of}.allow_spinning") == "0"


def test_nothing_else_opens_one() -> None:
    package = Path(calibquant.__file__).parent
    found = [path.name for path in package.rglob("*.py") if "InferenceSession" in path.read_text(encoding="utf-8")]
    assert found == ["session.py"]
