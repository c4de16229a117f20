"""The arithmetic of each kernel, against ONNX Runtime on one QDQ operation, exact fractions and torch's own sums."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from calibquant.export import kernels
from calibquant.export.program import ActivationGrid

Array = np.ndarray
F = np.float32
CODES = np.arange(256, dtype=np.uint8)


def grid_of(scale: float, zero_point: int, low: int = 0, high: int = 255) -> ActivationGrid:
    return ActivationGrid(F(scale), int(zero_point), 8, low, high)


class Qdq:
    """A model of one operation between DequantizeLinear and QuantizeLinear, as ONNX Runtime fuses it."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.feeds: dict[str, Array] = {}

    def constant(self, value: Any) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(value), f"c{len(self.tensors)}"))
        return self.tensors[-1].name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [f"v{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def codes(self, codes: Array, grid: ActivationGrid) -> str:
        name = f"x{len(self.feeds)}"
        self.feeds[name] = codes
        return self.node("DequantizeLinear", name, self.constant(grid.scale), self.constant(np.uint8(grid.zero_point)))

    def stored(self, codes: Array, scale: Array) -> str:
        """A weight or a bias, with a scale for each channel."""
        zero = self.constant(np.zeros(len(scale), codes.dtype))
        return self.node("DequantizeLinear", self.constant(codes), self.constant(scale), zero, axis=0)

    def run(self, value: str, grid: ActivationGrid | None, kernel: str) -> Array:
        """The result of the operation, which must have become `kernel`."""
        if grid is not None:
            scale, zero = self.constant(grid.scale), self.constant(np.uint8(grid.zero_point))
            value = self.node("QuantizeLinear", value, scale, zero)
        inputs = [helper.make_tensor_value_info(n, TensorProto.UINT8, x.shape) for n, x in self.feeds.items()]
        kind = TensorProto.FLOAT if grid is None else TensorProto.UINT8
        graph = helper.make_graph(
            self.nodes, "g", inputs, [helper.make_tensor_value_info(value, kind, None)], self.tensors
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        session = session_of(model.SerializeToString())
        assert kernel in kernels_of(model.SerializeToString())
        return session.run(None, self.feeds)[0]


def session_of(model: bytes, **settings: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    for key, value in settings.items():
        setattr(options, key, value)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def kernels_of(model: bytes) -> set[str]:
    """The operations that ONNX Runtime runs after all its optimizations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session_of(model, optimized_model_filepath=str(path))
        return {node.op_type for node in onnx.load(path).graph.node}


# --- float and codes --------------------------------------------------------------------------------------------------


def test_ties_are_rounded_to_even_codes() -> None:
    values = F([0.5, 1.5, 2.5, -0.5, -1.5, 300, -300])
    assert kernels.quantize(values, grid_of(1, 3)).tolist() == [3, 5, 5, 3, 1, 255, 0]
    assert kernels.quantize(values, grid_of(1, 3, 2, 4)).tolist() == [3, 4, 4, 3, 2, 4, 2]


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3000)).astype(F)
    c = (-a * b * (1 + rng.integers(-3, 4, 3000) * 2.0**-22)).astype(F)  # cancels, so that the product's tail counts
    c[::3] = (rng.integers(1, 2**20, 1000) * 2.0**3).astype(F)
    a[::6], b[::6] = F(1 + 2.0**-12), F(2.0**-20)  # near the middle of two float32: rounding twice would go wrong
    c[::6] = F(1 + 2.0**-23) * 2 ** rng.integers(0, 8, 500)
    for x, y, z, got in zip(a, b, c, kernels.fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert got == nearest_float32(exact)


def nearest_float32(value: Fraction) -> np.float32:
    """By comparing with the neighbours of a guess."""
    guess = F(float(value))
    around = [np.nextafter(guess, F(-np.inf)), guess, np.nextafter(guess, F(np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.int32)) & 1))


def test_fma_of_a_value_that_rounding_twice_gets_wrong() -> None:
    a, b, c = F(1 + 2.0**-23), F(2.0**-24 * (1 - 2.0**-23)), F(1 + 2.0**-23)  # just below the middle above c
    twice = F(np.float64(a) * np.float64(b) + np.float64(c))
    assert twice == F(1 + 2.0**-22)
    assert kernels.fma(a, b, c) == F(1 + 2.0**-23)


# --- products ---------------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "plain": (5, 7, 1, 3, (1, 1), (1, 1), (1, 1)),
    "strided": (5, 7, 1, 3, (2, 1), (0, 2), (1, 1)),
    "dilated": (4, 6, 1, 3, (1, 2), (2, 1), (2, 1)),
    "grouped": (6, 9, 3, 3, (1, 1), (1, 1), (1, 1)),
    "depthwise": (8, 8, 8, 3, (2, 2), (1, 1), (1, 1)),
    "multiplied": (4, 12, 4, 3, (1, 1), (1, 1), (1, 1)),
    "1x1": (16, 8, 1, 1, (1, 1), (0, 0), (1, 1)),
    "7x7": (3, 4, 1, 7, (2, 2), (3, 3), (1, 1)),
    "deep": (600, 4, 1, 3, (1, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions_equal_torch_and_onnx_runtime(name: str) -> None:
    channels, out, groups, size, stride, padding, dilation = GEOMETRIES[name]
    rng = np.random.default_rng(len(name))
    x = rng.integers(0, 256, (2, channels, 11, 9), dtype=np.uint8)
    weight = rng.integers(-128, 128, (out, channels // groups, size, size), dtype=np.int8)
    bias = rng.integers(-50000, 50000, out, dtype=np.int32)
    source, scale = grid_of(0.03, 77), rng.uniform(0.001, 0.02, out).astype(F)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    sums = kernels.convolve(kernels.centered(x, source), weight, bias, **settings)
    operands = (torch.from_numpy(v.astype(np.int64)) for v in (kernels.centered(x, source), weight, bias))
    want = torch.nn.functional.conv2d(*operands, stride, padding, dilation, groups)  # int64 throughout
    assert np.array_equal(sums, want.numpy())

    grid = grid_of(float(sums.std()) * 0.03 * 0.01 / 40, 101)
    model = Qdq()
    inputs = model.codes(x, source), model.stored(weight, scale), model.stored(bias, source.scale * scale)
    value = model.node("Conv", *inputs, strides=stride, pads=padding * 2, dilations=dilation, group=groups)
    multiplier = kernels.multipliers(source.scale, scale, grid.scale).reshape(-1, 1, 1)
    codes = kernels.requantize(sums, multiplier, grid)
    assert len(np.unique(codes)) > 100
    assert np.array_equal(codes, model.run(value, grid, "QLinearConv"))


@pytest.mark.parametrize("kernel", ["QLinearConv", "QGemm"])
def test_requantization_rounds_in_the_kernels_order(kernel: str) -> None:
    """Accumulators next to ties, made of biases alone, tell every other order of the three scales apart."""
    rng = np.random.default_rng(1)
    source, grid = grid_of(0.0371, 3), grid_of(97.3, 40)
    scale = np.exp(rng.uniform(-8, -6, 20000)).astype(F)
    exact = np.float64(source.scale) * scale / np.float64(grid.scale)
    bias = np.rint((rng.integers(-40, 215, len(scale)) + 0.5) / exact).astype(np.int32)
    model, gemm = Qdq(), kernel == "QGemm"
    x = np.full((1, 1) if gemm else (1, 1, 1, 1), 3, np.uint8)
    weight = np.zeros((len(scale), *x.shape[1:]), np.int8)
    inputs = model.codes(x, source), model.stored(weight, scale), model.stored(bias, source.scale * scale)
    value = model.node("Gemm", *inputs, transB=1) if gemm else model.node("Conv", *inputs)
    got = model.run(value, grid, kernel).reshape(-1)
    want = kernels.requantize(bias.astype(np.float64), kernels.multipliers(source.scale, scale, grid.scale), grid)
    other = kernels.requantize(bias.astype(np.float64), exact.astype(F), grid)
    assert np.array_equal(want, got)
    assert not np.array_equal(other, got)


@pytest.mark.parametrize("to_float", [True, False])
def test_linear_layers_equal_onnx_runtime(to_float: bool) -> None:
    rng = np.random.default_rng(2)
    x, weight = rng.integers(0, 256, (33, 70), dtype=np.uint8), rng.integers(-128, 128, (19, 70), dtype=np.int8)
    bias, scale = rng.integers(-9000, 9000, 19, dtype=np.int32), rng.uniform(0.001, 0.02, 19).astype(F)
    source, grid = grid_of(0.04, 12), None if to_float else grid_of(0.9, 128)
    model = Qdq()
    inputs = model.codes(x, source), model.stored(weight, scale), model.stored(bias, source.scale * scale)
    got = model.run(model.node("Gemm", *inputs, transB=1), grid, "QGemm")
    sums = kernels.multiply_matrix(kernels.centered(x, source), weight, bias)
    if grid is None:
        assert np.array_equal(sums.astype(F) * kernels.product_scale(source.scale, scale), got)
    else:
        assert np.array_equal(kernels.requantize(sums, kernels.multipliers(source.scale, scale, grid.scale), grid), got)


# --- two activations --------------------------------------------------------------------------------------------------


def scales(rng: np.random.Generator) -> tuple[ActivationGrid, ActivationGrid, ActivationGrid]:
    a, b = np.exp(rng.uniform(-6, 0, 2))
    zeros = rng.integers(0, 256, 3)
    return grid_of(a, zeros[0]), grid_of(b, zeros[1]), grid_of((a + b) * rng.uniform(0.2, 1.2), zeros[2])


@pytest.mark.parametrize("shapes", [((1, 65536), (1, 65536)), ((256, 1), (1, 256)), ((1, 256), (256, 1))])
def test_sums_equal_onnx_runtime_on_every_pair_of_codes(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    rng = np.random.default_rng(3)
    left, right = (v.reshape(-1) for v in np.meshgrid(CODES, CODES))
    a, b = (x if s[1] == 65536 else CODES for x, s in zip((left, right), shapes, strict=True))
    a, b = a.reshape(shapes[0]), b.reshape(shapes[1])
    for _ in range(25):
        grid_a, grid_b, grid = scales(rng)
        model = Qdq()
        got = model.run(model.node("Add", model.codes(a, grid_a), model.codes(b, grid_b)), grid, "QLinearAdd")
        assert np.array_equal(kernels.add(a, b, grid_a, grid_b, grid), got)


@pytest.mark.parametrize(("op", "kernel"), [("Add", kernels.add), ("Mul", kernels.multiply)])
def test_results_beyond_int32_are_the_lowest_code(op: str, kernel: Any) -> None:
    tiny, wide = grid_of(1e-8, 0), grid_of(5, 0)
    model = Qdq()
    got = model.run(model.node(op, model.codes(CODES, wide), model.codes(CODES, wide)), tiny, f"QLinear{op}")
    assert np.array_equal(kernel(CODES, CODES, wide, wide, tiny), got)
    assert got[[0, 3]].tolist() == [0, 0]


@pytest.mark.parametrize("shapes", [((3, 5, 7), (3, 5, 7)), ((3, 5, 7), (3, 1, 1)), ((3, 1, 1), (3, 5, 7))])
def test_products_equal_onnx_runtime(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    rng = np.random.default_rng(4)
    for _ in range(25):
        a, b = (rng.integers(0, 256, s, dtype=np.uint8) for s in shapes)
        grid_a, grid_b, _ = scales(rng)
        grid = grid_of(float(grid_a.scale) * float(grid_b.scale) * 60, int(rng.integers(256)))
        model = Qdq()
        got = model.run(model.node("Mul", model.codes(a, grid_a), model.codes(b, grid_b)), grid, "QLinearMul")
        assert np.array_equal(kernels.multiply(a, b, grid_a, grid_b, grid), got)


# --- pools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "step", "pad", "counted"), [(2, 2, 0, 0), (3, 1, 1, 1), (3, 2, 1, 0), (5, 5, 0, 0)])
def test_average_pools_equal_onnx_runtime(size: int, step: int, pad: int, counted: int) -> None:
    rng = np.random.default_rng(5)
    for equal in range(10):
        x = rng.integers(0, 256, (2, 3, 11, 11), dtype=np.uint8)
        source, _, grid = scales(rng)
        if equal % 2:  # ties
            grid = grid_of(float(source.scale), grid.zero_point)
        model = Qdq()
        settings = {"kernel_shape": (size, size), "strides": (step, step), "pads": (pad,) * 4}
        value = model.node("AveragePool", model.codes(x, source), count_include_pad=counted, **settings)
        got = model.run(value, grid, "QLinearAveragePool")
        values = kernels.dequantize(x, source)
        pooled = kernels.average_pool(
            values, grid, kernel=(size, size), stride=(step, step), padding=(pad, pad), size=got.shape[2:],
            count_padding=bool(counted),
        )  # fmt: skip
        assert np.array_equal(pooled, got)
