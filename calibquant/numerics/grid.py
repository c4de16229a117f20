"""Grids: the sets of representable codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A uniform grid of integer codes.

    Args:
        bits: 1 to 16.
        signed: codes -2^(bits-1) … 2^(bits-1)-1 instead of 0 … 2^bits-1.

    Example:
        >>> Grid(4).qmin, Grid(4).qmax, Grid(4, signed=True).qmin
        (0, 15, -8)
    """

    bits: int
    signed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise ValueError(f"a grid has 1 to 16 bits, not {self.bits}")

    @property
    def qmin(self) -> int:
        """Lowest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Highest code."""
        return self.qmin + self.steps

    @property
    def steps(self) -> int:
        """Steps between the lowest and the highest code."""
        return (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Smallest torch dtype that holds every code."""
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed else torch.int32


@dataclass(frozen=True)
class PerTensor:
    """One scale and zero point for the whole tensor: shape () each."""


@dataclass(frozen=True)
class PerChannel:
    """One scale and zero point for each slice along `axis`.

    For a weight of shape (O, I, H, W) and axis 0 the scale has shape (O,).
    """

    axis: int = 0


Granularity = PerTensor | PerChannel


def widest(channel_bits: Tensor, signed: bool) -> Grid:
    """The grid of the widest of channels with so many bits, int (C,); of 1 bit where all have none."""
    return Grid(max(1, int(channel_bits.max())), signed)
