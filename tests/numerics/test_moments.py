"""Means of functions of normal values, against numerical integration by scipy."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from calibquant.numerics.moments import clipped_normal_mean, function_of_normal_mean

CASES = [(0.0, 1.0), (2.5, 0.3), (-1.7, 2.0), (5.9, 0.8), (-40.0, 1.0), (7.0, 4.0), (0.01, 30.0)]


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 2.0)])
def test_a_clipped_normal_has_the_mean_that_integration_gives(limits: tuple[float, float]) -> None:
    mean, std = torch.tensor(CASES).T
    found = clipped_normal_mean(mean, std, *limits)
    for (m, s), value in zip(CASES, found.tolist(), strict=True):
        inside = [x for x in limits if abs(x - m) < 12 * s]
        want, _ = integrate.quad(
            lambda x, m=m, s=s: min(max(x, limits[0]), limits[1]) * stats.norm.pdf(x, m, s),
            m - 12 * s, m + 12 * s, points=inside or None, limit=200, epsabs=1e-12,
        )  # fmt: skip
        assert value == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_without_spread_it_is_the_clipped_constant() -> None:
    mean = torch.tensor([-1.0, 3.0, 8.0])
    assert clipped_normal_mean(mean, torch.zeros(3), 0.0, 6.0).tolist() == [0.0, 3.0, 6.0]


@pytest.mark.parametrize("function", [torch.nn.functional.silu, torch.relu, torch.nn.functional.hardswish])
def test_the_mean_of_any_function_is_integrated(function: object) -> None:
    mean, std = torch.tensor(CASES).T
    found = function_of_normal_mean(function, mean, std)  # type: ignore[arg-type]
    for (m, s), value in zip(CASES, found.tolist(), strict=True):
        want, _ = integrate.quad(
            lambda x, m=m, s=s: float(function(torch.tensor(x))) * stats.norm.pdf(x, m, s),  # type: ignore[operator]
            m - 10 * s, m + 10 * s, points=[x for x in (-3.0, 0.0, 3.0) if abs(x - m) < 10 * s] or None, limit=200,
        )  # fmt: skip
        assert value == pytest.approx(want, rel=2e-5, abs=2e-5 * s)
