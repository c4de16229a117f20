"""How far 8-bit weights may reach, so that integer kernels give the same sums on every processor.

x86 processors without VNNI multiply unsigned 8-bit activations by signed 8-bit weights with an instruction
(vpmaddubsw) that adds two products in 16 bits and saturates there: 255 * 127 * 2 does not fit. No pair of products can
saturate if the weights' codes, less their zero point, stay within ±floor(32767 / (2 * (2^a - 1))) for activations of
a bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from calibquant.numerics.grid import Grid

INT16_MAX = 2**15 - 1


def reach_of(activation_bits: int) -> int:
    """The largest magnitude of a weight of which two products with activations of so many bits fit int16.

    Example:
        >>> [reach_of(bits) for bits in (8, 7, 4)]
        [64, 129, 1092]
    """
    return INT16_MAX // (2 * (2**activation_bits - 1))


def grid_within(grid: Grid, symmetric: bool, reach: int) -> tuple[Grid, bool]:
    """The widest grid whose codes, less their zero point, stay within ±reach, and whether its range is symmetric.

    A symmetric grid of b bits reaches 2^(b-1), an asymmetric one 2^b - 1, since its zero point may be any code.

    Args:
        grid: the grid that was asked for; it is returned if it stays within.
        symmetric: whether its range is symmetric around zero.
        reach: at least 2.

    Example:
        >>> grid_within(Grid(8, signed=True), True, 64), grid_within(Grid(6), False, 64)
        ((Grid(bits=7, signed=True), True), (Grid(bits=6, signed=False), False))
    """
    options = [(grid, symmetric)] + [(Grid(bits, signed=True), True) for bits in range(grid.bits, 1, -1)]
    return next((g, s) for g, s in options if (2 ** (g.bits - 1) if s else g.steps) <= reach)


def adds_pairs(shape: Sequence[int], groups: int) -> bool:
    """Whether a kernel with a weight of this shape adds pairs of products in 16 bits.

    Depthwise kernels (one channel in and out of each group) do not, and a single product has no partner. Measured with
    ONNX Runtime 1.31.1 on AVX2: dense, 1 x 1 and grouped convolutions, linear layers and depthwise ones with several
    outputs a channel add pairs.

    Args:
        shape: (O, I / groups, ...) of the weight.
        groups: 1 for a linear layer.

    Example:
        >>> adds_pairs((16, 16, 3, 3), 1), adds_pairs((16, 1, 3, 3), 16), adds_pairs((16, 1, 1, 1), 1)
        (True, False, False)
    """
    depthwise = shape[1] == 1 and shape[0] == groups
    return not depthwise and int(np.prod(shape[1:])) > 1


def may_saturate(rows: npt.NDArray[np.int8], highest: int) -> npt.NDArray[np.bool_]:
    """Which rows of a weight hold two products whose sum can leave int16, whichever two a kernel adds.

    Args:
        rows: codes less their zero point, (O, K).
        highest: largest code of the activation, which kernels multiply before its zero point is taken off.

    Returns:
        bool, (O,).

    Example:
        >>> may_saturate(np.array([[127, 1, 0], [127, 2, 0], [-127, -2, 127]], np.int8), 255)
        array([False,  True,  True])
    """
    ordered = np.sort(rows.astype(np.int64), axis=1)
    upper, lower = ordered[:, -2:].clip(min=0).sum(axis=1), ordered[:, :2].clip(max=0).sum(axis=1)
    found: npt.NDArray[np.bool_] = (upper * highest > INT16_MAX) | (lower * highest < -INT16_MAX - 1)
    return found
