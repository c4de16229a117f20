"""What the tests of ONNX files share: models, sessions, and an integer program computed in float by torch."""

from __future__ import annotations

import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from networks import NETWORKS, folded, quantized
from torch import Tensor, nn

from calibquant.export.program import QUANTIZE, TABLE, Program, Step
from calibquant.graph.ops import OPS
from calibquant.quantization import QuantModel
from calibquant.recipe import ActivationRecipe, Placement, QuantRecipe, WeightRecipe

Array = npt.NDArray[Any]


@cache
def model_of(
    name: str, weights: int = 4, activations: int = 4, placement: Placement = "integer", symmetric: bool = False,
    dynamic: bool = False,
) -> QuantModel:  # fmt: skip
    """A network with min-max ranges of four images; made once, to be read only."""
    recipe = QuantRecipe(
        placement=placement,
        weights=WeightRecipe(bits=weights, symmetric=symmetric, observer="minmax"),
        activations=ActivationRecipe(bits=activations, symmetric=symmetric, dynamic=dynamic, observer="minmax"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice about the padding of one network
        return quantized(folded(name), recipe, images_of(name))


def images_of(name: str, batch: int = 4) -> Tensor:
    return NETWORKS[name].example(batch, seed=1)


def session_of(model: bytes, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """A default session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model: bytes, *inputs: Tensor) -> dict[str, Array]:
    """All outputs by name."""
    session = session_of(model)
    names = [value.name for value in session.get_inputs()]
    outputs = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return dict(zip([value.name for value in session.get_outputs()], outputs, strict=True))


def result(model: bytes, *inputs: Tensor) -> Array:
    """The first output."""
    return next(iter(run(model, *inputs).values()))


def relative(want: Array | Tensor, got: Array) -> float:
    """Largest difference relative to max(1, max |want|)."""
    want = np.asarray(want, np.float64)
    assert want.shape == got.shape
    return float(np.abs(want - got).max() / max(1.0, np.abs(want).max()))


def nodes_of(model: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(model).graph.node]


# --- a program in float -----------------------------------------------------------------------------------------------


def float_run(program: Program, x: Tensor) -> dict[str, Array]:
    """Each step's value as the program says, by torch in float64 and rounded: codes on a grid, else float."""
    grids, values = program.grids, {program.inputs[0]: x}

    def floats(name: Any) -> Any:
        if isinstance(name, tuple):
            return [floats(n) for n in name]
        if name is None:
            return None
        if name in program.parameters:
            tensor = torch.from_numpy(program.parameters[name])
        else:
            tensor, grid = values[name], grids[name]
            if grid is not None:
                tensor = (tensor - grid.zero_point) * float(grid.scale)
        return tensor.double() if tensor.is_floating_point() else tensor

    for step in program.steps:
        if step.op == TABLE:
            assert step.table is not None
            values[step.output] = torch.from_numpy(step.table[values[step.inputs[0]].numpy().astype(int)]).double()
            continue
        value = floats(step.inputs[0]) if step.op == QUANTIZE else _compute(step, floats, grids)
        if step.grid is not None:
            codes = torch.round(value.float() / float(step.grid.scale)) + step.grid.zero_point
            value = codes.clamp(step.grid.low, step.grid.high).double()
        values[step.output] = value
    return {name: value.numpy() for name, value in values.items()}


def _compute(step: Step, floats: Any, grids: Any) -> Tensor:
    row, inputs = OPS[step.op], [floats(name) for name in step.inputs]
    if step.weight is not None:
        inputs[row.weight or 0] = torch.from_numpy(step.weight.values()).double()
    if step.bias is not None:
        scale = float(grids[step.inputs[0]].scale) * step.weight.scale.astype(np.float64)  # type: ignore[union-attr]
        inputs[row.bias or 0] = torch.from_numpy(step.bias * scale)
    value = row.run(*inputs, **step.attributes)
    if step.on_codes and step.grid is not None:  # exact again after a trip through float64
        value = (value / float(step.grid.scale)).round() * float(step.grid.scale)
    assert math.isfinite(float(value.sum()))
    return value


# --- every form of an op ----------------------------------------------------------------------------------------------


class Apply(nn.Module):
    """A convolution, so that there is something to quantize, and a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


FORMS = {
    "max pool, ceil": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "max pool, ceil, padded": lambda x: F.max_pool2d(x, 4, (3, 2), 2, ceil_mode=True),
    "max pool, ceil, dilated": lambda x: F.max_pool2d(x, 2, 4, 1, 4, ceil_mode=True),
    "max pool, stride over kernel": lambda x: F.max_pool2d(x, 2, 5, ceil_mode=True),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "average pool, padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average pool, padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average pool, ceil": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "average pool, ceil, padded": lambda x: F.avg_pool2d(x, 4, (3, 2), 2, ceil_mode=True),
    "average pool, ceil, not counted": lambda x: F.avg_pool2d(x, 4, (3, 2), 2, True, False),
    "average pool, divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
    "average pool, ceil, divisor": lambda x: F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=3),
    "adaptive average, even": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "adaptive average, uneven": lambda x: F.adaptive_avg_pool2d(x, (2, 7)),
    "adaptive average, larger": lambda x: F.adaptive_avg_pool2d(x, (12, 11)),
    "adaptive max, even": lambda x: F.adaptive_max_pool2d(x, (3, 2)),
    "adaptive max, uneven": lambda x: F.adaptive_max_pool2d(x, (2, 4)),
    "mean of one": lambda x: x.mean(1),
    "mean of three": lambda x: x.mean((1, 2, 3), keepdim=True),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "pad, uneven": lambda x: F.pad(x, (1, 0, 2, 3)),
    "pad, negative": lambda x: F.pad(x, (-1, 2, 0, -2)),
    "pad of channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "pad with a value": lambda x: F.pad(x, (1, 2), value=-0.5),
    "reflect": lambda x: F.pad(x, (1, 2, 0, 3), "reflect"),
    "replicate": lambda x: F.pad(x, (1, 2, 0, 3), "replicate"),
    "circular": lambda x: F.pad(x, (1, 2, 0, 3), "circular"),
    "slices": lambda x: x[:, 1:3, ::2, -4:],
    "nearest by two": lambda x: F.interpolate(x, scale_factor=2),
    "nearest by a fraction": lambda x: F.interpolate(x, scale_factor=(1.7, 0.6)),
    "nearest to a size": lambda x: F.interpolate(x, (13, 27)),
    "bilinear by two": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear to a size": lambda x: F.interpolate(x, (7, 23), mode="bilinear"),
    "bilinear by a fraction": lambda x: F.interpolate(x, scale_factor=(1.3, 0.7), mode="bilinear"),
    "bilinear to the corners": lambda x: F.interpolate(x, (7, 23), mode="bilinear", align_corners=True),
    "bilinear to one": lambda x: F.interpolate(x, (1, 1), mode="bilinear"),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 3),
    "group norm": lambda x: F.group_norm(x, 2),
    "layer norm": lambda x: F.layer_norm(x, (9, 15), eps=1e-2),
    "layer norm, permuted": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)),
    "softmax": lambda x: torch.softmax(x, 1),
    "clamp below": lambda x: x.clamp(min=-0.25),
    "clamp above": lambda x: x.clamp(max=0.25),
    "clamp": lambda x: x.clamp(-0.25, 0.25),
    "relu": F.relu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.3),
    "elu": lambda x: F.elu(x, 0.7),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardsigmoid": lambda x: F.hardsigmoid(4 * x),
    "hardswish": lambda x: F.hardswish(4 * x),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "softplus with beta": lambda x: F.softplus(x, 3.0, 2.0),
    "mish": F.mish,
    "arithmetic": lambda x: (2 * x - 1) / 3 + x / (x * x + 1),
    "linear of images": lambda x: F.linear(x, torch.linspace(-1, 1, 60).reshape(4, 15), torch.arange(4.0)),
    "product": lambda x: x @ x.transpose(2, 3),
}
