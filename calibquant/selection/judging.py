"""How good a given calibration set is: how well it stands for the pool, beside random sets of its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibquant.selection.greedy import match_mean
from calibquant.selection.scoring import Floats, Pool
from calibquant.selection.strategies import class_columns, second_moments

RANDOM_SETS = 200
ADDED = 10  # images that are proposed
HIGH = 0.99  # quantile of the pool's peaks that a set should reach
STRETCH = 4.0  # an image stretches a range that reaches so many times as far as half of the pool's images do


@dataclass(frozen=True)
class LayerJudgement:
    """What a set shows of one layer's input.

    Args:
        layer: name of the node that enters it.
        coverage: mean over channels of the set's highest peak over the pool's 99 % quantile of peaks, at most 1.
        moment_error: relative error of random second moments, |G_S - G_D| / |G_D|.
        mean_error: error of random means in standard deviations over the pool's images, root mean square.
    """

    layer: str
    coverage: float
    moment_error: float
    mean_error: float


@dataclass(frozen=True)
class Stretch:
    """An image that alone makes a range wide, so that all other images have fewer steps.

    Args:
        row: of the set.
        node: whose values it stretches most.
        times: its largest |value| there over the median of the pool's images.
    """

    row: int
    node: str
    times: float


@dataclass(frozen=True)
class Judgement:
    """How good a set is.

    Args:
        images: in the set.
        distinct: of these, different ones.
        score: of the set, higher is better: minus the mean of the logarithms of its errors over those of random sets;
            0 for a set as good as a typical random one, -0.7 for one with twice its errors.
        percentile: share of random sets of the same size, drawn from the pool, that have a lower score, in percent.
        coverage, moment_error, mean_error: means over the layers.
        class_distance: half the sum of |share in the set - share in the pool| over the classes, 0 to 1.
        missing_classes: numbers of classes that the pool has and the set has not.
        layers: each layer's part.
        add: rows of the pool that would improve it most, in order.
        stretching: images of the set that reach more than STRETCH times the pool's median at the input of some layer,
            the farthest first.
        random: what the coverage, the two errors and the class distance of random sets are, mean of each.
    """

    images: int
    distinct: int
    score: float
    percentile: float
    coverage: float
    moment_error: float
    mean_error: float
    class_distance: float
    missing_classes: tuple[int, ...]
    layers: tuple[LayerJudgement, ...]
    add: tuple[int, ...]
    stretching: tuple[Stretch, ...]
    random: dict[str, float]


def judge(pool: Pool, given: Pool, seed: int, distinct: int | None = None) -> Judgement:
    """Rate a set of images as calibration images for what a pool stands for.

    The second moments of what enters each layer decide how a reconstruction weighs errors, peaks decide ranges, means
    biases, and classes what is seen at all; each is measured, divided by what random sets of the pool have, and the
    logarithms of these ratios are averaged.

    Args:
        pool: a scored pool, larger than the set.
        given: the set, scored with the same network and seed of filters.
        seed: of the random sets.
        distinct: how many different images the set has; None: all.

    Raises:
        ValueError: one of them is not scored, or they were scored for different layers.

    Example: see `calibquant.judge`.
    """
    if pool.layers != given.layers or not pool.layers:
        raise ValueError("pool and set must be scored by the same network")
    measure = _Measure(pool)
    random = np.random.default_rng([seed, len(given)])
    size = min(len(given), len(pool))
    sets = [measure.errors(pool, random.permutation(len(pool))[:size]) for _ in range(RANDOM_SETS)]
    typical = np.median(np.stack(sets), 0)
    own = measure.errors(given, np.arange(len(given)))
    scores = [_score(errors, typical) for errors in sets]
    score = _score(own, typical)
    layers = measure.layers(given)
    present, expected = (np.unique(p.classes) for p in (given, pool))
    found = [measure.summary(pool, random.permutation(len(pool))[:size]) for _ in range(20)]
    return Judgement(
        images=len(given),
        distinct=len(given) if distinct is None else distinct,
        score=score,
        percentile=100 * float(np.mean([s < score for s in scores])),
        coverage=float(np.mean([row.coverage for row in layers])),
        moment_error=float(np.mean([row.moment_error for row in layers])),
        mean_error=float(np.mean([row.mean_error for row in layers])),
        class_distance=measure.class_distance(given.classes),
        missing_classes=tuple(int(c) for c in np.setdiff1d(expected, present)),
        layers=tuple(layers),
        add=tuple(_to_add(pool, given)),
        stretching=tuple(_stretching(pool, given)),
        random={key: float(np.mean([row[key] for row in found])) for key in found[0]},
    )


def _score(errors: Floats, typical: Floats) -> float:
    return -float(np.mean(np.log((errors + 1e-9) / (typical + 1e-9))))


class _Measure:
    """A pool's statistics, to which sets are compared."""

    def __init__(self, pool: Pool) -> None:
        means, squares, peaks = _arrays(pool)
        self.names, self.peak_layers = pool.layers, pool.peak_layers
        self.mean, self.spread = means.mean(0), np.maximum(means.std(0), 1e-12)
        self.square = np.maximum(squares.mean(0), 1e-30)
        self.high = np.maximum(np.quantile(peaks, HIGH, axis=0), 1e-12)
        self.shares = np.bincount(pool.classes[pool.classes >= 0]) / max(1, len(pool))

    def errors(self, pool: Pool, rows: npt.NDArray[np.int64]) -> Floats:
        """What is wrong with a set of rows: each layer's moment and mean error, missing coverage, class distance."""
        coverage, moment, mean = self._by_layer(pool, rows)
        missing = 1 - coverage.mean() + 0.01  # a set that covers all is no better than one that covers 99 %
        classes = self.class_distance(pool.classes[rows]) + 0.01
        return np.array([moment.mean(), mean.mean(), missing, classes], dtype=np.float32)

    def layers(self, given: Pool) -> list[LayerJudgement]:
        """Each layer's part in how a set is judged."""
        columns = self._by_layer(given, np.arange(len(given)))
        return [LayerJudgement(name, *(float(c[i]) for c in columns)) for i, name in enumerate(self.names)]

    def summary(self, pool: Pool, rows: npt.NDArray[np.int64]) -> dict[str, float]:
        """The figures of a judgement for a set of rows."""
        columns = [float(column.mean()) for column in self._by_layer(pool, rows)]
        found = dict(zip(("coverage", "moment_error", "mean_error"), columns, strict=True))
        return found | {"class_distance": self.class_distance(pool.classes[rows])}

    def class_distance(self, classes: Sequence[int] | npt.NDArray[np.int64]) -> float:
        known = np.asarray(classes)[np.asarray(classes) >= 0]
        counts = np.bincount(known, minlength=len(self.shares)) / max(1, len(known))
        return 0.5 * float(np.abs(counts - np.pad(self.shares, (0, len(counts) - len(self.shares)))).sum())

    def _by_layer(self, pool: Pool, rows: npt.NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
        """Coverage, moment error and mean error, (layers,) each."""
        means, squares, peaks = _arrays(pool)
        top = np.minimum(peaks[rows].max(0) / self.high, 1)
        coverage = np.array([top[self.peak_layers == i].mean() for i in range(len(self.names))], dtype=np.float32)
        gap = np.linalg.norm(squares[rows].mean(0) - self.square, axis=1)
        moment = gap / np.linalg.norm(self.square, axis=1)
        mean = np.sqrt((((means[rows].mean(0) - self.mean) / self.spread) ** 2).mean(1))
        return coverage, moment.astype(np.float32), mean.astype(np.float32)


def _arrays(pool: Pool) -> tuple[Floats, Floats, Floats]:
    if pool.means is None or pool.squares is None or pool.peaks is None:
        raise ValueError("this needs a pool that the network has seen")
    return pool.means, pool.squares, pool.peaks


def _to_add(pool: Pool, given: Pool) -> list[int]:
    """Rows of the pool with which the set's second moments and classes come closest to the pool's."""
    both = Pool(
        np.concatenate([pool.indices, given.indices]),
        np.concatenate([pool.classes, given.classes]),
        squares=np.concatenate([_arrays(pool)[1], _arrays(given)[1]]),
    )
    features = np.concatenate([second_moments(both), class_columns(both.classes)], 1)
    count = min(ADDED, len(pool))
    target = features[: len(pool)].mean(0)
    return match_mean(features, count, range(len(pool), len(both)), target=target)


def _stretching(pool: Pool, given: Pool) -> list[Stretch]:
    if pool.tops is None or given.tops is None:
        raise ValueError("this needs a pool that the network has seen")
    times = given.tops / np.maximum(np.median(pool.tops, 0), 1e-12)
    farthest = times.max(1)
    rows = [int(row) for row in np.argsort(-farthest, kind="stable") if farthest[row] > STRETCH]
    return [Stretch(row, pool.entering[int(times[row].argmax())], float(farthest[row])) for row in rows]
