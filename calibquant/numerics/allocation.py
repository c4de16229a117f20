"""How many bits each channel of a tensor gets, 0 to 8, when their average is given."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MOST = 8  # bits of a channel
MOVES = 10  # of Banner's target
CLOSE = 0.01  # bits: how near the mean is to come to the goal

Bits = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def banner(spread: Floats, bits: int) -> Bits:
    """Bits by the spread of each channel: a channel's number of levels is in proportion to spread^(2/3).

    B_i = n * 2^M * s_i^(2/3) / sum_j s_j^(2/3), M_i = round(log2 B_i), limited to 0 … 8, which minimizes
    sum_i s_i^2 / B_i^2 at a given number of levels in all. Rounding and limits move the mean of M_i away from the goal,
    so the target M, at first the goal, is moved by half the difference, at most 10 times, until they are within 0.01.
    Source: the per-channel bit allocation of Banner, Nahshan and Soudry, "Post training 4-bit quantization of
    convolutional networks for rapid-deployment", NeurIPS 2019; the moved target is its released code's.

    Args:
        spread: s_i of each channel, finite and not negative, (n,).
        bits: the goal.

    Returns:
        int64 (n,), 0 to 8; the mean is near the goal but need not equal it. Without any spread all have `bits`.
    """
    share = spread ** (2 / 3)
    if not share.any():
        return np.full(len(spread), bits, np.int64)
    with np.errstate(divide="ignore"):  # a channel without spread: log2 gives -inf and the limit 0 bits
        relative = np.log2(len(share) * (share / share.sum()))
    target = float(bits)
    found = _limited(target + relative)
    for _ in range(MOVES):
        difference = bits - float(found.mean())
        if abs(difference) <= CLOSE:
            break
        target += difference / 2
        found = _limited(target + relative)
    return found


def optimal(errors: Floats, total: int) -> Bits:
    """The bits of least summed error at exactly `total` bits, by dynamic programming over the channels.

    Args:
        errors: of channel i with b bits, (n, 9) for b = 0 … 8; finite.
        total: sum of the channels' bits, 0 to 8 n.

    Returns:
        int64 (n,), 0 to 8. Of equally good ones, the last channels have the fewest bits.

    Raises:
        ValueError: no bits of 0 to 8 have that sum.
    """
    if not 0 <= total <= MOST * len(errors):
        raise ValueError(f"{len(errors)} channels of 0 to {MOST} bits do not have {total} bits")
    least = np.full(total + 1, np.inf)  # of the channels so far, by the bits that they have together
    least[0] = 0
    chosen = np.zeros((len(errors), total + 1), np.int8)
    for channel, row in enumerate(errors):
        best = least + row[0]
        for bits in range(1, min(MOST, total) + 1):
            other = least[: total + 1 - bits] + row[bits]
            better = other < best[bits:]
            best[bits:][better] = other[better]
            chosen[channel, bits:][better] = bits
        least = best
    found, left = np.zeros(len(errors), np.int64), total
    for channel in range(len(errors) - 1, -1, -1):
        found[channel] = chosen[channel, left]
        left -= int(found[channel])
    return found


def _limited(bits: Floats) -> Bits:
    return np.clip(np.rint(bits), 0, MOST).astype(np.int64)
