"""OpenVINO runs deploy.onnx too: the same values but for roundings of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnx_cases import images_of, model_of, result
from torch import Tensor, nn

from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import deploy_onnx
from calibquant.graph import capture, fold_batch_norm
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe

openvino = pytest.importorskip("openvino", reason="OpenVINO, of the extra [dev], is not installed")


def openvino_result(model: bytes, x: Tensor) -> npt.NDArray[Any]:
    core = openvino.Core()
    network = core.compile_model(core.read_model(model, b""), "CPU", {"INFERENCE_NUM_THREADS": 1})
    return np.array(network([x.numpy()])[0])


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 8), (4, 4), (2, 4), (2, 2), (3, 3), (5, 6)])
@pytest.mark.parametrize("name", ["cifar_resnet", "mobilenet_v2", "squeezenet"])
def test_it_computes_what_onnx_runtime_does(name: str, weights: int, activations: int) -> None:
    """2-bit weights as INT8, for it has no 2-bit types."""
    x = images_of(name, 16)
    model = deploy_onnx(make_program(model_of(name, weights, activations)), x, "int8" if weights == 2 else "packed")
    want, got = result(model, x), openvino_result(model, x)
    differences = np.abs(want - got).max(axis=1) / max(1.0, float(np.abs(want).max()))
    assert np.median(differences) <= 0.02
    assert (want.argmax(1) == got.argmax(1)).mean() >= 0.9 or differences.max() <= 0.1


class Residual(nn.Module):
    """Two convolutions of the same image, added."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.left(x) + self.right(x)).mean((2, 3))


def test_it_rounds_what_is_added() -> None:
    """A large and a small branch: without the rounding to 8 bits the sum would keep the small one's fractions."""
    torch.manual_seed(0)
    x, network = torch.randn(8, 3, 12, 12), Residual().eval()
    with torch.no_grad():
        network.left.weight.mul_(20)
    teacher = fold_batch_norm(capture(network, x[:2]))
    recipe = QuantRecipe(
        placement="integer", boundary="none", weights=WeightRecipe(bits=8, observer="minmax"),
        activations=ActivationRecipe(bits=8, observer="minmax"),
    )  # fmt: skip
    model = QuantModel(teacher, make_plan(teacher, recipe))
    calibrate_weights(model, recipe)
    calibrate_activations(model, recipe.activations, [x])
    data = deploy_onnx(make_program(model), x)
    np.testing.assert_allclose(openvino_result(data, x), result(data, x), rtol=0, atol=1e-4)
