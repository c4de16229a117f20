"""Statistics of repeated runs: mean and spread, and paired tests over seeds and over images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from calibquant.metrics import Interval

CONFIDENCE = 0.95
NO_SPREAD = 1e-12  # below it, what differs between seeds is the rounding of floats
Verdict = Literal["better", "worse", "not shown"]


@dataclass(frozen=True)
class Spread:
    """Values of several seeds.

    Attributes:
        n: how many.
        mean: their mean.
        sd: their sample standard deviation (divisor n - 1); None for one seed.
    """

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class SeedTest:
    """A paired t-test over seeds.

    Attributes:
        difference: mean and spread of the differences.
        interval: 95 % interval of the mean difference; None below two seeds, or where all differences are equal.
        p: two-sided p-value of "the mean difference is 0"; None as `interval`.
        verdict: better or worse only if the interval excludes 0.
    """

    difference: Spread
    interval: Interval | None
    p: float | None
    verdict: Verdict


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        Spread(n=3, mean=2.0, sd=1.0)
    """
    n, mean = len(values), math.fsum(values) / len(values)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    return Spread(n, mean, sd)


def over_seeds(differences: Sequence[float]) -> SeedTest:
    """Paired t-test of the differences between two methods, one a seed.

    The interval is mean ± t(0.975, n - 1) · sd / √n. Source: Student, "The probable error of a mean", Biometrika 1908.
    Differences that are all equal tell nothing about their spread, so that nothing is shown.

    Example:
        >>> test = over_seeds([0.02, 0.03, 0.04])
        >>> [round(end, 4) for end in test.interval], round(test.p, 4), test.verdict
        ([0.0052, 0.0548], 0.0351, 'better')
    """
    found = spread(differences)
    if found.sd is None or found.sd <= NO_SPREAD:
        return SeedTest(found, None, None, "not shown")
    from scipy.stats import t

    error = found.sd / math.sqrt(found.n)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, found.n - 1)) * error
    low, high = found.mean - half, found.mean + half
    verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "not shown"
    return SeedTest(found, (low, high), float(2 * t.sf(abs(found.mean) / error, found.n - 1)), verdict)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being several, by Holm's step-down method; in the given order.

    The k-th smallest of m becomes max over j <= k of min(1, (m - j + 1) p_j), so that the chance of one false finding
    among all stays below the level. Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure",
    Scandinavian Journal of Statistics 1979.

    Example:
        >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    found, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        found[i] = largest
    return found


def over_images(differences: npt.NDArray[np.int64]) -> float:
    """Exact two-sided sign-flip test over images: p-value of "which method is which makes no difference to an image".

    Under the hypothesis each image's difference d is as likely as -d, independently of other images, so that the sum of
    the positive ones is a sum of k · Binomial(n_k, 1/2), with n_k the images of |d| = k. The k with the most images
    enters by its cumulative distribution, the others by direct convolution. All terms are positive, so that small
    p-values keep their digits, which a convolution by FFT would lose below 1e-16. Unlike random flips it needs no
    seed. With one seed it is the exact McNemar test. Sources: Fisher, "The Design of Experiments", 1935, §21; Yeh,
    "More accurate tests for the statistical significance of result differences", COLING 2000.

    Args:
        differences: for each image, seeds that got it right by one method minus those by the other, (N,).

    Example:
        >>> round(over_images(np.array([1, 1, 1, 0])), 6)
        0.25
    """
    from scipy.stats import binom

    sizes = np.bincount(np.abs(differences))
    parts = sorted((int(images), size) for size, images in enumerate(sizes) if size and images)
    if not parts:
        return 1.0
    total, positive = int(np.abs(differences).sum()), int(differences[differences > 0].sum())
    most, size = parts.pop()
    others = np.ones(1)
    for images, stride in parts:
        steps = np.zeros(stride * images + 1)
        steps[::stride] = binom.pmf(np.arange(images + 1), images, 0.5)
        others = np.convolve(others, steps)
    left = min(positive, total - positive) - np.arange(len(others))  # for the images of the largest part
    below = binom.cdf(left // size, most, 0.5)
    return min(1.0, 2 * math.fsum(others * below))
