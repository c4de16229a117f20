"""Ops with a weight as matrix products: an output value is a row of the weight times a column of the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """How an op is a product of matrices, for G groups of O output channels, K weights each, at L output positions.

    The op's output without bias, as `outputs` shows it, is `rows(weight) @ columns(x, …)`.

    Args:
        columns: (x, weight shape, positions, the op's attributes) -> the inputs that meet a weight at P chosen
            positions (int64) of all N images, (G, K, N * P), image by image.
        rows: (weight, G) -> (G, O, K).
        weight: (rows, weight shape) -> the weight; the inverse of `rows`.
        outputs: (the op's output, G) -> (N, G, O, L).
    """

    columns: Callable[..., Tensor]
    rows: Callable[[Tensor, int], Tensor]
    weight: Callable[[Tensor, Sequence[int]], Tensor]
    outputs: Callable[[Tensor, int], Tensor]


def _conv1d_columns(
    x: Tensor, weight: Sequence[int], positions: Tensor, *, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """Of (N, C, L), as a picture of height 1."""
    return _conv_columns(
        x.unsqueeze(2), (*weight[:2], 1, weight[2]), positions,
        stride=(1, stride), padding=(0, padding), dilation=(1, dilation), groups=groups,
    )  # fmt: skip


def _conv_columns(
    x: Tensor,
    weight: Sequence[int],
    positions: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Of (N, C, H, W)."""
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    offsets = _grid(weight[2:], dilation, padded.shape[3])
    width = (padded.shape[3] - dilation[1] * (weight[3] - 1) - 1) // stride[1] + 1
    return _gathered(padded, offsets, _starts(positions, width, stride, padded.shape[3]), groups)


def _transposed_columns(
    x: Tensor,
    weight: Sequence[int],
    positions: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    """Of (N, C, H, W). A transposed convolution is a convolution of the input with stride - 1 zeros between its values
    and the kernel turned round: so the offsets are turned round, and the columns fit the weight as it is."""
    height, width = ((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True))
    spread = x.new_zeros(*x.shape[:2], height, width)
    spread[:, :, :: stride[0], :: stride[1]] = x
    before = [d * (k - 1) - p for d, k, p in zip(dilation, weight[2:], padding, strict=True)]
    after = [b + o for b, o in zip(before, output_padding, strict=True)]
    padded = F.pad(spread, (before[1], after[1], before[0], after[0]))  # a negative padding cuts
    offsets = _grid(weight[2:], dilation, padded.shape[3]).flip(0)
    starts = _starts(positions, padded.shape[3] - dilation[1] * (weight[3] - 1), (1, 1), padded.shape[3])
    return _gathered(padded, offsets, starts, groups)


def _grid(kernel: Sequence[int], dilation: Sequence[int], width: int) -> Tensor:
    """Where a kernel's values lie behind its first one in a picture of a width, int64 (values,)."""
    down, right = torch.arange(kernel[0]) * dilation[0], torch.arange(kernel[1]) * dilation[1]
    return (down[:, None] * width + right).flatten()


def _starts(positions: Tensor, across: int, stride: Sequence[int], width: int) -> Tensor:
    """Where the kernel begins in a picture of a width, for output positions counted in lines of `across`."""
    return positions // across * stride[0] * width + positions % across * stride[1]


def _gathered(padded: Tensor, offsets: Tensor, starts: Tensor, groups: int) -> Tensor:
    """The values (N, C, H, W) under the kernel at each start: (G, C / G * kernel, N * P)."""
    index = (offsets[:, None] + starts).flatten().to(padded.device)
    values = padded.flatten(2).index_select(2, index)
    return (
        values.unflatten(2, (len(offsets), -1))
        .unflatten(1, (groups, -1))
        .permute(1, 2, 3, 0, 4)
        .flatten(3)
        .flatten(1, 2)
    )


def _conv_rows(weight: Tensor, groups: int) -> Tensor:
    return weight.unflatten(0, (groups, -1)).flatten(2)


def _conv_weight(rows: Tensor, shape: Sequence[int]) -> Tensor:
    return rows.reshape(tuple(shape))


def _transposed_rows(weight: Tensor, groups: int) -> Tensor:
    """Of (I, O / G, …): a group's inputs stand together on the first axis."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)


def _transposed_weight(rows: Tensor, shape: Sequence[int]) -> Tensor:
    inputs = shape[0] // rows.shape[0]
    return rows.unflatten(2, (inputs, *shape[2:])).transpose(1, 2).flatten(0, 1)


def _conv_outputs(y: Tensor, groups: int) -> Tensor:
    return y.flatten(2).unflatten(1, (groups, -1))


def _linear_columns(x: Tensor, weight: Sequence[int], positions: Tensor) -> Tensor:
    chosen = x.reshape(len(x), -1, weight[1]).index_select(1, positions.to(x.device))
    return chosen.reshape(1, -1, weight[1]).transpose(1, 2)


def _linear_rows(weight: Tensor, groups: int) -> Tensor:
    return weight[None]


def _linear_weight(rows: Tensor, shape: Sequence[int]) -> Tensor:
    return rows[0]


def _linear_outputs(y: Tensor, groups: int) -> Tensor:
    return y.reshape(len(y), 1, -1, y.shape[-1]).transpose(2, 3)


CONVOLUTION_1D = Product(_conv1d_columns, _conv_rows, _conv_weight, _conv_outputs)
CONVOLUTION = Product(_conv_columns, _conv_rows, _conv_weight, _conv_outputs)
TRANSPOSED = Product(_transposed_columns, _transposed_rows, _transposed_weight, _conv_outputs)
LINEAR = Product(_linear_columns, _linear_rows, _linear_weight, _linear_outputs)
