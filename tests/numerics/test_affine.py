import numpy as np
import pytest
import torch

from calibquant.numerics.affine import affine_from_range, dequantize, fake_quantize, quantize, quantize_tensor
from calibquant.numerics.grid import Grid, PerChannel, PerTensor

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("signed", "dtype"), [(False, torch.quint8), (True, torch.qint8)])
@pytest.mark.parametrize("scale", [0.25, 0.037])
def test_per_tensor_codes_equal_torch(signed: bool, dtype: torch.dtype, scale: float) -> None:
    grid, x, zero = Grid(8, signed), normal(1000) * 3, 3
    codes = quantize(x, torch.tensor(scale), torch.tensor(zero, dtype=torch.int32), grid, PerTensor())
    theirs = torch.quantize_per_tensor(x, scale, zero, dtype).int_repr().int()
    # torch multiplies by 1 / scale: the codes may differ by one where x / scale is a tie up to rounding
    ties = ((x.double() / scale) % 1 - 0.5).abs() < 1e-4
    assert torch.equal(codes.int()[~ties], theirs[~ties])
    assert ties.float().mean() < 0.01


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_channel_equals_each_channel_alone(axis: int) -> None:
    x, grid = normal(4, 4, 4), Grid(4)
    low, high = x.movedim(axis, 0).reshape(4, -1).aminmax(dim=1)
    scale, zero = affine_from_range(low, high, grid, symmetric=False)
    whole = fake_quantize(x, scale, zero, grid, PerChannel(axis))
    for c in range(4):
        part = fake_quantize(x.select(axis, c), scale[c], zero[c], grid, PerTensor())
        assert torch.equal(whole.select(axis, c), part)


def test_ties_round_to_even_and_codes_saturate() -> None:
    x = torch.tensor([-9.0, -1.5, -0.5, 0.5, 1.5, 2.5, 99.0, 1e30, -1e30])
    codes = quantize(x, torch.tensor(1.0), torch.tensor(2, dtype=torch.int32), Grid(3), PerTensor())
    assert codes.tolist() == [0, 0, 2, 2, 4, 4, 7, 7, 0]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 3.0), (-2.0, 0.0), (0.5, 3.0), (-3.0, -1.0)])
def test_asymmetric_scale_and_zero_point(bits: int, signed: bool, low: float, high: float) -> None:
    grid = Grid(bits, signed)
    scale, zero = affine_from_range(torch.tensor(low), torch.tensor(high), grid, symmetric=False)
    a, b = min(low, 0.0), max(high, 0.0)
    assert float(scale) == pytest.approx((b - a) / (2**bits - 1), rel=1e-6)
    assert int(zero) == pytest.approx(grid.qmin - a / ((b - a) / (2**bits - 1)), abs=0.51)
    assert grid.qmin <= int(zero) <= grid.qmax
    assert zero.dtype == torch.int32


@pytest.mark.parametrize(("signed", "zero"), [(True, 0), (False, 8)])
def test_symmetric_scale_and_zero_point(signed: bool, zero: int) -> None:
    scale, point = affine_from_range(
        torch.tensor([-3.0, -1.0]), torch.tensor([1.0, 2.0]), Grid(4, signed), symmetric=True
    )
    np.testing.assert_allclose(scale, np.array([3.0, 2.0]) / 7.5, rtol=1e-6)
    assert point.tolist() == [zero, zero]


def test_zero_is_always_represented_and_a_constant_zero_has_the_guard_scale() -> None:
    scale, zero = affine_from_range(torch.tensor(0.0), torch.tensor(0.0), Grid(8), symmetric=False)
    assert float(scale) == pytest.approx(1e-8)
    for low, high in [(-0.3, 1.0), (0.2, 0.7), (-5.0, -4.0)]:
        scale, zero = affine_from_range(torch.tensor(low), torch.tensor(high), Grid(4), symmetric=False)
        assert float(fake_quantize(torch.zeros(1), scale, zero, Grid(4), PerTensor())) == 0.0


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1)])
def test_codes_mean_exactly_the_simulated_values(bits: int, signed: bool, granularity: PerTensor | PerChannel) -> None:
    x, grid = normal(5, 5, 7, seed=bits), Grid(bits, signed)
    shape = () if isinstance(granularity, PerTensor) else (5,)
    scale, zero = affine_from_range(torch.full(shape, -1.7), torch.full(shape, 2.1), grid, symmetric=False)
    simulated = fake_quantize(x, scale, zero, grid, granularity)
    q = quantize_tensor(x, scale, zero, grid, granularity)
    assert q.codes.dtype == grid.dtype
    assert torch.equal(q.dequantize(), simulated)
    assert torch.equal(dequantize(q.codes, scale, zero, granularity), simulated)
    again = fake_quantize(simulated, scale, zero, grid, granularity)
    assert torch.equal(again, simulated)


def test_inside_the_range_the_error_is_at_most_half_a_step() -> None:
    x, grid = torch.linspace(-1, 2, 1001), Grid(4)
    scale, zero = affine_from_range(torch.tensor(-1.0), torch.tensor(2.0), grid, symmetric=False)
    error = (fake_quantize(x, scale, zero, grid, PerTensor()) - x).abs()
    assert float(error.max()) <= float(scale) * 0.5001


def test_fake_quantize_leaves_its_input_alone() -> None:
    x = normal(10)
    before = x.clone()
    fake_quantize(x, torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), Grid(4), PerTensor())
    assert torch.equal(x, before)
