import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibquant.numerics.grid import Grid
from calibquant.numerics.packing import pack, packed_bytes, unpack


def packed_by_integers(codes: list[int], grid: Grid) -> bytes:
    """The same layout by one big Python integer."""
    stream = 0
    for code in codes:
        stream = (stream << grid.bits) | (code - grid.qmin)
    size = -(-len(codes) * grid.bits // 8)
    return (stream << (8 * size - len(codes) * grid.bits)).to_bytes(size, "big")


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 16),
    signed=st.booleans(),
    shape=st.lists(st.integers(0, 7), max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_and_layout(bits: int, signed: bool, shape: list[int], seed: int) -> None:
    grid = Grid(bits, signed)
    codes = torch.from_numpy(np.random.default_rng(seed).integers(grid.qmin, grid.qmax + 1, shape)).to(grid.dtype)
    packed = pack(codes, grid)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(codes.numel(), bits)
    assert bytes(packed.tolist()) == packed_by_integers(codes.reshape(-1).tolist(), grid)
    back = unpack(packed, tuple(shape), grid)
    assert back.dtype == grid.dtype
    assert torch.equal(back, codes)


@pytest.mark.parametrize(
    ("codes", "grid", "expected"),
    [
        ([1, 0, 1], Grid(1), [0b10100000]),
        ([3, 0, 2, 1, 1], Grid(2), [0b11001001, 0b01000000]),
        ([-2, -1, 0, 1], Grid(2, signed=True), [0b00011011]),
        ([5, 2, 7], Grid(3), [0b10101011, 0b10000000]),
        ([1, 2, 3], Grid(4), [0x12, 0x30]),
        ([255, 0, 7], Grid(8), [255, 0, 7]),
        ([0x123, 0xFED], Grid(12), [0x12, 0x3F, 0xED]),
        ([-32768, 32767], Grid(16, signed=True), [0, 0, 255, 255]),
    ],
)
def test_hand_computed_bytes(codes: list[int], grid: Grid, expected: list[int]) -> None:
    assert pack(torch.tensor(codes), grid).tolist() == expected


@pytest.mark.parametrize(
    ("count", "bits", "size"), [(0, 3, 0), (1, 1, 1), (8, 1, 1), (9, 1, 2), (3, 3, 2), (5, 16, 10)]
)
def test_packed_bytes(count: int, bits: int, size: int) -> None:
    assert packed_bytes(count, bits) == size


@pytest.mark.parametrize(("code", "grid"), [(4, Grid(2)), (-1, Grid(2)), (2, Grid(2, signed=True))])
def test_codes_outside_the_grid_are_refused(code: int, grid: Grid) -> None:
    with pytest.raises(ValueError, match="outside"):
        pack(torch.tensor([0, code]), grid)


def test_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="do not hold"):
        unpack(torch.zeros(3, dtype=torch.uint8), (9,), Grid(3))


def test_a_transposed_tensor_packs_row_major() -> None:
    codes = torch.arange(6).reshape(2, 3)
    assert torch.equal(pack(codes.T, Grid(4)), pack(codes.T.contiguous(), Grid(4)))
