"""Grids beyond uniform: sets of levels, and the levels that suit given values best.

A level is an integer from -127 to 127, and a value is level * scale: every grid of 1 to 4 bits in the literature is
such a set (up to a rounding of 1/254 of the range for learned ones), so that integer kernels run it as 8-bit weights
while files hold the short codes. Levels are ascending; a code is a level's place among them.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibquant.errors import unknown
from calibquant.numerics.grid import Granularity, PerChannel

Floats = npt.NDArray[np.float64]
TOP = 127  # the largest level: int8, symmetric
POINTS = 4096  # distinct values for an exact clustering; more are gathered into bins first
POINTS_EXACT = 1 << 15  # distinct magnitudes for an exact scale
SIGNIFICANT = 11  # bits of a magnitude that count beyond these


def power_of_two_levels(bits: int) -> list[int]:
    """0 and ±2^k: 2^(bits-1) - 1 magnitudes, each half of the next, and zero.

    Source: Miyashita, Lee and Murmann, "Convolutional Neural Networks using Logarithmic Data Representation", 2016.

    Args:
        bits: 2 to 4; finer steps near zero than 4 bits give do not fit 8-bit levels, and do not help.

    Raises:
        ValueError: `bits` is another number.

    Example:
        >>> power_of_two_levels(3)
        [-4, -2, -1, 0, 1, 2, 4]
    """
    _check_bits(bits, 2, 4)
    magnitudes = [1 << k for k in range(2 ** (bits - 1) - 1)]
    return [-m for m in reversed(magnitudes)] + [0] + magnitudes


def apot_levels(bits: int, width: int = 2) -> list[int]:
    """Additive powers of two: sums of one power (or zero) from each of several sets, and their negatives.

    One of the bits is the sign. The others choose from n sets of 2^width - 1 powers each, to which 2^-1, 2^-2, … are
    dealt in turn. Bits that are left over choose whether one further power counts, which is dealt before the last
    round. Source: Li, Dong and Wang, "Additive Powers-of-Two Quantization", ICLR 2020, equation 3, whose width is k;
    the left-over bit as in their released code.

    Args:
        bits: 2 to 6.
        width: bits of a term, k.

    Raises:
        ValueError: the bits do not fit: more than one bit is left over, or levels exceed 8 bits.

    Example:
        >>> apot_levels(3), apot_levels(4)
        ([-4, -2, -1, 0, 1, 2, 4], [-10, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 10])
    """
    _check_bits(bits, 2, 6)
    terms, over = divmod(bits - 1, width)
    if over > 1:
        raise ValueError(f"{bits - 1} bits of magnitude are no terms of {width} bits and at most one further bit")
    rounds = 2**width - 1
    sets: list[list[int]] = [[] for _ in range(terms + over)]
    power = 0
    for turn in range(rounds if terms else 1):
        if over and (turn == rounds - 1 or not terms):
            sets[terms].append(power := power + 1)
        for dealt in sets[:terms]:
            dealt.append(power := power + 1)
    options = [[0, *(1 << (power - p) for p in dealt)] for dealt in sets]
    magnitudes = {sum(choice) for choice in product(*options)}
    if max(magnitudes) > TOP:
        raise ValueError(f"{bits} bits in terms of {width} do not fit levels of 8 bits")
    return sorted({sign * m for m in magnitudes for sign in (-1, 1)})


def binary_levels(bases: int = 1) -> list[int]:
    """±1 for one base; for several the sums of ±2^k, which are the odd numbers: 2^bases levels a constant step apart.

    Source: Rastegari et al., "XNOR-Net", ECCV 2016. (Several bases of one scale ratio; ABC-Net, NIPS 2017, lets ratios
    differ, which a learned codebook of 2^bases levels covers.)

    Example:
        >>> binary_levels(), binary_levels(2)
        ([-1, 1], [-3, -1, 1, 3])
    """
    _check_bits(bases, 1, 7)
    return list(range(1 - 2**bases, 2**bases, 2))


def ternary_levels() -> list[int]:
    """-1, 0 and 1: Li, Zhang and Liu, "Ternary Weight Networks", 2016."""
    return [-1, 0, 1]


def unsigned_levels(kind: str, bits: int, signed: bool) -> list[int]:
    """Levels of an activation as codes of unsigned 8 bits, ascending; their zero is code 128 if `signed` and else 0.

    Without negative values no bit is a sign, so the levels are the non-negative ones of one more bit. They are spread
    as far as 8 bits reach, so that a value can be rounded to 8 bits first and then to the nearest level.

    Args:
        kind: "power-of-two" or "apot".
        bits: of a level's place: 2 and 3, or 2 to 5.
        signed: whether there are negative values.

    Raises:
        RecipeError: the kind is unknown.
        ValueError: there are no such levels of so many bits.

    Example:
        >>> unsigned_levels("apot", 2, signed=False), unsigned_levels("power-of-two", 3, signed=True)
        ([0, 63, 126, 252], [4, 66, 97, 128, 159, 190, 252])
    """
    makers = {"power-of-two": power_of_two_levels, "apot": apot_levels}
    if kind not in makers:
        raise unknown("quant.activations.grid", kind, makers)
    make = makers[kind]
    if signed:
        levels, zero = make(bits), TOP + 1
        return [zero + level * (TOP // max(levels)) for level in levels]
    levels = [level for level in make(bits + 1) if level >= 0]
    return [level * (255 // max(levels)) for level in levels]


def nearest_levels(levels: Tensor) -> Tensor:
    """For each code of unsigned 8 bits the nearest level, uint8 (256,); halfway the lower one.

    Args:
        levels: uint8 (n,), ascending.

    Example:
        >>> nearest_levels(torch.tensor([0, 4], dtype=torch.uint8))[:4].tolist()
        [0, 0, 0, 4]
    """
    codes = torch.arange(256, dtype=torch.float32, device=levels.device)
    return levels[nearest_codes(codes, levels)]


def nearest_codes(x: Tensor, levels: Tensor) -> Tensor:
    """The place of the nearest level of each value, int64, the shape of `x`; halfway the lower one.

    Args:
        x: float, in units of the scale.
        levels: ascending, (n,).

    Example:
        >>> nearest_codes(torch.tensor([-3.0, 0.4, 0.5, 0.6]), torch.tensor([-1, 0, 1])).tolist()
        [0, 1, 1, 2]
    """
    values = levels.to(x)
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)


def on_levels(x: Tensor, levels: Tensor, granularity: Granularity) -> Tensor:
    """Each value's nearest level, the shape and type of `x`.

    Args:
        x: float, in units of the scale.
        levels: ascending, (n,), or (C, n) for the channels of `granularity`.
    """
    if levels.dim() == 1:
        return levels.to(x)[nearest_codes(x, levels)]
    assert isinstance(granularity, PerChannel)
    rows = x.movedim(granularity.axis, 0)
    table = levels.to(x)
    flat = rows.reshape(len(table), -1).contiguous()
    found = table.gather(1, torch.searchsorted(((table[:, 1:] + table[:, :-1]) / 2).contiguous(), flat))
    return found.reshape(rows.shape).movedim(0, granularity.axis)


def places_of(codes: Tensor, levels: Tensor, granularity: Granularity) -> Tensor:
    """The place of each code among the levels, int64; the inverse of `levels_at`. Shapes as in `on_levels`."""
    if levels.dim() == 1:
        return torch.searchsorted(levels.to(codes), codes.contiguous())
    assert isinstance(granularity, PerChannel)
    rows = codes.movedim(granularity.axis, 0)
    found = torch.searchsorted(levels.to(codes).contiguous(), rows.reshape(len(levels), -1).contiguous())
    return found.reshape(rows.shape).movedim(0, granularity.axis)


def levels_at(places: Tensor, levels: Tensor, granularity: Granularity) -> Tensor:
    """The levels at the given places, int8, the shape of `places`."""
    if levels.dim() == 1:
        return levels[places.long()]
    assert isinstance(granularity, PerChannel)
    rows = places.long().movedim(granularity.axis, 0)
    return levels.gather(1, rows.reshape(len(levels), -1)).reshape(rows.shape).movedim(0, granularity.axis)


def cluster(values: Floats, weights: Floats, count: int, whole: bool = False) -> Floats:
    """At most `count` levels of least weighted squared error: 1-D k-means, exact.

    Dynamic programming over the sorted distinct values: the best k clusters of the first j values end with one that
    begins somewhere. Cost O(count n^2) in memory O(count n). Source: Wang and Song, "Ckmeans.1d.dp", The R Journal 2011
    (Bellman, 1973).

    Args:
        values: (n,), any order.
        weights: of the values, positive, (n,).
        count: levels.
        whole: levels are integers: each cluster's is the one nearest its mean, which is the best integer, so that the
            result is exact too.

    Returns:
        the levels, ascending, distinct; fewer than `count` if fewer distinct values are there.

    Example:
        >>> cluster(np.array([0.0, 0.1, 5.0, 9.0, 9.2]), np.ones(5), 3).round(3).tolist()
        [0.05, 5.0, 9.1]
    """
    points, place = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
    mass = np.bincount(place.reshape(-1), weights=np.asarray(weights, dtype=np.float64).reshape(-1))
    n, count = len(points), min(count, len(points))
    centred = points - points.mean()  # so that sums of squares keep their digits
    sums = [np.concatenate([[0.0], np.cumsum(mass * centred**power)]) for power in (0, 1, 2)]

    def costs(end: int) -> tuple[Floats, Floats]:
        """Error and level of each cluster start … end, for start = 0 … end."""
        m, s, q = (total[end + 1] - total[: end + 1] for total in sums)
        mean = s / m
        if whole:
            mean = np.rint(mean + points.mean()) - points.mean()
        return np.maximum(q - 2 * mean * s + mean**2 * m, 0.0), mean

    best = np.full((count + 1, n + 1), np.inf)
    best[0, 0] = 0.0
    begin = np.zeros((count + 1, n + 1), dtype=np.int64)
    for end in range(n):
        error, _ = costs(end)
        totals = best[:-1, : end + 1] + error  # clusters before, begin
        begin[1:, end + 1] = totals.argmin(1)
        best[1:, end + 1] = totals[np.arange(count), begin[1:, end + 1]]
    used = int(best[1:, n].argmin()) + 1  # integers may coincide, so more need not be better
    levels, end = [], n
    for k in range(used, 0, -1):
        start = begin[k, end]
        levels.append(float(costs(end - 1)[1][start] + points.mean()))
        end = start
    return np.unique(np.rint(levels) if whole else np.array(levels))


def gathered(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Values and weights as at most POINTS distinct ones, for `cluster`: means and sums of equally wide bins."""
    if len(values) <= POINTS:
        return values, weights
    low, high = float(values.min()), float(values.max())
    place = np.minimum(((values - low) * (POINTS / max(high - low, 1e-30))).astype(np.int64), POINTS - 1)
    mass = np.bincount(place, weights=weights, minlength=POINTS)
    total = np.bincount(place, weights=weights * values, minlength=POINTS)
    there = mass > 0
    return total[there] / mass[there], np.asarray(mass[there], dtype=np.float64)


def best_scale(values: Floats, levels: npt.ArrayLike, weights: Floats | None = None) -> float:
    """The scale of least squared error of the nearest levels, exact; 0 where all values are.

    Codes q have their least error at the scale sum(x q) / sum(q^2), which is sum(x^2) - sum(x q)^2 / sum(q^2). Codes
    change only where a magnitude passes the border between two levels, so that each of these scales is looked at, from
    the one at which every value has the least magnitude down. Ternary levels: Li, Zhang and Liu, 2016, equation 5,
    solved without its approximation; binary ones: XNOR-Net, equation 6.

    Above POINTS_EXACT different magnitudes, those that agree in SIGNIFICANT bits count as their mean.

    Args:
        values: (n,).
        levels: symmetric about zero; or not negative, for values that are not.
        weights: of the values' squared errors, not negative, (n,); None: 1.

    Example:
        >>> best_scale(np.array([0.1, -2.0, 2.2, 0.0]), [-1, 0, 1])
        2.1
    """
    points, mass = _magnitudes(values, weights)
    steps = np.unique(np.abs(np.asarray(levels, dtype=np.float64)))
    low, borders = steps[0], (steps[1:] + steps[:-1]) / 2
    order = np.argsort((points / borders[:, None]).ravel(), kind="stable")[::-1]  # of sorted runs: timsort merges them
    gains = (mass * points * np.diff(steps)[:, None]).ravel()[order]
    sizes = (mass * np.diff(steps**2)[:, None]).ravel()[order]
    gain = np.cumsum(np.concatenate([[low * (mass @ points)], gains]))  # sum(x q) after each border that is passed
    size = np.cumsum(np.concatenate([[low**2 * mass.sum()], sizes]))  # sum(q^2)
    scale = np.divide(gain, size, out=np.zeros_like(gain), where=size > 0)
    return float(scale[(gain * scale).argmax()])


def _magnitudes(values: Floats, weights: Floats | None) -> tuple[Floats, Floats]:
    """Different magnitudes, ascending, and the sums of their weights."""
    points, place = np.unique(np.abs(values), return_inverse=True)
    mass = np.bincount(place.reshape(-1), weights, len(points)).astype(np.float64)
    if len(points) <= POINTS_EXACT:
        return points, mass
    fraction, exponent = np.frexp(points)
    _, place = np.unique(np.ldexp(np.rint(np.ldexp(fraction, SIGNIFICANT)), exponent), return_inverse=True)
    total = np.bincount(place.reshape(-1), mass)
    return np.bincount(place.reshape(-1), mass * points) / np.maximum(total, 1e-300), np.asarray(total, np.float64)


def _check_bits(bits: int, least: int, most: int) -> None:
    if not least <= bits <= most:
        raise ValueError(f"{bits} is not {least} to {most} bits")
