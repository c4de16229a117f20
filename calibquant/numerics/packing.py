"""Flat bit-packing: codes of 1 to 16 bits back to back, most significant bit first, padded once per tensor.

The codes of a tensor have the same number of bits, or each channel its own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibquant.numerics.affine import code_limits
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


def channel_packed_bytes(count: int, channel_bits: Tensor) -> int:
    """Bytes of `pack_channels` for `count` codes in each channel: ceil(count * sum(bits) / 8)."""
    return packed_bytes(count * int(channel_bits.sum()), 1)


def pack_channels(codes: Tensor, channel_bits: Tensor, signed: bool) -> Tensor:
    """Pack codes whose number of bits differs from channel to channel.

    The channels follow each other in one stream, each as `pack` writes it with its own bits but without padding; a
    channel of 0 bits takes nothing. Only the end of the stream is padded.

    Args:
        codes: integers, (C, ...), each within the grid of its channel's bits.
        channel_bits: int (C,), 0 to 8.
        signed: of the grids.

    Returns:
        uint8, shape (channel_packed_bytes(codes[0].numel(), channel_bits),).

    Raises:
        ValueError: a code is outside its channel's grid.

    Example:
        >>> pack_channels(torch.tensor([[1, 0], [0, 0], [5, 7]]), torch.tensor([1, 0, 3]), signed=False).tolist()
        [175]
    """
    rows = codes.detach().cpu().reshape(len(codes), -1).numpy().astype(np.int64)
    low, high = (end.cpu().numpy()[:, None] for end in code_limits(channel_bits, signed))
    if (rows < low).any() or (rows > high).any():
        raise ValueError("codes outside the grids of their channels")
    offsets, counts = (rows - low).reshape(-1), np.repeat(channel_bits.cpu().numpy(), rows.shape[1])
    return torch.from_numpy(np.packbits(_digits(offsets, counts)))


def unpack_channels(packed: Tensor, shape: tuple[int, ...], channel_bits: Tensor, signed: bool) -> Tensor:
    """Inverse of `pack_channels`.

    Args:
        packed: uint8 bytes.
        shape: of the codes, (C, ...).

    Returns:
        codes, int64.

    Raises:
        ValueError: the number of bytes does not fit the shape.
    """
    each = int(np.prod(shape[1:], dtype=np.int64))
    if packed.numel() != channel_packed_bytes(each, channel_bits):
        raise ValueError(f"{packed.numel()} bytes do not hold {each} codes of each channel")
    counts = np.repeat(channel_bits.cpu().numpy().astype(np.int64), each)
    bits = np.unpackbits(packed.cpu().numpy(), count=int(counts.sum()))
    owner = np.repeat(np.arange(len(counts)), counts)
    flat = np.zeros(len(counts), np.int64)
    np.add.at(flat, owner, bits.astype(np.int64) << _places(counts))
    low = code_limits(channel_bits, signed)[0].cpu().numpy()
    return torch.from_numpy(flat.reshape(len(low), -1) + low[:, None]).reshape(shape)


def _digits(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The lowest `counts` binary digits of each value, most significant first, back to back."""
    return ((np.repeat(values, counts) >> _places(counts)) & 1).astype(np.uint8)


def _places(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The place of each digit of numbers with so many: counts[0] - 1 … 0, counts[1] - 1 … 0, …"""
    ends = np.cumsum(counts)
    return np.repeat(ends, counts) - 1 - np.arange(ends[-1] if len(ends) else 0)
