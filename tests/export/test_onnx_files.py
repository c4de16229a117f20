"""The files themselves: low-bit tensors by the book, equal bytes for equal networks, values in between as outputs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx_cases import images_of, model_of, result, run

from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import deploy_onnx
from calibquant.export.onnx_files import OnnxGraph, pack_low_bits, with_outputs
from calibquant.export.onnx_writer import fake_quant_onnx, float_onnx


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 63])
@pytest.mark.parametrize(
    ("container", "bits", "low"), [("INT4", 4, -8), ("UINT4", 4, 0), ("INT2", 2, -2), ("UINT2", 2, 0)]
)
def test_onnx_reads_packed_tensors_as_they_were(container: str, bits: int, low: int, count: int) -> None:
    codes = np.random.default_rng(count).integers(low, low + (1 << bits), count).astype(np.int8)
    tensor = TensorProto(
        data_type=TensorProto.DataType.Value(container), dims=[count], raw_data=pack_low_bits(codes, bits)
    )
    assert len(tensor.raw_data) == -(-count * bits // 8)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert pack_low_bits(np.array([1, 2, -1]), 4) == bytes([0x21, 0x0F])
    assert pack_low_bits(np.array([0, 1, 2, 3, 1]), 2) == bytes([0b11100100, 0b01])


@pytest.mark.parametrize(("weights", "stored"), [(2, "UINT2"), (3, "UINT4"), (4, "UINT4"), (5, "INT8"), (8, "INT8")])
@pytest.mark.parametrize("name", ["cifar_resnet", "tied_convs"])
def test_the_file_holds_the_codes_of_the_program(name: str, weights: int, stored: str) -> None:
    program = make_program(model_of(name, weights, 4))
    proto = onnx.load_from_string(deploy_onnx(program, images_of(name)))
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    inner = [step.weight for step in program.steps if step.weight is not None and step.weight.bits == weights]
    assert inner
    for weight in inner:
        tensor = tensors[f"{weight.name}.codes"]
        assert TensorProto.DataType.Name(tensor.data_type) == stored
        want = weight.centered if stored == "INT8" else weight.codes
        np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), want.astype(np.int8))
        np.testing.assert_array_equal(numpy_helper.to_array(tensors[f"{weight.name}.scale"]), weight.scale)


def test_a_shared_weight_is_stored_once() -> None:
    for name, weight in [("conv_called_twice", "middle"), ("tied_convs", "a"), ("block_called_twice", "block.0")]:
        proto = onnx.load_from_string(deploy_onnx(make_program(model_of(name)), images_of(name)))
        names = [t.name for t in proto.graph.initializer if t.name.endswith(".codes") and ".bias" not in t.name]
        assert len(names) == len(set(names)) == len(model_of(name).weight_quantizers), weight


@pytest.mark.parametrize("storage", ["packed", "int8"])
@pytest.mark.parametrize(("weights", "opset", "ir"), [(4, 21, 10), (2, 25, 13)])
def test_versions_are_as_low_as_the_tensors_allow(weights: int, opset: int, ir: int, storage: str) -> None:
    model = deploy_onnx(make_program(model_of("cifar_resnet", weights)), images_of("cifar_resnet"), storage)  # type: ignore[arg-type]
    proto = onnx.load_from_string(model)
    if storage == "int8":
        opset, ir = 21, 10
        assert {t.data_type for t in proto.graph.initializer} <= {
            TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT,
        }  # fmt: skip
    assert (proto.opset_import[0].version, proto.ir_version) == (opset, ir)
    assert len(proto.opset_import) == 1
    assert proto.producer_name == "calibquant"
    assert {entry.key: entry.value for entry in proto.metadata_props}["calibquant.storage"] == storage


def test_equal_networks_give_equal_bytes() -> None:
    x = images_of("mobilenet_v2")
    model_of.cache_clear()
    first = model_of("mobilenet_v2", 2)
    files = [float_onnx(first, x), fake_quant_onnx(first, x), deploy_onnx(make_program(first), x)]
    model_of.cache_clear()
    again = model_of("mobilenet_v2", 2)
    assert again is not first
    assert files == [float_onnx(again, x), fake_quant_onnx(again, x), deploy_onnx(make_program(again), x)]


def test_values_in_between_become_outputs() -> None:
    x, program = images_of("cifar_resnet"), make_program(model_of("cifar_resnet"))
    model = deploy_onnx(program, x)
    names = [step.output for step in program.steps if step.output != program.output]
    values = run(with_outputs(model, names), x)
    assert list(values) == [program.output, *names]
    for name in names:
        assert values[name].dtype == np.uint8
        grid = program.grids[name]
        assert grid is not None
        assert values[name].min() >= grid.low
        assert values[name].max() <= grid.high
    np.testing.assert_array_equal(values[program.output], result(model, x))  # asking changes nothing
    floats = run(with_outputs(model, ["relu.float"]), x)["relu.float"]
    grid = program.grids["relu"]
    assert grid is not None
    np.testing.assert_array_equal(floats, (values["relu"].astype(np.float32) - grid.zero_point) * grid.scale)
    with pytest.raises(KeyError, match="'nothing'"):
        with_outputs(model, ["nothing"])


def test_tensors_never_take_the_name_of_a_value() -> None:
    graph = OnnxGraph(["conv.float"])
    ones = np.ones(2, np.float32)
    assert graph.tensor("conv.float", ones) == "conv.float.1"
    assert graph.tensor("conv.scale", ones) == "conv.scale"
    assert graph.tensor("conv.scale", ones) == "conv.scale"
    assert graph.tensor("conv.scale", ones + 1) == "conv.scale.1"
    assert graph.free("conv.scale") == "conv.scale.2"
    assert graph.constant([1, 2]) == graph.constant((1.0, 2.0))


def test_onnx_is_loaded_when_a_file_is_made() -> None:
    code = (
        "import sys, calibquant.export.onnx_writer, calibquant.export.onnx_deploy\n"
        "assert not {'onnx', 'onnxruntime', 'ml_dtypes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
