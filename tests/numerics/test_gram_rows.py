"""Gram rounding against brute force, a plain OBQ with an explicit inverse, least squares and the outputs themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from calibquant.numerics.gram import (
    Moments,
    RowGrid,
    best_scales,
    coordinate_descent,
    error_feedback,
    round_rows,
)

Array = np.ndarray


def problem(
    seed: int, rows: int, size: int, bits: int = 2, groups: int = 1, samples: int = 200
) -> tuple[Tensor, Tensor, Tensor, Moments, RowGrid]:
    """Inputs (G, n, K), wanted outputs (G, O, n), weights (G, O, K), their moments and a grid a row."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(groups, samples, size) @ draw(groups, size, size) / size**0.5
    weight = draw(groups, rows, size)
    y = weight @ x.mT + 0.1 * draw(groups, rows, samples)
    scale = 2 * weight.abs().amax(2).flatten() / (2**bits - 1)
    low = torch.full_like(scale, -(2 ** (bits - 1)))
    owner = torch.arange(groups * rows).reshape(groups, rows)
    return x, y, weight, moments(x, y), RowGrid(scale, low, low + 2**bits - 1, owner)


def moments(x: Tensor, y: Tensor) -> Moments:
    return Moments(x.mT @ x, y @ x, y.square().sum(2))


def output_errors(x: Tensor, y: Tensor, weight: Tensor) -> Array:
    """|X w - y|^2 from the outputs themselves."""
    return ((weight @ x.mT - y) ** 2).sum(2).numpy()


def test_errors_are_those_of_the_outputs_and_add_up() -> None:
    x, y, weight, whole, grid = problem(0, 3, 5, groups=2)
    values = grid.values(grid.rounded(weight))
    np.testing.assert_allclose(whole.errors(values), output_errors(x, y, values), rtol=1e-9)
    parts = moments(x[:, :70], y[..., :70]) + moments(x[:, 70:], y[..., 70:])
    np.testing.assert_allclose(parts.errors(values), whole.errors(values), rtol=1e-9)


@pytest.mark.parametrize("samples", [3, 200])
def test_the_damped_optimum_is_ridge_regression_towards_the_weights(samples: int) -> None:
    """Least squares on the images and sqrt(lambda) * identity below them, also with fewer images than weights."""
    x, y, weight, whole, _ = problem(1, 4, 8, samples=samples)
    ridge = 0.03 * float((x[0] ** 2).sum() / 8)
    above = np.vstack([x[0].numpy(), ridge**0.5 * np.eye(8)])
    want = np.linalg.lstsq(above, np.vstack([y[0].numpy().T, ridge**0.5 * weight[0].numpy().T]), rcond=None)[0]
    damped = whole.damped(weight, 0.03)
    np.testing.assert_allclose(damped.optimum()[0].numpy(), want.T, rtol=1e-6, atol=1e-9)
    values = weight + 0.3
    extra = ridge * ((values - weight) ** 2).sum(2)
    torch.testing.assert_close(damped.errors(values), whole.errors(values) + extra)


# --- against all roundings --------------------------------------------------------------------------------------------


def best_of_all(case: Moments, grid: RowGrid, row: int) -> float:
    """Smallest error of a row over all integers, one by one."""
    size = case.gram.shape[1]
    levels = torch.arange(int(grid.low[row]), int(grid.high[row]) + 1)
    every = torch.tensor(list(itertools.product(levels.tolist(), repeat=size)), dtype=torch.float64) * grid.scale[row]
    errors = ((every @ case.gram[0]) * every).sum(1) - 2 * every @ case.cross[0, row] + case.energy[0, row]
    return float(errors.min())


def test_most_rows_come_near_the_best_of_all_roundings() -> None:
    """100 rows of six 2-bit weights, scales as given: feedback and descent together find more than either alone."""
    excess: dict[str, list[float]] = {"nearest": [], "feedback": [], "both": []}
    for seed in range(10):
        _, _, weight, whole, grid = problem(seed, 10, 6)
        found = {"nearest": grid.rounded(weight), "feedback": error_feedback(whole, grid)}
        found["both"] = found["feedback"]
        for _ in range(5):
            found["both"], _ = coordinate_descent(found["both"], whole, grid)
        for name, integers in found.items():
            errors = whole.errors(grid.values(integers))[0]
            best = [best_of_all(whole, grid, row) for row in range(10)]
            assert all(e >= b * (1 - 1e-9) for e, b in zip(errors.tolist(), best, strict=True))
            excess[name] += [e / b for e, b in zip(errors.tolist(), best, strict=True)]
    optimal = {name: sum(e < 1 + 1e-9 for e in values) for name, values in excess.items()}
    assert optimal["nearest"] < optimal["feedback"] < optimal["both"]
    assert optimal["both"] > 50
    assert float(np.median(excess["both"])) < 1.01 < float(np.median(excess["nearest"]))


# --- error feedback ---------------------------------------------------------------------------------------------------


def plain_obq(weight: Array, gram: Array, scale: float, low: float, high: float) -> Array:
    """One row: round a column, spread the error over the others by the inverse's row, eliminate the column from it."""
    left, inverse = weight.copy(), np.linalg.inv(gram)
    found = np.zeros_like(left)
    for k in np.argsort(-np.diag(gram), kind="stable"):
        found[k] = np.clip(np.round(left[k] / scale), low, high)
        left -= (left[k] - found[k] * scale) / inverse[k, k] * inverse[k]
        inverse -= np.outer(inverse[k], inverse[k]) / inverse[k, k]
        inverse[k, :] = inverse[:, k] = 0
    return found


@pytest.mark.parametrize(("size", "groups"), [(5, 3), (40, 1), (100, 2)])
def test_error_feedback_is_obq_in_the_order_of_the_diagonal(size: int, groups: int) -> None:
    _, _, _, whole, grid = problem(size, 4, size, bits=3, groups=groups, samples=400)
    found = error_feedback(whole, grid)
    for g in range(groups):
        gram, cross = whole.gram[g].numpy(), whole.cross[g].numpy()
        for row in range(4):
            of = g * 4 + row
            target = np.linalg.solve(gram, cross[row])
            limits = float(grid.scale[of]), float(grid.low[of]), float(grid.high[of])
            np.testing.assert_array_equal(found[g, row].numpy(), plain_obq(target, gram, *limits))


# --- coordinate descent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 130])
def test_a_sweep_is_that_of_a_plain_loop(size: int) -> None:
    """In the plain loop every integer on the grid is tried for each weight in turn."""
    _, _, weight, whole, grid = problem(3, 2, size, groups=2)
    swept, changed = coordinate_descent(grid.rounded(weight), whole, grid)
    plain = grid.rounded(weight)
    for g, row in itertools.product(range(2), range(2)):
        scale, low = grid.scale[g * 2 + row], int(grid.low[g * 2 + row])
        gram, cross, values = whole.gram[g], whole.cross[g, row], plain[g, row]
        for k in range(size):
            tried = values.repeat(4, 1)
            tried[:, k] = torch.arange(low, low + 4)
            errors = ((tried * scale) @ gram * (tried * scale)).sum(1) - 2 * (tried * scale) @ cross
            values[k] = tried[errors.argmin(), k]
    assert torch.equal(swept, plain)
    assert changed == int((swept != grid.rounded(weight)).sum()) > 0


@pytest.mark.parametrize("seed", range(5))
def test_no_row_gets_worse_and_at_the_end_no_single_change_helps(seed: int) -> None:
    _, _, weight, whole, grid = problem(seed, 6, 20, groups=2)
    integers, errors, changed = grid.rounded(weight), whole.errors(grid.values(grid.rounded(weight))), 1
    while changed:
        integers, changed = coordinate_descent(integers, whole, grid)
        after = whole.errors(grid.values(integers))
        assert (after <= errors * (1 + 1e-9)).all()
        errors = after
    for k, move in itertools.product(range(20), (-1, 1)):
        other = integers.clone()
        other[:, :, k] = (other[:, :, k] + move).clamp(grid.of(grid.low)[..., 0], grid.of(grid.high)[..., 0])
        assert (whole.errors(grid.values(other)) >= errors * (1 - 1e-9)).all()


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_the_best_scales_are_those_of_least_squares(shared: bool) -> None:
    x, y, weight, whole, grid = problem(5, 3, 8, groups=2)
    owner = torch.tensor([[0, 1, 2], [0, 1, 2]]) if shared else grid.owner
    grid = RowGrid(grid.scale[:3] if shared else grid.scale, grid.low[:3], grid.high[:3], owner)
    integers = problem(5, 3, 8, groups=2)[4].rounded(weight)
    found = best_scales(integers, whole, grid)
    for index in range(len(grid.scale)):
        mine = [(g, o) for g, o in itertools.product(range(2), range(3)) if owner[g, o] == index]
        outputs = np.concatenate([(x[g] @ integers[g, o]).numpy() for g, o in mine])
        wanted = np.concatenate([y[g, o].numpy() for g, o in mine])
        assert float(found.scale[index]) == pytest.approx(np.linalg.lstsq(outputs[:, None], wanted, rcond=None)[0][0])


def test_a_scale_that_would_not_be_positive_stays() -> None:
    _, _, _, whole, grid = problem(6, 2, 4)
    integers = torch.stack([torch.zeros(4), -torch.sign(whole.cross[0, 1])]).double()[None]
    assert torch.equal(best_scales(integers, whole, grid).scale, grid.scale)


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 1, 10, 400])
def test_few_images_dead_and_equal_inputs_are_no_trouble(samples: int) -> None:
    """A weight whose input is always zero is rounded to nearest, as are all without any image."""
    x, _, weight, _, grid = problem(8, 5, 30, bits=3, samples=max(samples, 1))
    x = x[:, :samples].clone()
    x[:, :, 3], x[:, :, 5] = 0, x[:, :, 4]
    y = weight @ x.mT
    integers, new = round_rows(weight, moments(x, y), grid)
    assert torch.isfinite(new.scale).all()
    assert (new.scale > 0).all()
    assert torch.equal(integers, integers.clamp(grid.of(grid.low), grid.of(grid.high)))
    if samples > 100:
        nearest = grid.values(grid.rounded(weight))
        assert (output_errors(x, y, new.values(integers)) < output_errors(x, y, nearest)).all()
    if not samples:
        again = round_rows(weight, moments(x, y), new)[0]
        assert torch.equal(again, new.rounded(weight))


def relative(found: Tensor, grid: RowGrid, start: RowGrid, weight: Tensor, whole: Moments) -> Tensor:
    """Each row's error over that of its nearest values, (G, O)."""
    return whole.errors(grid.values(found)) / whole.errors(start.values(start.rounded(weight)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_row_is_worse_than_rounded_to_nearest(bits: int) -> None:
    """900 small rows a number of bits; before the better one was kept, some ended above the nearest values' error."""
    worst, gain = 0.0, []
    for seed, size in itertools.product(range(15), (3, 4, 6)):
        _, _, weight, whole, grid = problem(seed, 10, size, bits=bits, groups=2, samples=200 if seed % 3 else 4)
        found, new = round_rows(weight, whole, grid)
        ratio = relative(found, new, grid, weight, whole)
        worst, gain = max(worst, float(ratio.max())), [*gain, float(ratio.median())]
        assert torch.equal(found, found.clamp(grid.of(grid.low), grid.of(grid.high)))
    assert worst <= 1 + 1e-9
    assert float(np.median(gain)) < 0.9


def test_rows_that_share_a_scale_are_not_worse_together() -> None:
    for seed in range(60):
        _, _, weight, whole, grid = problem(seed, 2, 4)
        shared = RowGrid(grid.scale.amax()[None], grid.low[:1], grid.high[:1], torch.zeros(1, 2, dtype=torch.int64))
        found, new = round_rows(weight, whole, shared)
        nearest = shared.values(shared.rounded(weight))
        assert float(whole.errors(new.values(found)).sum()) <= float(whole.errors(nearest).sum()) * (1 + 1e-9)


@pytest.mark.parametrize("levels", [[-4.0, -2, -1, 0, 1, 2, 4], [-1.0, 0, 1]])
def test_no_row_on_levels_is_worse_than_rounded_to_nearest(levels: list[float]) -> None:
    for seed in range(30):
        _, _, weight, whole, grid = problem(seed, 10, 4)
        table = torch.tensor(levels, dtype=torch.float64).expand(len(grid.scale), -1)
        grid = RowGrid(weight.abs().amax(2).flatten() / levels[-1], grid.low, grid.high, grid.owner, table)
        found, new = round_rows(weight, whole, grid)
        assert float(relative(found, new, grid, weight, whole).max()) <= 1 + 1e-9
