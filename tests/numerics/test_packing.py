import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibquant.numerics.grid import Grid
from calibquant.numerics.packing import (
    channel_packed_bytes,
    pack,
    pack_channels,
    packed_bytes,
    unpack,
    unpack_channels,
)


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


# --- channels with bits of their own ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "bits", "signed", "expected"),
    [
        # 1 0 | nothing | 101 111 | 0001 0010, then two zeros: 10101111 00010010
        ([[1, 0], [0, 0], [5, 7], [1, 2]], [1, 0, 3, 4], False, [0b10101111, 0b00010010]),
        # offsets from -1, -4 and 0: 1 0 | 000 111 | nothing
        ([[0, -1], [-4, 3], [0, 0]], [1, 3, 0], True, [0b10000111]),
        ([[255, 3]], [8], False, [255, 3]),
        ([[0], [0]], [0, 0], False, []),
    ],
)
def test_channels_by_hand(codes: list[list[int]], bits: list[int], signed: bool, expected: list[int]) -> None:
    packed = pack_channels(torch.tensor(codes), torch.tensor(bits), signed)
    assert packed.tolist() == expected
    assert channel_packed_bytes(len(codes[0]), torch.tensor(bits)) == len(expected)
    back = unpack_channels(packed, (len(codes), len(codes[0])), torch.tensor(bits), signed)
    assert back.tolist() == codes


@given(st.lists(st.integers(0, 8), min_size=1, max_size=12), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_unpacking_channels_inverts_packing(bits: list[int], each: int, signed: bool, seed: int) -> None:
    """Against a string of digits."""
    rng = np.random.default_rng(seed)
    lows = [-(2 ** (b - 1)) if signed and b else 0 for b in bits]
    rows = [rng.integers(low, low + 2**b, each) for b, low in zip(bits, lows, strict=True)]
    digits = "".join(f"{c - low:0{b}b}" for r, b, low in zip(rows, bits, lows, strict=True) for c in r if b)
    packed = pack_channels(torch.from_numpy(np.stack(rows)), torch.tensor(bits), signed)
    assert "".join(f"{byte:08b}" for byte in packed.tolist()) == digits.ljust(-(-len(digits) // 8) * 8, "0")
    assert torch.equal(unpack_channels(packed, (len(bits), each), torch.tensor(bits), signed),
                       torch.from_numpy(np.stack(rows)))  # fmt: skip


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4).map(lambda b: [b[0]] * len(b)), st.integers(0, 9))
def test_channels_of_equal_bits_are_packed_as_ever(bits: list[int], seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2 ** bits[0], (len(bits), 5)))
    assert torch.equal(pack_channels(codes, torch.tensor(bits), False), pack(codes, Grid(bits[0])))


@pytest.mark.parametrize(("codes", "bits"), [([[0], [4]], [1, 2]), ([[1]], [0]), ([[-1]], [3])])
def test_a_code_outside_its_channel_is_refused(codes: list[list[int]], bits: list[int]) -> None:
    with pytest.raises(ValueError, match="outside the grids of their channels"):
        pack_channels(torch.tensor(codes), torch.tensor(bits), False)


def test_bytes_that_do_not_fit_the_channels() -> None:
    with pytest.raises(ValueError, match="do not hold 2 codes of each channel"):
        unpack_channels(torch.zeros(3, dtype=torch.uint8), (2, 2), torch.tensor([1, 3]), False)
