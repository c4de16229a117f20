"""Corrected biases in every form of a network: ONNX files, the integer program, its executor."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from networks import NETWORKS, folded, quantized
from torch import Tensor

from calibquant.export.executor import execute
from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import deploy_onnx
from calibquant.export.onnx_files import with_outputs
from calibquant.export.onnx_writer import fake_quant_onnx, float_onnx
from calibquant.graph import with_biases
from calibquant.quantization import QuantModel, correct_biases_analytically, correct_weights
from calibquant.recipe import QuantRecipe


def corrected(name: str, placement: str = "integer", bits: int = 4) -> tuple[QuantModel, Tensor]:
    """A network with every correction; a further 0.3 makes a lost one show."""
    x = NETWORKS[name].example(6, seed=1)
    fields = {"weights": {"bits": bits, "observer": "minmax"}, "activations": {"bits": 8, "observer": "minmax"}}
    model = quantized(with_biases(folded(name)), QuantRecipe.model_validate({**fields, "placement": placement}), x)
    correct_weights(model, "mean-variance", [x])
    correct_biases_analytically(model)
    for delta in model.bias_deltas.values():
        assert delta.delta is not None
        delta.add(torch.full_like(delta.delta, 0.3))
    return model, x


def run(data: bytes, x: Tensor) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(None, {session.get_inputs()[0].name: x.numpy()}), strict=True))


@pytest.mark.parametrize("name", ["mobilenet_v2", "cifar_resnet"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_of_the_integer_network_is_the_executors(name: str, bits: int) -> None:
    model, x = corrected(name, bits=bits)
    program = make_program(model)
    done = execute(program, x.numpy(), keep=True)
    values = run(with_outputs(deploy_onnx(program, x), [step.output for step in program.steps]), x)
    products = [step for step in program.steps if step.is_product]
    assert {step.op for step in products} == {"conv2d", "linear"}
    for step in products:
        assert np.array_equal(done.values[step.output], values[step.output]) or step.grid is None, step.output
    with torch.no_grad():
        want = model(x)
    assert float((want - torch.from_numpy(done.output)).abs().max() / want.abs().max()) < 0.02


@pytest.mark.parametrize("placement", ["integer", "academic"])
@pytest.mark.parametrize("name", ["mobilenet_v2", "unet"])
def test_the_simulations_file_is_corrected_and_the_float_networks_is_not(name: str, placement: str) -> None:
    model, x = corrected(name, placement)
    with torch.no_grad():
        simulated, plain = model(x), model.teacher(x)
    for data, want in ((fake_quant_onnx(model, x), simulated), (float_onnx(model, x), plain)):
        (got,) = run(data, x).values()
        assert float((want - torch.from_numpy(got)).abs().max() / want.abs().max()) < 0.02
    assert float((simulated - plain).abs().max() / plain.abs().max()) > 0.05


def test_a_product_computed_in_float_has_its_corrected_bias() -> None:
    """The transposed convolutions of a U-Net, for which there is no integer kernel."""
    model, x = corrected("unet")
    program = make_program(model)
    floats = [step for step in program.steps if step.op == "conv_transpose2d"]
    assert floats
    for step in floats:
        node = next(n for n in model.teacher.graph.nodes if n.name == step.output)
        bias = model.teacher.get_buffer(str(node.args[2].target)) + model.bias_deltas[node.name].delta
        assert np.array_equal(program.parameters[str(step.inputs[2])], bias.numpy())
    with torch.no_grad():
        want = model(x)
    done = execute(program, x.numpy())
    assert float((want - torch.from_numpy(done.output)).abs().max() / want.abs().max()) < 0.05
