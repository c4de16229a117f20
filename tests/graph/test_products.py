"""Ops as matrix products: rows times columns is what the op computes, at every position or at chosen ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calibquant.graph import ops
from calibquant.graph.ops import OPS

CASES: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("conv1d", (2, 4, 11), (6, 4, 3), {"stride": 2, "padding": 1, "dilation": 2, "groups": 1}),
    ("conv1d", (2, 4, 9), (6, 2, 3), {"stride": 1, "padding": 0, "dilation": 1, "groups": 2}),
    ("conv2d", (2, 3, 7, 9), (5, 3, 3, 2), {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 1), "groups": 1}),
    ("conv2d", (3, 6, 6, 5), (6, 1, 3, 3), {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 6}),
    ("conv2d", (2, 4, 5, 5), (6, 2, 1, 1), {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 2}),
    (
        "conv_transpose2d", (2, 3, 4, 5), (3, 4, 3, 2),
        {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "groups": 1, "dilation": (2, 1)},
    ),
    (
        "conv_transpose2d", (2, 4, 5, 4), (4, 3, 2, 2),
        {"stride": (1, 2), "padding": (1, 1), "output_padding": (0, 1), "groups": 2, "dilation": (1, 1)},
    ),
    (
        "conv_transpose2d", (1, 2, 4, 4), (2, 2, 1, 1),
        {"stride": (2, 2), "padding": (1, 1), "output_padding": (0, 0), "groups": 1, "dilation": (1, 1)},
    ),
    ("linear", (4, 6), (5, 6), {}),
    ("linear", (2, 3, 4, 6), (5, 6), {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "input_shape", "weight_shape", "attributes"), CASES)
def test_rows_times_columns_is_the_op(
    name: str, input_shape: tuple[int, ...], weight_shape: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(input_shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(weight_shape, generator=generator, dtype=torch.float64)
    op, groups = OPS[name], attributes.get("groups", 1)
    assert op.product is not None
    want = op.product.outputs(op.run(x, weight, None, **attributes), groups)
    chosen = torch.randperm(want.shape[3], generator=generator)[: max(1, want.shape[3] // 2)]
    for positions in (torch.arange(want.shape[3]), chosen):
        columns = op.product.columns(x, weight.shape, positions, **attributes)
        got = op.product.rows(weight, groups) @ columns
        torch.testing.assert_close(got, want[..., positions].permute(1, 2, 0, 3).flatten(2))
    assert torch.equal(op.product.weight(op.product.rows(weight, groups), weight.shape), weight)


def test_every_op_whose_weight_multiplies_its_input_has_a_product() -> None:
    multiplying = {ops.Kind.CONVOLUTION, ops.Kind.MATMUL}
    for op in OPS.values():
        assert (op.product is not None) == (op.weight is not None and op.kind in multiplying)
