from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibquant.errors import QuantizationError
from calibquant.numerics.affine import affine_from_range, fake_quantize
from calibquant.numerics.clipping import (
    mse_range,
    mse_range_exhaustive,
    mse_range_of,
    mse_shrink_range,
)
from calibquant.numerics.grid import Granularity, Grid, PerChannel, PerTensor
from calibquant.numerics.histogram import Histogram
from calibquant.numerics.mse_bounds import group_levels
from calibquant.numerics.rows import Rows, padded

torch.set_num_threads(1)
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "heavy tails": lambda x: x**5,
    "skewed": torch.exp,
    "relu": torch.relu,
    "negative": lambda x: -x.abs(),
    "integers": lambda x: (2 * x).round(),
    "constant": lambda x: torch.full_like(x, 0.3),
    "negative constant": lambda x: torch.full_like(x, -7.0),
    "zeros": torch.zeros_like,
    "one-sided rows": lambda x: torch.cat([x[:1].abs() + 1e-3, -x[1:].abs()]),
    "a dead row": lambda x: torch.cat([x[:1] * 0, x[1:]]),
    "a nearly dead row": lambda x: torch.cat([x[:1] * 1e-7, x[1:]]),
    "tiny": lambda x: x * 1e-30,
    "small": lambda x: x * 1e-5,
    "huge": lambda x: x * 1e12,
    "an outlier": lambda x: torch.cat([x[:1], x[1:] + 50 * (torch.arange(x[1:].numel()) == 0).view_as(x[1:])]),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_of(x: Tensor, low: Tensor, high: Tensor, grid: Grid, symmetric: bool) -> float:
    """Mean |x - q|^2.4 of a whole tensor in float64, from the definition of an affine grid."""
    scale, zero = (float(v) for v in affine_from_range(low, high, grid, symmetric))
    v = x.double().numpy()
    q = (np.clip(np.rint(v / scale) + zero, grid.qmin, grid.qmax) - zero) * scale
    return float(np.mean(np.abs(v - q) ** 2.4))


def candidates_by_hand(v: np.ndarray, grid: Grid, symmetric: bool, side: str) -> list[tuple[float, float]]:
    """The family of ranges, written as plain loops in float64."""
    low, high = float(v.min()), float(v.max())
    if side != "no" or symmetric:
        ends = [max(abs(low), abs(high)) * i / 100 for i in range(1, 101)]
        return [(0.0 if side == "pos" else -t, 0.0 if side == "neg" else t) for t in ends]
    low, high, found = min(low, 0.0), max(high, 0.0), []
    for i in range(1, 101):
        width = (high - low) * i / 100
        delta = width / grid.steps
        found += [(-z * delta, width - z * delta) for z in range(grid.steps + 1)]
    return found


# ------------------------------------------------------------------------------------------ the fast search is exact


@settings(deadline=None, max_examples=200)
@given(
    kind=st.sampled_from(sorted(SHAPES)),
    rows=st.integers(2, 5),
    size=st.sampled_from([1, 2, 3, 9, 27, 64, 65]),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    signed=st.booleans(),
    symmetric=st.booleans(),
    granularity=st.sampled_from([PerTensor(), PerChannel(0), PerChannel(1)]),
    p=st.sampled_from([2.4, 1.0, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_short_rows_equal_exhaustive(
    kind: str,
    rows: int,
    size: int,
    bits: int,
    signed: bool,
    symmetric: bool,
    granularity: Granularity,
    p: float,
    seed: int,
) -> None:
    x = SHAPES[kind](normal(rows, size, seed=seed))
    grid = Grid(bits, signed)
    expected = mse_range_exhaustive(x, grid, symmetric, granularity, p)
    found = mse_range(x, grid, symmetric, granularity, p)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(sorted(SHAPES)),
    size=st.sampled_from([300, 1025, 3000]),
    bits=st.sampled_from([2, 3, 4]),
    signed=st.booleans(),
    symmetric=st.booleans(),
    granularity=st.sampled_from([PerTensor(), PerChannel(0)]),
    seed=st.integers(0, 10**6),
)
def test_grouped_rows_equal_exhaustive(
    kind: str, size: int, bits: int, signed: bool, symmetric: bool, granularity: Granularity, seed: int
) -> None:
    x = SHAPES[kind](normal(2, size, seed=seed))
    grid = Grid(bits, signed)
    expected = mse_range_exhaustive(x, grid, symmetric, granularity)
    found = mse_range(x, grid, symmetric, granularity)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("kind", "bits", "size"), [("heavy tails", 4, 60_000), ("skewed", 3, 100_000)])
def test_several_levels_of_groups_equal_exhaustive(kind: str, bits: int, size: int) -> None:
    x, grid = SHAPES[kind](normal(2, size // 2)), Grid(bits)
    assert len(group_levels(Rows(padded(x.reshape(1, -1)), size), grid)) > 1
    expected = mse_range_exhaustive(x, grid, False, PerTensor())
    assert mse_range(x, grid, False, PerTensor()) == expected


@pytest.mark.parametrize("search", [mse_range, mse_shrink_range])
def test_the_result_does_not_depend_on_threads_or_neighbours(search: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x = normal(6, 5000) ** 3
    together = search(x, Grid(4), False, PerChannel(0))
    try:
        torch.set_num_threads(2)
        again = search(x, Grid(4), False, PerChannel(0))
    finally:
        torch.set_num_threads(1)
    alone = [search(row, Grid(4), False, PerTensor()) for row in x]
    for i, end in enumerate(together):
        assert torch.equal(end, again[i])
        assert torch.equal(end, torch.stack([a[i] for a in alone]))


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(sorted(SHAPES)),
    bits=st.sampled_from([2, 3, 4, 6]),
    seed=st.integers(0, 10**6),
    weighted=st.booleans(),
    low=st.floats(-1, 0),
    width=st.floats(0.01, 1.5),
)
def test_group_bounds_never_exceed_the_error(
    kind: str, bits: int, seed: int, weighted: bool, low: float, width: float
) -> None:
    x, grid = SHAPES[kind](normal(2, 2048, seed=seed)), Grid(bits)
    weights = normal(2, 2048, seed=seed + 1).abs()
    weights /= weights.sum(1, keepdim=True)
    rows = Rows(padded(x), 2048, padded(weights) if weighted else None)
    extent = x.abs().amax(1)
    scale, zero = affine_from_range(extent * low, extent * (low + width), grid, symmetric=False)
    v, s, z = x.double().numpy(), scale.double().numpy()[:, None], zero.numpy()[:, None]
    q = (np.clip(np.rint(v / s) + z, grid.qmin, grid.qmax) - z) * s
    share = weights.double().numpy() if weighted else 1 / 2048
    true = (share * np.abs(v - q) ** 2.4).sum(1)
    for groups in group_levels(rows, grid):
        bound = groups.lower_bounds(torch.arange(2), scale, zero, grid, 2.4)
        assert (bound.double().numpy() <= true * 1.0001 + 1e-37).all()


def test_group_bounds_are_tight() -> None:
    x, grid = normal(1, 200_000), Grid(4)
    rows = Rows(padded(x), 200_000)
    scale, zero = affine_from_range(torch.tensor([-2.5]), torch.tensor([2.5]), grid, symmetric=False)
    true = float((fake_quantize(x, scale, zero, grid, PerChannel(0)) - x).double().abs().pow(2.4).mean())
    coarse, fine = (float(g.lower_bounds(torch.tensor([0]), scale, zero, grid, 2.4)) for g in group_levels(rows, grid))
    assert 0.9 * true < coarse < fine
    assert 0.999 * true < fine


# ------------------------------------------------------------------------- the exhaustive search against its definition


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "skewed", "relu", "negative", "an outlier"])
@pytest.mark.parametrize(("bits", "signed", "symmetric"), [(2, False, False), (3, True, False), (4, True, True)])
def test_exhaustive_is_the_best_of_the_family(kind: str, bits: int, signed: bool, symmetric: bool) -> None:
    x, grid = SHAPES[kind](normal(2, 150, seed=3)), Grid(bits, signed)
    side = "pos" if x.min() >= 0 else "neg" if x.max() <= 0 else "no"
    family = candidates_by_hand(x.numpy(), grid, symmetric, side)
    scores = [error_of(x, torch.tensor(a), torch.tensor(b), grid, symmetric) for a, b in family]
    low, high = mse_range_exhaustive(x, grid, symmetric, PerTensor())
    assert error_of(x, low, high, grid, symmetric) <= min(scores) * (1 + 1e-5)
    near = min(abs(a - float(low)) + abs(b - float(high)) for a, b in family)
    assert near < 1e-5 * float(x.abs().max())


HEAVY: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "Laplace": lambda r: r.laplace(size=2000),
    **{f"Student {d}": partial(lambda r, d: r.standard_t(d, 2000), d=d) for d in (2, 3, 5)},
    "log-normal": lambda r: np.exp(1.5 * r.standard_normal(2000)) * r.choice([-1, 1], 2000),
    "an outlier": lambda r: np.append(r.standard_normal(2000), 300.0),
}


def least_of_all(x: np.ndarray, grid: Grid, symmetric: bool, side: str) -> float:
    """Brute force in float64: 600 widths up to that of the values, each with every zero point that its case allows."""
    middle = grid.qmin + (1 << (grid.bits - 1))
    zeros = [grid.qmin] if side == "pos" else [middle] if symmetric else list(range(grid.qmin, grid.qmax + 1))
    width = np.abs(x).max() * (1 if side == "pos" else 2) if symmetric or side == "pos" else x.max() - x.min()
    best = np.inf
    for scale in width / grid.steps * np.geomspace(2e-3, 1, 600):
        codes = np.rint(x / scale)
        for zero in zeros:
            shown = (np.clip(codes + zero, grid.qmin, grid.qmax) - zero) * scale
            best = min(best, float(np.mean(np.abs(shown - x) ** 2.4)))
    return best


@pytest.mark.parametrize("kind", HEAVY)
@pytest.mark.parametrize(
    ("bits", "symmetric", "side"),
    [(2, False, "no"), (3, False, "no"), (2, True, "no"), (4, True, "no"), (8, True, "no"), (2, False, "pos"),
     (4, False, "pos"), (8, False, "pos")],
)  # fmt: skip
def test_no_range_within_heavy_tailed_values_is_much_better(kind: str, bits: int, symmetric: bool, side: str) -> None:
    x = HEAVY[kind](np.random.default_rng(0)).astype(np.float32)
    x = np.abs(x) if side == "pos" else x
    grid, values = Grid(bits, signed=symmetric), torch.from_numpy(x)
    least = least_of_all(x.astype(np.float64), grid, symmetric, side)
    for low, high in (
        mse_range(values, grid, symmetric, PerTensor()),
        mse_range_of(Histogram.empty().add(values), grid, symmetric),
    ):
        assert error_of(values, low, high, grid, symmetric) <= 1.03 * least


def test_channels_share_the_side_but_not_the_range() -> None:
    x = torch.stack([normal(200).abs(), normal(200, seed=1) * 5, -normal(200, seed=2).abs()])
    low, high = mse_range(x, Grid(3), False, PerChannel(0))
    assert low.shape == high.shape == (3,)
    for i, row in enumerate(x):
        family = candidates_by_hand(row.numpy(), Grid(3), False, "no")
        best = min(error_of(row, torch.tensor(a), torch.tensor(b), Grid(3), False) for a, b in family)
        assert error_of(row, low[i], high[i], Grid(3), False) <= best * (1 + 1e-5)


def test_a_gaussian_is_clipped_where_theory_says() -> None:
    # the least-squares clip of a unit Gaussian at 4 bits is 2.56 (Banner et al., table of ACIQ)
    low, high = mse_range(normal(200_000), Grid(4), False, PerTensor(), p=2.0)
    assert float(high - low) / 2 == pytest.approx(2.56, abs=0.12)


def test_first_of_equal_candidates_wins() -> None:
    # every range is perfect for zeros: the first is width 0 with zero point 0
    assert mse_range(torch.zeros(10), Grid(8), False, PerTensor()) == (torch.tensor(0.0), torch.tensor(0.0))
    x = torch.tensor([-1.0, 0.0, 1.0])
    low, high = mse_range(x, Grid(2), False, PerTensor())
    # 2 bits hold -1, 0, 1 and one more: several ranges are nearly perfect
    assert (low, high) == mse_range_exhaustive(x, Grid(2), False, PerTensor())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channel_axes(axis: int) -> None:
    x = normal(3, 4, 5)
    low, high = mse_range(x, Grid(4), False, PerChannel(axis))
    for i in range(x.shape[axis]):
        alone = mse_range(x.select(axis, i), Grid(4), False, PerTensor(), side="no")
        assert (low[i], high[i]) == alone


def test_sixteen_bits_need_no_exhaustive_search() -> None:
    x = normal(4, 64)
    low, high = mse_range(x, Grid(16), False, PerChannel(0))
    assert torch.allclose(low, x.amin(1), atol=0.02)
    assert torch.allclose(high, x.amax(1), atol=0.02)


@pytest.mark.parametrize("search", [mse_range, mse_range_exhaustive, mse_shrink_range])
@pytest.mark.parametrize("x", [torch.zeros(0), torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf])])
def test_bad_tensors_are_one_line_errors(search: Callable[..., object], x: Tensor) -> None:
    with pytest.raises(QuantizationError, match="clipping range: the tensor"):
        search(x, Grid(4), False, PerTensor())


# --------------------------------------------------------------------------------------- both ends by one common factor


def shrunk_by_hand(x: np.ndarray, grid: Grid, symmetric: bool, p: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Low, high and error, (80, R), of each row's ranges: codes by numpy's float32 arithmetic, the mean in float64."""
    factors = (1 - 0.01 * np.arange(80)).astype(np.float32)[:, None, None]
    v, most = x[None], np.float32(2**grid.bits - 1)
    x_min, x_max = v.min(2, keepdims=True) * factors, v.max(2, keepdims=True) * factors
    low, high = x_min.clip(max=0), x_max.clip(min=0)
    if symmetric:
        scale = (np.maximum(-low, high) / (most / 2)).clip(np.float32(1e-8))
        zero = np.full_like(scale, grid.qmin + 2 ** (grid.bits - 1))
    else:
        scale = ((high - low) / most).clip(np.float32(1e-8))
        zero = (grid.qmin - np.rint(low / scale)).clip(grid.qmin, grid.qmax)
    q = ((np.rint(v / scale) + zero).clip(grid.qmin, grid.qmax) - zero) * scale
    assert q.dtype == np.float32
    return x_min[..., 0], x_max[..., 0], np.mean(np.abs(v.astype(np.float64) - q) ** p, axis=2)


@settings(deadline=None, max_examples=200)
@given(
    kind=st.sampled_from(sorted(SHAPES)),
    rows=st.integers(2, 5),
    size=st.sampled_from([1, 2, 3, 9, 64, 65, 700]),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    signed=st.booleans(),
    symmetric=st.booleans(),
    granularity=st.sampled_from([PerTensor(), PerChannel(0), PerChannel(1)]),
    p=st.sampled_from([2.4, 1.0, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_shrunk_range_is_the_best_of_eighty(
    kind: str,
    rows: int,
    size: int,
    bits: int,
    signed: bool,
    symmetric: bool,
    granularity: Granularity,
    p: float,
    seed: int,
) -> None:
    x, grid = SHAPES[kind](normal(rows, size, seed=seed)), Grid(bits, signed)
    low, high = mse_shrink_range(x, grid, symmetric, granularity, p)
    assert low.dtype == high.dtype == torch.float32
    assert low.shape == high.shape == (() if isinstance(granularity, PerTensor) else (x.shape[granularity.axis],))
    values = x.numpy()
    values = values.reshape(1, -1) if isinstance(granularity, PerTensor) else np.moveaxis(values, granularity.axis, 0)
    lows, highs, errors = shrunk_by_hand(values, grid, symmetric, p)
    chosen = (lows == low.numpy().reshape(-1)) & (highs == high.numpy().reshape(-1))
    assert chosen.any(0).all()
    assert (np.where(chosen, errors, np.inf).min(0) <= errors.min(0) * (1 + 1e-5) + 1e-37).all()


@pytest.mark.parametrize("granularity", [PerChannel(0), PerChannel(1), PerChannel(2)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_shrunk_range_of_a_channel_is_its_own(granularity: PerChannel, symmetric: bool) -> None:
    x, grid = normal(3, 4, 50) ** 3, Grid(3)
    low, high = mse_shrink_range(x, grid, symmetric, granularity)
    for i, row in enumerate(x.unbind(granularity.axis)):
        assert (low[i], high[i]) == mse_shrink_range(row, grid, symmetric, PerTensor())


def test_shrunk_range_first_of_equal_candidates_wins() -> None:
    for x in (torch.zeros(5), normal(40) * 1e-30):  # below the smallest scale every range rounds alike
        assert mse_shrink_range(x, Grid(4), False, PerTensor()) == (x.min(), x.max())
    x = torch.tensor([-1.0, 0.0, 2.0])  # 2 bits hold it exactly at full width only
    assert mse_shrink_range(x, Grid(2), False, PerTensor()) == (torch.tensor(-1.0), torch.tensor(2.0))


def test_shrunk_range_where_every_error_overflows_is_min_and_max() -> None:
    x = normal(100) * 1e37
    assert mse_shrink_range(x, Grid(2), False, PerTensor()) == (x.min(), x.max())


def test_shrunk_range_clips_an_outlier_and_no_more_than_a_fifth_remains() -> None:
    x = torch.cat([normal(100_000), torch.tensor([-60.0, 80.0])])
    low, high = mse_shrink_range(x, Grid(4), False, PerTensor())
    assert [float(low), float(high)] == pytest.approx([-60 * 0.21, 80 * 0.21])
