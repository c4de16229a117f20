"""ACIQ's formulas against numerical integration, brute force, Monte Carlo and the published values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from calibquant.errors import QuantizationError
from calibquant.numerics.aciq import (
    Density,
    aciq_range_of,
    clipping_error,
    expected_error,
    fit_densities,
    optimal_ratio,
    rounding_error,
)  # fmt: skip
from calibquant.numerics.grid import Grid
from calibquant.numerics.histogram import Histogram

DENSITIES: list[Density] = ["laplace", "gauss"]
PEERS = {"laplace": stats.laplace, "gauss": stats.norm}
INF = math.inf


def histogram_of(values: np.ndarray) -> Histogram:
    return Histogram.empty().add(torch.from_numpy(np.asarray(values, dtype=np.float32)))


def samples(density: Density, count: int = 400_000, loc: float = 0.0, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return PEERS[density].rvs(loc, scale, size=count, random_state=seed)


def model_error(density: Density, bits: int, one_sided: bool) -> Callable[[float], float]:
    """Clipping by integration of the density, noise uniform over a step; of a ReLU's output the zeros have none."""
    pdf = PEERS[density].pdf

    def error(alpha: float) -> float:
        above = integrate.quad(lambda x: (x - alpha) ** 2 * pdf(x), alpha, alpha + 60, epsabs=1e-15, epsrel=1e-11)[0]
        step = alpha / 2**bits if one_sided else 2 * alpha / 2**bits
        noise = integrate.quad(lambda e: e * e / step, -step / 2, step / 2)[0]
        return above + noise / 2 if one_sided else 2 * above + noise

    return error


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("one_sided", [False, True])
def test_the_error_is_that_of_the_model(density: Density, one_sided: bool) -> None:
    for bits in (0, 1, 3, 4, 8):
        for scale, alpha in ((1.0, 0.1), (1.0, 2.0), (0.3, 1.5), (7.0, 30.0)):
            expected = scale**2 * model_error(density, bits, one_sided)(alpha / scale)
            assert expected_error(alpha, scale, bits, density, one_sided) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_ratio_minimizes_the_models_error(density: Density, one_sided: bool, bits: int) -> None:
    # log, because at 8 bits the error is some 1e-4 and its minimum flat
    best = optimize.minimize_scalar(
        lambda a: math.log(model_error(density, bits, one_sided)(a)), bounds=(0.5, 15), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    assert optimal_ratio(bits, density, one_sided) == pytest.approx(best.x, abs=1e-4)


@pytest.mark.parametrize("bits", range(9))
def test_the_ratio_is_the_best_of_a_grid(bits: int) -> None:
    """The formulas written once more, and all ratios to 1e-4."""
    a = np.arange(1, 160_000) * 1e-4
    rounding = a**2 / 3 / 4**bits
    laplace = 2 * np.exp(-a) + rounding
    tail = 2 * stats.norm.sf(a)
    gauss = (1 + a**2) * tail - 2 * a * stats.norm.pdf(a) + rounding
    assert optimal_ratio(bits, "laplace") == pytest.approx(a[laplace.argmin()], abs=1.01e-4)
    assert optimal_ratio(bits, "gauss") == pytest.approx(a[gauss.argmin()], abs=1.01e-4)


def test_published_values() -> None:
    """Banner et al., section 3: 2.83, 3.89 and 5.03 b; the tables of the released code, cut to two decimals."""
    published = {
        ("laplace", False): [1.05, 1.86, 2.83, 3.89, 5.03, 6.2, 7.41, 8.64, 9.89],
        ("laplace", True): [1.86, 2.83, 3.89, 5.03, 6.2, 7.41, 8.64, 9.89, 11.16],
        ("gauss", False): [None, 1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92],
        ("gauss", True): [1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92, 4.2],
    }
    for (density, one_sided), values in published.items():
        for bits, value in enumerate(values):
            if value is not None:
                digit = 0.1 if value == 4.2 else 0.01
                assert -0.5 * digit <= optimal_ratio(bits, density, one_sided) - value < digit, (density, bits)
    solved = {  # both formulas solved by others, three decimals
        "laplace": [1.863, 2.831, 3.897, 5.029, 6.205, 7.413, 8.646, 9.897],
        "gauss": [1.240, 1.711, 2.152, 2.559, 2.936, 3.287, 3.615, 3.924],
    }
    for density in DENSITIES:
        assert [optimal_ratio(m, density) for m in range(1, 9)] == pytest.approx(solved[density], abs=5e-4)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("one_sided", [False, True])
def test_monte_carlo(density: Density, one_sided: bool) -> None:
    """Clipping and rounding of samples, each compared with its part of the formula."""
    for bits, alpha in ((4, 1.0), (5, 1.5), (8, 2.0)):
        x = samples(density, 2_000_000, seed=bits)
        low = 0.0 if one_sided else -alpha
        shown = x.clip(min=0) if one_sided else x
        clipped = shown.clip(low, alpha)
        half = 0.5 if one_sided else 1.0
        assert ((shown - clipped) ** 2).mean() == pytest.approx(half * clipping_error(alpha, 1, density), rel=0.03)
        inside = shown[(low < shown) & (shown < alpha)]  # the formula's noise is that of a value inside the range
        step = (alpha - low) / 2**bits
        middle = low + (np.floor((inside - low) / step) + 0.5) * step
        noise = rounding_error(alpha, bits + one_sided)
        assert ((inside - middle) ** 2).mean() == pytest.approx(noise, rel=0.02)
        parts = half * (clipping_error(alpha, 1, density) + noise)
        assert expected_error(alpha, 1, bits, density, one_sided) == pytest.approx(parts, rel=1e-12)


# --- fits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", DENSITIES)
def test_fits_meet_the_samples_and_tell_the_density(density: Density) -> None:
    x = samples(density, loc=0.7, scale=2.5).astype(np.float32).astype(np.float64)
    h = histogram_of(x)
    fit, bin_width = fit_densities(h), 2.0**h.exponent
    assert fit.mean == pytest.approx(x.mean(), abs=bin_width / 2)
    assert fit.b == pytest.approx(np.abs(x - x.mean()).mean(), abs=bin_width)
    assert fit.sigma == pytest.approx(x.std(), abs=bin_width)
    assert fit.better == density
    thinned = x[::20]
    laplace = stats.kstest(thinned, "laplace", (x.mean(), np.abs(x - x.mean()).mean())).statistic
    gauss = stats.kstest(thinned, "norm", (x.mean(), x.std())).statistic
    found = fit_densities(histogram_of(thinned))
    assert found.laplace_distance == pytest.approx(laplace, abs=5e-3)
    assert found.gauss_distance == pytest.approx(gauss, abs=5e-3)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("sign", [1, -1])
def test_mirrored_fits_are_those_of_the_values_with_their_mirror_images(density: Density, sign: int) -> None:
    x = sign * np.abs(samples(density, scale=0.4))
    one, both = fit_densities(histogram_of(x), mirrored=True), fit_densities(histogram_of(np.concatenate([x, -x])))
    assert (one.mean, one.b, one.sigma) == pytest.approx((0, both.b, both.sigma), abs=1e-3)
    # of mirrored values only half are on one side: distances are twice as large there
    assert one.laplace_distance == pytest.approx(2 * both.laplace_distance, abs=3e-3)
    assert one.gauss_distance == pytest.approx(2 * both.gauss_distance, abs=3e-3)
    assert one.better == density


def test_no_values_are_a_one_line_error() -> None:
    for call in (fit_densities, lambda h: aciq_range_of(h, Grid(4))):
        with pytest.raises(QuantizationError, match="histogram is empty; add"):
            call(Histogram.empty())


# --- ranges -----------------------------------------------------------------------------------------------------------


def ends(x: np.ndarray, bits: int, *rest: object) -> tuple[float, float]:
    low, high = aciq_range_of(histogram_of(x), Grid(bits), *rest)  # type: ignore[arg-type]
    assert low.shape == high.shape == ()
    assert low.dtype == high.dtype == torch.float32
    return float(low), float(high)


@pytest.mark.parametrize("density", DENSITIES)
def test_auto_takes_the_fitting_density(density: Density) -> None:
    x = samples(density, scale=3.0)
    other: Density = "gauss" if density == "laplace" else "laplace"
    for limits in ((-INF, INF), (0.0, INF)):
        assert ends(x, 4, "auto", limits) == ends(x, 4, density, limits) != ends(x, 4, other, limits)
    assert ends(np.abs(x), 4, "auto") == ends(np.abs(x), 4, density)


@pytest.mark.parametrize("limits", [(-INF, INF), (0.0, INF), (0.0, 4.0)])
def test_auto_has_the_smaller_error(limits: tuple[float, float]) -> None:
    """Of values that are neither: a bulk of one density and some of a wide one."""
    decided = 0
    for bits, share in itertools.product((2, 3, 4, 8), (0.001, 0.03, 0.3)):
        x = np.where(np.arange(100_000) < share * 1e5, samples("gauss", 100_000) * 4, samples("gauss", 100_000, seed=1))
        shown, errors = x.clip(*limits), []
        ranges = [ends(x, bits, density, limits) for density in DENSITIES]
        for low, high in ranges:
            step = (high - low) / (2**bits - 1)
            zero = round(-low / step)
            codes = (np.round(shown / step) + zero).clip(0, 2**bits - 1)
            errors.append(((codes - zero) * step - shown) ** 2)
        wins = int(np.mean(errors[1]) < np.mean(errors[0]))
        if abs(np.mean(errors[1]) / np.mean(errors[0]) - 1) > 1e-2:  # beyond what the histogram's bins hide
            assert ends(x, bits, "auto", limits) == ranges[wins]
            decided += 1
    assert decided >= 6


def test_ranges_are_the_papers() -> None:
    x = samples("laplace", loc=0.5, scale=2.0)
    assert ends(x, 4, "laplace") == pytest.approx((0.5 - 2 * 5.029, 0.5 + 2 * 5.029), rel=1e-2)
    assert ends(x, 2, "gauss") == pytest.approx((0.5 - 2.828 * 1.711, 0.5 + 2.828 * 1.711), rel=1e-2)
    assert ends(x, 4, "laplace", (0.0, INF)) == pytest.approx((0, 0.5 + 2 * 6.205), rel=1e-2)
    assert ends(x - 1, 4, "laplace", (0.0, INF)) == pytest.approx((0, 2 * 6.205), rel=1e-2)  # a mean below zero
    assert ends(np.abs(x - 0.5), 4, "laplace") == pytest.approx((0, 2 * 6.205), rel=1e-2)
    assert ends(-np.abs(x - 0.5), 4, "laplace") == pytest.approx((-2 * 6.205, 0), rel=1e-2)


def test_ranges_are_cut_to_what_comes_out() -> None:
    x = samples("laplace")
    assert ends(x, 16) == pytest.approx((np.float32(x.min()), np.float32(x.max())), rel=0)
    assert ends(x, 16, "auto", (0.0, INF)) == pytest.approx((0, np.float32(x.max())), rel=0)
    assert ends(x, 8, "auto", (0.0, 2.5)) == (0, 2.5)
    assert ends(x, 8, "auto", (-1.0, 1.0)) == (-1, 1)
    assert ends(x, 8, "auto", (-INF, 1.0)) == pytest.approx((-9.897, 1), rel=0.01)
    assert ends(x - 100, 4, "auto", (0.0, INF)) == (0, 0)
    assert ends(x - 100, 4, "auto", (-1.0, 1.0)) == (-1, 0)
    for constant in (2.0, -3.0, 0.0):
        assert ends(np.full(5, constant), 4) == (min(constant, 0), max(constant, 0))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("relu", [False, True])
def test_the_range_is_nearly_the_best_one(density: Density, bits: int, relu: bool) -> None:
    """Against the error of every width on the samples themselves, on a grid of 2^bits - 1 steps."""
    x = samples(density, 100_000)
    shown = x.clip(min=0) if relu else x

    def error(low: float, high: float) -> float:
        step = (high - low) / (2**bits - 1)
        return float(((np.round((shown.clip(low, high) - low) / step) * step + low - shown) ** 2).mean())

    low, high = ends(x, bits, "auto", (0.0 if relu else -INF, INF))
    best = min(error(0.0 if relu else -a, a) for a in np.linspace(0.2, x.max(), 200))
    assert error(low, high) <= 1.2 * best
