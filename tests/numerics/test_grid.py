import pytest
import torch

from calibquant.numerics.grid import Grid, PerChannel, PerTensor


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("signed", [False, True])
def test_a_grid_has_two_to_the_bits_codes_and_its_dtype_holds_them(bits: int, signed: bool) -> None:
    grid = Grid(bits, signed)
    assert grid.qmax - grid.qmin + 1 == 2**bits == grid.steps + 1
    assert (grid.qmin < 0) == signed
    ends = torch.tensor([grid.qmin, grid.qmax])
    assert torch.equal(ends.to(grid.dtype).long(), ends)


@pytest.mark.parametrize(
    ("bits", "signed", "dtype"),
    [
        (8, False, torch.uint8),
        (8, True, torch.int8),
        (9, False, torch.int32),
        (9, True, torch.int16),
        (16, True, torch.int16),
    ],
)
def test_dtypes(bits: int, signed: bool, dtype: torch.dtype) -> None:
    assert Grid(bits, signed).dtype == dtype


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 16 bits"):
        Grid(bits)


def test_grids_and_granularities_are_values() -> None:
    assert len({Grid(4), Grid(4, signed=False), Grid(4, signed=True)}) == 2
    assert PerChannel() == PerChannel(0) != PerChannel(1)
    assert PerTensor() == PerTensor()
