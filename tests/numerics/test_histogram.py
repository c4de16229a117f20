import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibquant.errors import DataError
from calibquant.numerics.histogram import MIN_EXPONENT, Histogram

torch.set_num_threads(1)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
batches = st.lists(st.lists(floats, max_size=8), min_size=1, max_size=6)


def of(*values: float) -> Histogram:
    return Histogram.empty().add(torch.tensor(values, dtype=torch.float32))


def direct(values: list[float]) -> tuple[int, dict[int, int]]:
    """Exponent and counts by exact rational arithmetic in plain Python."""
    exponent = MIN_EXPONENT
    while any(not -4096 <= math.floor(math.ldexp(v, -exponent)) <= 4095 for v in values):
        exponent += 1
    counts: dict[int, int] = {}
    for v in values:
        index = math.floor(math.ldexp(v, -exponent))
        counts[index] = counts.get(index, 0) + 1
    return exponent, counts


def as_counts(h: Histogram) -> dict[int, int]:
    return {h.first + i: int(c) for i, c in enumerate(h.counts) if c}


@settings(deadline=None, max_examples=80)
@given(values=st.lists(floats, min_size=1, max_size=20))
def test_equals_direct_binning(values: list[float]) -> None:
    h = of(*values)
    assert (h.exponent, as_counts(h)) == direct(values)
    assert (h.minimum, h.maximum, h.total) == (min(values), max(values), len(values))
    assert h.counts[0] > 0
    assert h.counts[-1] > 0


@settings(deadline=None, max_examples=80)
@given(parts=batches, data=st.data())
def test_order_split_and_merging_do_not_matter(parts: list[list[float]], data: st.DataObject) -> None:
    whole = Histogram.empty().add(torch.tensor([v for part in parts for v in part], dtype=torch.float32))
    shuffled = data.draw(st.permutations(parts))
    streamed = Histogram.empty()
    for part in shuffled:
        streamed = streamed.add(torch.tensor(part, dtype=torch.float32))
    cut = data.draw(st.integers(0, len(parts)))
    left, right = Histogram.empty(), Histogram.empty()
    for i, part in enumerate(parts):
        if i < cut:
            left = left.add(torch.tensor(part, dtype=torch.float32))
        else:
            right = right.add(torch.tensor(part, dtype=torch.float32))
    for other in (streamed, left.merge(right), right.merge(left)):
        assert other == whole
        assert pickle.dumps((other.minimum, other.maximum)) == pickle.dumps((whole.minimum, whole.maximum))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e20])
def test_matches_numpy(scale: float) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * scale
    h = Histogram.empty().add(x)
    counts, _ = np.histogram(x.double().numpy(), bins=h.edges.numpy())
    # numpy closes its last bin on both sides; no value lies on that edge
    assert np.array_equal(counts, h.counts.numpy())
    assert torch.allclose(h.centers, (h.edges[1:] + h.edges[:-1]) / 2, rtol=1e-12, atol=0)
    assert len(h.counts) <= 8192
    assert max(-h.first, h.first + len(h.counts)) > 2048


@pytest.mark.parametrize(
    ("value", "exponent"),
    [(1.0, -11), (-1.0, -12), (0.999, -12), (-1.001, -11), (4095.9, 0), (4096.0, 1), (-4096.0, 0), (0.0, MIN_EXPONENT)],
)
def test_the_exponent_is_the_smallest_that_fits(value: float, exponent: int) -> None:
    assert of(value).exponent == exponent


@pytest.mark.parametrize("value", [1e-45, -1e-45, 2.0**-149, 3.4e38, -3.4e38, 1e-38])
def test_extreme_magnitudes(value: float) -> None:
    x = float(torch.tensor(value))
    h = of(value, 0.0, -1e-45)
    assert (h.exponent, as_counts(h)) == direct([x, 0.0, -(2.0**-149)])


def test_all_zero_has_one_bin() -> None:
    h = of(0.0, -0.0, 0.0)
    assert h.counts.tolist() == [3]
    assert math.copysign(1, h.minimum) == 1
    assert float(h.edges[0]) == 0.0


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
def test_values_that_are_no_numbers_are_a_data_error(value: float, word: str) -> None:
    with pytest.raises(DataError, match=f"activations: hold {word}"):
        of(1.0, value)


def test_empty() -> None:
    empty = Histogram.empty()
    assert empty.total == 0
    assert empty.add(torch.zeros(0)) == empty
    assert len(empty.centers) == len(empty.counts) == 0
    h = of(1.0, 2.0)
    assert empty.merge(h) == h == h.merge(empty)
    assert h != of(1.0)
    assert h != "histogram"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert Histogram.empty().add(x) == Histogram.empty().add(x.float())


def test_chunks_and_strides_do_not_matter() -> None:
    x = torch.randn(700, 900, generator=torch.Generator().manual_seed(3))
    assert Histogram.empty().add(x) == Histogram.empty().add(x.T)


def test_survives_pickling() -> None:
    h = of(-1.0, 2.0, 3.0)
    assert pickle.loads(pickle.dumps(h)) == h
