"""Flat bit-packing: codes of 1 to 16 bits back to back, most significant bit first, padded once per tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calibquant.numerics.grid import Grid


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: ceil(count * bits / 8)."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, grid: Grid) -> Tensor:
    """Pack integer codes into bytes.

    Code i (row-major) occupies bits [i*b, (i+1)*b) of the stream; within it the most significant bit comes first, as
    an offset from `grid.qmin`; bit 0 of the stream is the most significant bit of byte 0; the last byte is padded
    with zeros.

    Args:
        codes: integers on `grid`, any shape.

    Returns:
        uint8, shape (packed_bytes(codes.numel(), grid.bits),).

    Raises:
        ValueError: a code is outside the grid.

    Example:
        >>> pack(torch.tensor([1, 2, 3]), Grid(4)).tolist()
        [18, 48]
    """
    flat = codes.detach().cpu().reshape(-1).numpy().astype(np.int64) - grid.qmin
    if flat.size and (flat.min() < 0 or flat.max() > grid.steps):
        raise ValueError(f"codes outside the {grid.bits}-bit grid {grid.qmin}..{grid.qmax}")
    shifts = np.arange(grid.bits - 1, -1, -1)
    bits = ((flat[:, None] >> shifts) & 1).astype(np.uint8)
    return torch.from_numpy(np.packbits(bits.reshape(-1)))


def unpack(packed: Tensor, shape: tuple[int, ...], grid: Grid) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8 bytes.
        shape: the codes' shape.

    Returns:
        codes of dtype `grid.dtype`.

    Raises:
        ValueError: the number of bytes does not fit the shape.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if packed.numel() != packed_bytes(count, grid.bits):
        raise ValueError(f"{packed.numel()} bytes do not hold {count} codes of {grid.bits} bits")
    bits = np.unpackbits(packed.cpu().numpy(), count=count * grid.bits).reshape(count, grid.bits)
    weights = 1 << np.arange(grid.bits - 1, -1, -1)
    flat = bits.astype(np.int64) @ weights + grid.qmin
    return torch.from_numpy(flat).to(grid.dtype).reshape(shape)
