"""Every op of the table exports all files in every form, and deploy.onnx gives the integer executor's codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import quantized
from onnx_cases import FORMS
from torch import Tensor, nn

from calibquant.errors import CaptureError
from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import deploy_onnx
from calibquant.export.onnx_writer import fake_quant_onnx, float_onnx
from calibquant.export.parity import DEPLOY, FAKE_QUANT, FLOAT, check_parity, in_chunks
from calibquant.graph import capture, fold_batch_norm
from calibquant.graph.ops import OPS
from calibquant.quantization import QuantModel
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe

Function = Callable[[Tensor], Tensor]
GAIN = torch.linspace(0.5, 2, 4).reshape(4, 1, 1)


def twice(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x, x], dim)


def square(x: Tensor) -> Tensor:
    return x[:, :, :9, :9]


def resize(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.interpolate(x, *args, mode="bilinear", **kwargs)


MORE: dict[str, Function] = {
    "cat of one tensor twice": lambda x: twice(x, 1),
    "cat twice along H": lambda x: twice(x, 2),
    "cat three times along W": lambda x: torch.cat([F.relu(x)] * 3, 3),
    "cat of a, b, a": lambda x: torch.cat([x, F.max_pool2d(x, 3, 1, 1), x], 1),
    "cat of a pool twice": lambda x: twice(F.avg_pool2d(x, 2), 1),
    "cat of a function twice": lambda x: twice(F.silu(x), 1),
    "cat of a tensor and its moved copy": lambda x: torch.cat([x, F.pad(x, (1, -1))], 1),
    "cat of a tensor and its relu": lambda x: torch.cat([x, F.relu(x)], 1),
    "stack": lambda x: torch.stack([x, x], 2).flatten(1, 2),
    "sum of one tensor": lambda x: x + x,
    "square": lambda x: x * x,
    "difference of one tensor": lambda x: x - x + 1,
    "matmul of one tensor": lambda x: square(x) @ square(x),
    "sum with its moved copy": lambda x: square(x) + square(x).transpose(2, 3),
    "product with its moved copy": lambda x: square(x) * square(x).transpose(2, 3),
    "constant added": lambda x: x + GAIN,
    "constant subtracted from": lambda x: GAIN - x,
    "constant gain": lambda x: x * GAIN,
    "divided by a constant": lambda x: x / GAIN,
    "matmul with a constant": lambda x: x @ torch.linspace(-1, 1, 60).reshape(15, 4),
    "dropouts": lambda x: F.dropout(F.alpha_dropout(F.dropout2d(x, 0.5, False), 0.3, False), 0.5, False),
    "bilinear down": lambda x: resize(x, scale_factor=0.5),
    "bilinear by two, corners": lambda x: resize(x, scale_factor=2, align_corners=True),
    "bilinear by a fraction, corners": lambda x: resize(x, scale_factor=1.3, align_corners=True),
    "bilinear, recomputed": lambda x: resize(x, scale_factor=1.3, recompute_scale_factor=True),
    "bilinear, recomputed, corners": lambda x: resize(
        x, scale_factor=(0.7, 1.9), recompute_scale_factor=True, align_corners=True
    ),
    "bilinear to one, corners": lambda x: resize(x, (1, 7), align_corners=True),
    "bilinear to the same": lambda x: resize(x, (9, 15)),
    "bilinear up and down": lambda x: resize(x, scale_factor=(2.0, 0.5)),
    "nearest, recomputed": lambda x: F.interpolate(x, scale_factor=1.3, recompute_scale_factor=True),
    "upsampling modules": nn.Sequential(nn.UpsamplingBilinear2d(scale_factor=2), nn.UpsamplingNearest2d(size=(11, 3))),
    "area": lambda x: F.interpolate(x, (4, 5), mode="area"),
    "average pool, ceil, counted": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "average pool, area as divisor": nn.AvgPool2d(3, 2, 1, divisor_override=9),
    "average pool, divisor of one": nn.AvgPool2d(2, divisor_override=1),
    "average pool of all": nn.AvgPool2d((9, 15)),
    "global average": nn.AdaptiveAvgPool2d(1),
    "adaptive average of rows": nn.AdaptiveAvgPool2d((None, 3)),
    "sum over positions": lambda x: x.sum((2, 3), keepdim=True),
    "transposed": nn.ConvTranspose2d(4, 3, 3, 2, 1, 1),
    "transposed, grouped": nn.ConvTranspose2d(4, 4, 2, 2, groups=2, bias=False),
    "conv1d": lambda x: F.conv1d(x.flatten(2), torch.linspace(-1, 1, 24).reshape(2, 4, 3), None, 2, 1),
    "prelu": nn.PReLU(4),
    "batch norm": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
    "gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "attention": lambda x: torch.softmax(x.flatten(2) @ x.flatten(2).transpose(1, 2), -1) @ x.flatten(2),
}  # fmt: skip
EVERY = {**FORMS, **MORE}


class Between(nn.Module):
    """A convolution, the function, a convolution on what is still a map, and a head."""

    def __init__(self, function: Function, x: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function, self.second = nn.Conv2d(3, 4, 3, padding=1), function, nn.Identity()
        y = self.eval().function(self.first(x))
        self.second = nn.Conv2d(y.shape[1], 5, 3, padding=1) if y.dim() == 4 else nn.Identity()
        self.head = nn.Linear(self.second(y).flatten(1).shape[1], 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.function(self.first(x))).flatten(1))


@cache
def model_of(function: Function, granularity: str = "per_channel", bits: int = 4) -> QuantModel:
    x = images()
    recipe = QuantRecipe(
        weights=WeightRecipe(bits=bits, observer="minmax", granularity=granularity),  # type: ignore[arg-type]
        activations=ActivationRecipe(bits=bits, observer="minmax"),  # type: ignore[arg-type]
    )
    return quantized(fold_batch_norm(capture(Between(function, x), x[:1])), recipe, x)


def images(seed: int = 0) -> Tensor:
    return torch.randn(5, 3, 9, 15, generator=torch.Generator().manual_seed(seed))


def assert_parity(model: QuantModel) -> None:
    """All three files run and compute what they stand for; codes are the executor's, approximate ones within one."""
    x, program = images(1), make_program(model)
    files = {FLOAT: float_onnx(model, x), FAKE_QUANT: fake_quant_onnx(model, x), DEPLOY: deploy_onnx(program, x)}
    parity = check_parity(files, model, program, in_chunks(x), 1)
    assert parity.faults == {}
    assert {file.file for file in parity.files} == set(files)
    assert next(file.relative for file in parity.files if file.file == FLOAT) < 1e-5
    assert all(row.largest <= (row.step in parity.approximate) for row in parity.executor)


@pytest.mark.parametrize("form", EVERY)
def test_every_form_exports_all_files(form: str) -> None:
    assert_parity(model_of(EVERY[form]))


def test_the_forms_have_every_op() -> None:
    found = {node.target.__name__ for form in EVERY.values() for node in model_of(form).teacher.graph.nodes
             if node.op == "call_function"}  # fmt: skip
    assert found == set(OPS) - {"embedding"}  # of indices, not of images: see the networks of tests/networks


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_with_one_scale_export(bits: int) -> None:
    """Convolutions, grouped and transposed ones, and linear layers."""
    form = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.ReLU6(), nn.ConvTranspose2d(4, 6, 3, 2), nn.Conv2d(6, 6, 3, 2, groups=2)
    )
    model = model_of(form, "per_tensor", bits)
    assert all(quantizer.scale.dim() == 0 for quantizer in model.weight_quantizers.values())
    assert all(
        quantizer(torch.empty(0)).dtype == torch.float64 for quantizer in model.double().weight_quantizers.values()
    )
    assert_parity(model.float())


def test_a_repeated_operand_keeps_its_place() -> None:
    """The codes of a concatenation are those of its operands, in their order."""
    model = model_of(EVERY["cat of a, b, a"])
    step = next(step for step in make_program(model).steps if step.op == "cat")
    a, b, again = step.inputs[0]
    assert a == again != b


def test_antialiased_resizes_are_refused_by_name() -> None:
    with pytest.raises(CaptureError, match="'interpolate' with antialias is not supported"):
        model_of(lambda x: resize(x, (4, 5), antialias=True))
