"""The canonical ops and their one table.

A captured network consists of these ops and nothing else. Each is a pure function of tensors (positional arguments)
and JSON-able attributes (keyword arguments). What the rest of the code needs to know about an op stands in its row of
`OPS`; no other place knows ops one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from calibquant.graph.products import CONVOLUTION, CONVOLUTION_1D, LINEAR, TRANSPOSED, Product


class Kind(Enum):
    """What an op is to a quantizer."""

    CONVOLUTION = "convolution"
    MATMUL = "matmul"
    ADD = "add"  # sums and differences of two tensors
    MUL = "mul"  # products and quotients of two tensors
    CONCAT = "concat"
    POOL = "pool"
    NORM = "norm"  # normalization that was not folded into a convolution
    LOOKUP = "lookup"
    ACTIVATION = "activation"  # element-wise function of one tensor
    MOVE = "move"  # moves values without computing new ones
    RESAMPLE = "resample"
    FLOAT = "float"  # has no integer form here


@dataclass(frozen=True)
class Op:
    """One row of the table.

    Args:
        run: the op itself.
        kind: its role.
        weight, bias: positions of the weight and the bias among the arguments.
        weight_axis: output-channel axis of the weight.
        keeps_grid: if its input lies on a grid, so does its output: the input's range is shared.
        integer: an integer runtime computes it from integer inputs; the `integer` placement quantizes all it reads.
        limits: it only limits values from below or above, which on a grid is a limit of the codes.
        accumulates: an integer kernel sums its products and its bias in int32.
        homogeneous: f(s * x) = s * f(x) for a positive s in each channel.
        keeps_mean: where it treats each channel apart, a channel's mean is unchanged but for what is padded.
        product: how it is a product of matrices.
    """

    run: Callable[..., Tensor]
    kind: Kind
    weight: int | None = None
    bias: int | None = None
    weight_axis: int = 0
    keeps_grid: bool = False
    integer: bool = False
    limits: bool = False
    accumulates: bool = False
    homogeneous: bool = False
    keeps_mean: bool = False
    product: Product | None = None

    @property
    def name(self) -> str:
        """The name in graph.json."""
        return self.run.__name__


# --- convolutions, products -------------------------------------------------------------------------------------------


def conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    return F.conv1d(x, weight, bias, stride, padding, dilation, groups)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    return F.conv_transpose2d(
        x, weight, bias, tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y)


def embedding(indices: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(indices, weight)


# --- several tensors --------------------------------------------------------------------------------------------------


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def sub(x: Tensor, y: Tensor) -> Tensor:
    return x - y


def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def div(x: Tensor, y: Tensor) -> Tensor:
    return x / y


def cat(tensors: Sequence[Tensor], *, dim: int) -> Tensor:
    return torch.cat(list(tensors), dim)


# --- pools ------------------------------------------------------------------------------------------------------------


def max_pool2d(
    x: Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> Tensor:
    return F.max_pool2d(x, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), ceil)


def avg_pool2d(
    x: Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    count_padding: bool,
    divisor: int | None,
) -> Tensor:
    return F.avg_pool2d(x, tuple(kernel), tuple(stride), tuple(padding), ceil, count_padding, divisor)


def adaptive_avg_pool2d(x: Tensor, *, size: Sequence[int]) -> Tensor:
    return F.adaptive_avg_pool2d(x, (size[0], size[1]))


def adaptive_max_pool2d(x: Tensor, *, size: Sequence[int]) -> Tensor:
    return F.adaptive_max_pool2d(x, tuple(size))


def mean(x: Tensor, *, dims: Sequence[int], keepdim: bool) -> Tensor:
    return x.mean(tuple(dims), keepdim)


def amax(x: Tensor, *, dims: Sequence[int], keepdim: bool) -> Tensor:
    return x.amax(tuple(dims), keepdim)


# --- normalization that cannot be folded ------------------------------------------------------------------------------


def batch_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> Tensor:
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, normalized_shape: Sequence[int], eps: float
) -> Tensor:
    return F.layer_norm(x, tuple(normalized_shape), weight, bias, eps)


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, groups: int, eps: float) -> Tensor:
    return F.group_norm(x, groups, weight, bias, eps)


def softmax(x: Tensor, *, dim: int) -> Tensor:
    return torch.softmax(x, dim)


# --- element-wise functions of one tensor -----------------------------------------------------------------------------


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def clamp(x: Tensor, *, low: float | None, high: float | None) -> Tensor:
    return torch.clamp(x, low, high)


def leaky_relu(x: Tensor, *, slope: float) -> Tensor:
    return F.leaky_relu(x, slope)


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    return F.prelu(x, weight)


def elu(x: Tensor, *, alpha: float) -> Tensor:
    return F.elu(x, alpha)


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


def hardsigmoid(x: Tensor) -> Tensor:
    return F.hardsigmoid(x)


def hardswish(x: Tensor) -> Tensor:
    return F.hardswish(x)


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def gelu(x: Tensor, *, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def softplus(x: Tensor, *, beta: float, threshold: float) -> Tensor:
    return F.softplus(x, beta, threshold)


def mish(x: Tensor) -> Tensor:
    return F.mish(x)


def mul_scalar(x: Tensor, *, value: float) -> Tensor:
    return x * value


def add_scalar(x: Tensor, *, value: float) -> Tensor:
    return x + value


# --- moves ------------------------------------------------------------------------------------------------------------


def flatten(x: Tensor, *, start: int) -> Tensor:
    return torch.flatten(x, start)


def reshape(x: Tensor, *, shape: Sequence[int]) -> Tensor:
    return x.reshape(tuple(shape))


def permute(x: Tensor, *, dims: Sequence[int]) -> Tensor:
    return x.permute(tuple(dims))


def slice_(x: Tensor, *, dim: int, start: int | None, stop: int | None, step: int) -> Tensor:
    return x[(slice(None),) * dim + (slice(start, stop, step),)]


def pad(x: Tensor, *, padding: Sequence[int], mode: str) -> Tensor:
    return F.pad(x, tuple(padding), mode)


def pad_value(x: Tensor, *, padding: Sequence[int], value: float) -> Tensor:
    return F.pad(x, tuple(padding), "constant", value)


def upsample_nearest(x: Tensor, *, size: Sequence[int] | None, scale: Sequence[float] | None) -> Tensor:
    return F.interpolate(x, None if size is None else tuple(size), None if scale is None else tuple(scale), "nearest")


def upsample_bilinear(
    x: Tensor, *, size: Sequence[int] | None, scale: Sequence[float] | None, align_corners: bool
) -> Tensor:
    size, scale = None if size is None else tuple(size), None if scale is None else tuple(scale)
    return F.interpolate(x, size, scale, "bilinear", align_corners=align_corners)


def pixel_shuffle(x: Tensor, *, factor: int) -> Tensor:
    return F.pixel_shuffle(x, factor)


def pixel_unshuffle(x: Tensor, *, factor: int) -> Tensor:
    return F.pixel_unshuffle(x, factor)


_TABLE = [
    Op(conv1d, Kind.CONVOLUTION, weight=1, bias=2, integer=True, accumulates=True, product=CONVOLUTION_1D),
    Op(conv2d, Kind.CONVOLUTION, weight=1, bias=2, integer=True, accumulates=True, product=CONVOLUTION),
    Op(conv_transpose2d, Kind.CONVOLUTION, weight=1, bias=2, weight_axis=1, integer=True, product=TRANSPOSED),
    Op(linear, Kind.MATMUL, weight=1, bias=2, integer=True, accumulates=True, product=LINEAR),
    Op(matmul, Kind.MATMUL, integer=True),
    Op(embedding, Kind.LOOKUP, weight=1),
    Op(add, Kind.ADD, integer=True),
    Op(sub, Kind.ADD, integer=True),
    Op(mul, Kind.MUL, integer=True),
    Op(div, Kind.MUL),
    Op(cat, Kind.CONCAT, integer=True),
    Op(max_pool2d, Kind.POOL, keeps_grid=True, integer=True, homogeneous=True),
    Op(avg_pool2d, Kind.POOL, integer=True, homogeneous=True, keeps_mean=True),
    Op(adaptive_avg_pool2d, Kind.POOL, integer=True, homogeneous=True, keeps_mean=True),
    Op(adaptive_max_pool2d, Kind.POOL, keeps_grid=True, integer=True, homogeneous=True),
    Op(mean, Kind.POOL, integer=True, homogeneous=True, keeps_mean=True),
    Op(amax, Kind.POOL, keeps_grid=True, integer=True, homogeneous=True),
    Op(batch_norm, Kind.NORM),
    Op(layer_norm, Kind.NORM),
    Op(group_norm, Kind.NORM),
    Op(softmax, Kind.FLOAT),
    Op(relu, Kind.ACTIVATION, limits=True, homogeneous=True),
    Op(clamp, Kind.ACTIVATION, limits=True),
    Op(leaky_relu, Kind.ACTIVATION, homogeneous=True),
    Op(prelu, Kind.ACTIVATION, homogeneous=True),
    Op(elu, Kind.ACTIVATION),
    Op(sigmoid, Kind.ACTIVATION),
    Op(tanh, Kind.ACTIVATION),
    Op(hardsigmoid, Kind.ACTIVATION),
    Op(hardswish, Kind.ACTIVATION),
    Op(silu, Kind.ACTIVATION),
    Op(gelu, Kind.ACTIVATION),
    Op(softplus, Kind.ACTIVATION),
    Op(mish, Kind.ACTIVATION),
    Op(mul_scalar, Kind.ACTIVATION),
    Op(add_scalar, Kind.ACTIVATION),
    Op(flatten, Kind.MOVE, keeps_grid=True, homogeneous=True, keeps_mean=True),
    Op(reshape, Kind.MOVE, keeps_grid=True),
    Op(permute, Kind.MOVE, keeps_grid=True),
    Op(slice_, Kind.MOVE, keeps_grid=True),
    Op(pad, Kind.MOVE, keeps_grid=True, homogeneous=True, keeps_mean=True),
    Op(pad_value, Kind.MOVE, integer=True),
    Op(upsample_nearest, Kind.MOVE, keeps_grid=True, homogeneous=True, keeps_mean=True),
    Op(pixel_shuffle, Kind.MOVE, keeps_grid=True),
    Op(pixel_unshuffle, Kind.MOVE, keeps_grid=True),
    Op(upsample_bilinear, Kind.RESAMPLE, integer=True, homogeneous=True, keeps_mean=True),
]
OPS: dict[str, Op] = {op.name: op for op in _TABLE}
BY_FUNCTION: dict[object, Op] = {op.run: op for op in _TABLE}

COMPUTE = {
    Kind.CONVOLUTION, Kind.MATMUL, Kind.ADD, Kind.MUL, Kind.CONCAT, Kind.POOL, Kind.NORM, Kind.LOOKUP, Kind.RESAMPLE,
    Kind.FLOAT,
}  # fmt: skip
