import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from calibquant.errors import DataError, QuantizationError
from calibquant.numerics.amct import arq_range, ifmr_range_of
from calibquant.numerics.clipping import mse_range_exhaustive, mse_shrink_range
from calibquant.numerics.grid import Grid, PerChannel, PerTensor
from calibquant.numerics.histogram import Histogram
from calibquant.quantization import TensorPlan
from calibquant.quantization.observers import ActivationObserver, make_observer, weight_range
from calibquant.recipe import ActivationRecipe, Observer, WeightRecipe

torch.set_num_threads(1)
OF_HISTOGRAMS: list[Observer] = ["percentile", "mse", "kl", "aciq", "aciq-laplace", "aciq-gauss", "ifmr", "hfmg"]
NAMES: list[Observer] = ["minmax", "moving-average", "mse-batch", "mse-shrink", *OF_HISTOGRAMS]
Search = Callable[[Tensor, Grid, bool, PerTensor], tuple[Tensor, Tensor]]
OF_BATCHES: list[tuple[Observer, Search]] = [("mse-batch", mse_range_exhaustive), ("mse-shrink", mse_shrink_range)]


def observer(name: Observer, bits: int = 4) -> ActivationObserver:
    return make_observer(ActivationRecipe(observer=name, percentile=99.0), TensorPlan(Grid(bits), symmetric=False))


def batches(count: int = 4, size: int = 3000, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size // 30, 30, generator=g) * (1 + i) for i in range(count)]


def observed(name: Observer, data: list[Tensor]) -> tuple[float, float]:
    o = observer(name)
    for x in data:
        o.update(x)
    low, high = o.range()
    assert low.shape == high.shape == ()
    assert low.dtype == high.dtype == torch.float32
    return float(low), float(high)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_seen_is_a_one_line_error(name: Observer) -> None:
    o = observer(name)
    o.update(torch.zeros(0, 3))
    with pytest.raises(QuantizationError, match="has seen no values") as caught:
        o.range()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_no_numbers_are_refused(name: Observer, bad: float) -> None:
    with pytest.raises(DataError, match="activations"):
        observer(name).update(torch.tensor([0.0, bad]))


@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_no_numbers_are_refused_in_a_later_batch_too(name: Observer) -> None:
    o = observer(name)
    o.update(torch.ones(3))
    with pytest.raises(DataError, match="activations: hold NaN"):
        o.update(torch.tensor([0.0, torch.nan]))


@pytest.mark.parametrize("name", NAMES)
def test_merging_equals_streaming(name: Observer) -> None:
    data = batches()
    left, right = observer(name), observer(name)
    for x in data[:2]:
        left.update(x)
    for x in data[2:]:
        right.update(x)
    left.merge(right)
    left.merge(observer(name))
    found = tuple(float(v) for v in left.range())
    assert found == pytest.approx(observed(name, data), rel=1e-12)
    fresh = observer(name)
    fresh.merge(left)
    assert tuple(float(v) for v in fresh.range()) == found


@pytest.mark.parametrize("name", ["minmax", *OF_HISTOGRAMS])
def test_batching_does_not_matter(name: Observer) -> None:
    data = batches()
    assert observed(name, data) == observed(name, [torch.cat(data)]) == observed(name, data[::-1])


@pytest.mark.parametrize("name", NAMES)
def test_state_does_not_grow(name: Observer) -> None:
    o = observer(name)
    sizes = []
    for i in range(12):
        o.update(batches(1, 30_000, seed=i % 3)[0])
        sizes.append(len(pickle.dumps(o)))
    assert sizes[-1] == sizes[3]
    assert sizes[-1] < 100_000


@pytest.mark.parametrize("name", NAMES)
def test_ranges_lie_within_the_values_and_keep_most(name: Observer) -> None:
    data = [x.relu() for x in batches()]
    low, high = observed(name, data)
    assert 0 <= low < 1e-2
    assert 0.3 < high <= float(torch.cat(data).max()) * 1.0001


def test_minmax_and_moving_average() -> None:
    data = batches()
    lows, highs = [float(x.min()) for x in data], [float(x.max()) for x in data]
    assert observed("minmax", data) == (min(lows), max(highs))
    assert observed("moving-average", data) == pytest.approx((np.mean(lows), np.mean(highs)), rel=1e-6)


def test_percentile_is_the_recipes() -> None:
    x = torch.linspace(-1, 1, 100_001)
    assert observed("percentile", [x]) == pytest.approx((-0.99, 0.99), abs=1e-3)


@pytest.mark.parametrize(("name", "search"), OF_BATCHES)
def test_a_search_on_batches_takes_the_widest(name: Observer, search: Search) -> None:
    data = batches()
    each = [search(x, Grid(4), False, PerTensor()) for x in data]
    assert observed(name, data) == (min(float(a) for a, _ in each), max(float(b) for _, b in each))


@pytest.mark.parametrize("one_sided", [False, True])
def test_a_symmetric_ifmr_uses_the_whole_grid_for_one_side(one_sided: bool) -> None:
    x = batches(1)[0] ** 3
    x = x.abs() if one_sided else x
    o = make_observer(ActivationRecipe(observer="ifmr"), TensorPlan(Grid(3), symmetric=True))
    o.update(x)
    assert o.range() == ifmr_range_of(Histogram.empty().add(x), Grid(3), symmetric=not one_sided)
    assert (float(o.range()[0]) == 0) == one_sided


@pytest.mark.parametrize(("name", "search"), OF_BATCHES)
@pytest.mark.parametrize("one_sided", [False, True])
def test_a_symmetric_search_on_batches_uses_the_whole_grid_for_one_side(
    name: Observer, search: Search, one_sided: bool
) -> None:
    """Values without a negative one are scored on 0 … 2^b - 1, as they will be quantized."""
    x = batches(1)[0] ** 3
    x = x.abs() if one_sided else x
    o = make_observer(ActivationRecipe(observer=name), TensorPlan(Grid(3), symmetric=True))
    o.update(x)
    assert o.range() == search(x, Grid(3), not one_sided, PerTensor())
    assert o.range() != search(x, Grid(3), one_sided, PerTensor())


def test_batch_mse_decides_the_side_on_the_first_batch() -> None:
    two_sided = batches(1)[0]
    low, high = observed("mse-batch", [two_sided.abs(), two_sided])
    assert low == 0
    assert high > 0
    low, _ = observed("mse-batch", [two_sided, two_sided.abs()])
    assert low < 0


def test_symmetry_comes_from_the_plan() -> None:
    x = torch.cat([torch.rand(5000), torch.tensor([-0.1])])
    for grid in (Grid(8, signed=True), Grid(8)):
        o = make_observer(ActivationRecipe(observer="mse"), TensorPlan(grid, symmetric=True))
        o.update(x)
        low, high = o.range()
        assert float(low) == -float(high)


def test_kinds_do_not_mix() -> None:
    with pytest.raises(TypeError, match="cannot merge"):
        observer("mse").merge(observer("minmax"))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weight_ranges(granularity: PerTensor | PerChannel, symmetric: bool) -> None:
    w, grid = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)), Grid(3, signed=symmetric)
    axes, plan = None if isinstance(granularity, PerTensor) else (1, 2, 3), TensorPlan(grid, symmetric, granularity)
    low, high = weight_range(w, WeightRecipe(observer="minmax"), plan)
    assert np.array_equal(low.numpy(), w.numpy().min(axes))
    assert np.array_equal(high.numpy(), w.numpy().max(axes))
    low, high = weight_range(w, WeightRecipe(observer="percentile", percentile=80.0), plan)
    np.testing.assert_allclose(low.numpy(), np.quantile(w.numpy(), 0.1, axes), rtol=1e-5)
    np.testing.assert_allclose(high.numpy(), np.quantile(w.numpy(), 0.9, axes), rtol=1e-5)
    expected = mse_range_exhaustive(w, grid, symmetric, granularity)
    found = weight_range(w, WeightRecipe(observer="mse"), plan)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    expected = mse_shrink_range(w, grid, symmetric, granularity)
    found = weight_range(w, WeightRecipe(observer="mse-shrink"), plan)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    expected = arq_range(w, grid, symmetric, granularity)
    found = weight_range(w, WeightRecipe(observer="arq"), plan)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
