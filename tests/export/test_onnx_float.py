"""float.onnx is the folded network, fake_quant.onnx the simulation: every network, and every form of every op."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from networks import NETWORKS, folded, values_of
from onnx_cases import FORMS, Apply, images_of, model_of, relative, result, run
from torch import nn

from calibquant.errors import QuantizationError
from calibquant.export.onnx_files import with_outputs
from calibquant.export.onnx_ops import ROWS
from calibquant.export.onnx_writer import fake_quant_onnx, float_onnx
from calibquant.graph import capture, fold_batch_norm
from calibquant.graph.ops import OPS
from calibquant.quantization import QuantModel, make_plan
from calibquant.recipe import Placement, QuantRecipe


def test_every_canonical_op_has_a_row() -> None:
    assert set(ROWS) == set(OPS)


@pytest.mark.parametrize("name", NETWORKS)
def test_float_is_the_folded_network(name: str) -> None:
    model, x = model_of(name), images_of(name)
    data = float_onnx(model, x[:1])
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    for images in (x, x[:1]):  # any batch size
        with torch.no_grad():
            assert relative(model.teacher(images), result(data, images)) <= 1e-5


@pytest.mark.parametrize("placement", ["integer", "academic"])
@pytest.mark.parametrize("name", NETWORKS)
def test_fake_quant_is_the_simulation(name: str, placement: Placement) -> None:
    model, x = model_of(name, 4, 4, placement), images_of(name)
    data = fake_quant_onnx(model, x)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    simulated, got = values_of(model.simulation, x), result(data, x)
    with torch.no_grad():
        want = model(x)
    np.testing.assert_array_equal(want.flatten(1).argmax(1), got.reshape(len(x), -1).argmax(1))
    assert relative(want, got) <= 2e-2  # a rounding that falls the other way and its consequences
    values = run(with_outputs(data, [f"{q}.quantized" for q in model.activation_quantizers]), x)
    for q, quantizer in model.activation_quantizers.items():
        difference = np.abs(values[f"{q}.quantized"] - simulated[q].numpy())
        assert (difference > 1e-3 * quantizer.get()[0].item()).mean() <= 1e-2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_all_bits_and_ranges(bits: int, symmetric: bool, dynamic: bool) -> None:
    """Rounding itself is the simulation's bit for bit: of equal inputs come equal values."""
    model = model_of("option_a_shortcut", bits, bits, "academic" if dynamic else "integer", symmetric, dynamic)
    x = images_of("option_a_shortcut")
    (first, *_), data = model.activation_quantizers, fake_quant_onnx(model, x)
    names = [name for q in model.activation_quantizers for name in (q, f"{q}.quantized")]
    values = run(with_outputs(data, [n for n in names if n != "x"]), x) | {"x": x.numpy()}
    for name, quantizer in model.activation_quantizers.items():
        with torch.no_grad():
            want = quantizer(torch.from_numpy(values[name])).numpy()
        np.testing.assert_array_equal(values[f"{name}.quantized"], want)
    assert relative(model(x).detach(), result(data, x)) <= 2e-2
    assert first


def test_an_uncalibrated_network_is_refused() -> None:
    graph = folded("cifar_resnet")
    model = QuantModel(graph, make_plan(graph, QuantRecipe()))
    with pytest.raises(QuantizationError, match="not calibrated"):
        fake_quant_onnx(model, images_of("cifar_resnet"))
    float_onnx(model, images_of("cifar_resnet"))  # needs no calibration


# --- every form of an op ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_ops(form: str) -> None:
    torch.manual_seed(0)
    network, x = Apply(FORMS[form]).eval(), torch.randn(3, 3, 9, 15)
    graph = fold_batch_norm(capture(network, x))
    data = float_onnx(QuantModel(graph, make_plan(graph, QuantRecipe())), x)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    limit = 1e-4 if "layer norm" in form else 1e-5  # a permuted one is 4e-5 off in ONNX Runtime before 1.27
    with torch.no_grad():
        assert relative(network(x), result(data, x)) <= limit


@pytest.mark.parametrize("options", [
    {"stride": 2}, {"padding": (1, 2)}, {"stride": (2, 3), "output_padding": (1, 2)}, {"groups": 2}, {"dilation": 2},
    {"bias": False},
])  # fmt: skip
def test_transposed_convolutions(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, **options), nn.PReLU(6)).eval(), torch.randn(2, 4, 7, 5)
    graph = fold_batch_norm(capture(network, x))
    data = float_onnx(QuantModel(graph, make_plan(graph, QuantRecipe())), x)
    with torch.no_grad():
        assert relative(network(x), result(data, x)) <= 1e-5
