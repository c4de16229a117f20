"""Strategies: which of the candidate images calibrate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from calibquant.errors import DataError
from calibquant.recipe import parse_strategy
from calibquant.selection.greedy import cover, facility_location, k_center, match_mean
from calibquant.selection.scoring import Floats, Ints, Pool

TAIL = 0.98  # an image carries a channel's tail if its peak is at least this quantile of the pool's
FOURIER = 512  # random features of the Gaussian kernel
SWEEPS = 1  # of exchanges, for second moments
DRAWS, HELD_OUT = 8, 256  # of `best-of-random`, and how many images judge them

Trial = Callable[[Sequence[int], Sequence[int]], float]
Needs = Literal["nothing", "classes", "network", "trial"]


@dataclass(frozen=True, eq=False)
class Choice:
    """Chosen candidates.

    Args:
        rows: of the pool, in the order in which they were chosen.
        scores: what the strategy gave each of them; None where it ranks none.
        strategies: the name of the strategy that chose each.
    """

    rows: list[int]
    scores: list[float] | None
    strategies: list[str]


@dataclass(frozen=True, eq=False)
class Task:
    """What a strategy is asked for: `count` rows of a pool beside those `taken`, at random by `random`."""

    pool: Pool
    count: int
    taken: list[int]
    random: np.random.Generator
    trial: Trial | None = None


@dataclass(frozen=True)
class Strategy:
    """A way to choose.

    Args:
        words: what it does, for people.
        needs: what must be known of the pool: nothing, classes, the pass of the float network, or also trials.
        pick: gives the rows, and a score of every row of the pool or None.
    """

    words: str
    needs: Needs
    pick: Callable[[Task], tuple[list[int], Floats | None]]


def select(pool: Pool, count: int, strategy: str, seed: int, trial: Trial | None = None) -> Choice:
    """Choose `count` rows of a pool.

    Args:
        pool: the candidates, with what the strategy needs to know of them.
        count: how many.
        strategy: a name of `STRATEGIES`, or several with their shares, e.g. "herding=0.75,tail=0.25"; each chooses
            among what those before it left, and knows what they took.
        seed: of what is drawn at random; the same seed gives the same choice.
        trial: for `best-of-random`: (rows to calibrate with, rows to judge with) -> loss.

    Raises:
        DataError: the pool is too small, or there is no such strategy.

    Example:
        >>> pool = Pool(np.arange(6), np.array([0, 0, 0, 1, 1, 1]))
        >>> sorted(pool.classes[select(pool, 4, "class-balanced", seed=0).rows].tolist())
        [0, 0, 1, 1]
    """
    if not 0 <= count <= len(pool):
        problem = f"{count} images are asked for but there are {len(pool)} candidates"
        raise DataError("calibration.count", problem, f"use a count of at most {len(pool)}, or more images")
    rows, scores, names = list[int](), list[float](), list[str]()
    parts = parse_strategy(strategy)
    for (name, _), number in zip(parts, _shared([share for _, share in parts], count), strict=True):
        random = np.random.default_rng([seed, len(rows)])
        new, values = STRATEGIES[name].pick(Task(pool, number, list(rows), random, trial))
        rows += new
        names += [name] * len(new)
        scores += [np.nan] * len(new) if values is None else [float(v) for v in values[new]]
    return Choice(rows, None if np.isnan(scores).all() else scores, names)


def needs_of(strategy: str) -> Needs:
    """The most that one of the strategies needs.

    Raises:
        DataError: as `parse_strategy`.
    """
    order: tuple[Needs, ...] = ("nothing", "classes", "network", "trial")
    return max((STRATEGIES[name].needs for name, _ in parse_strategy(strategy)), key=order.index)


def sketch(pool: Pool) -> Floats:
    """A description of each image by all layers: responses of random filters, standardized over the pool, (n, d)."""
    if pool.means is None or pool.squares is None:
        raise ValueError("this needs a pool that the network has seen")
    return _standardized(np.concatenate([_flat(pool.means), np.sqrt(_flat(pool.squares))], 1))


def second_moments(pool: Pool) -> Floats:
    """Each image's share of the pool's second moments: random functions of G relative to their mean, (n, d)."""
    if pool.squares is None:
        raise ValueError("this needs a pool that the network has seen")
    squares = _flat(pool.squares)
    return (squares / np.maximum(squares.mean(0), 1e-30)).astype(np.float32)


def class_columns(classes: Ints) -> Floats:
    """Indicators of the classes, (n, classes), such that their squared mean is that of one layer of random filters."""
    found, numbers = np.unique(classes, return_inverse=True)
    columns = np.zeros((len(classes), len(found)), dtype=np.float32)
    columns[np.arange(len(classes)), numbers] = np.sqrt(len(classes) / np.bincount(numbers))[numbers]
    return columns


def kernel_features(features: Floats, random: np.random.Generator) -> Floats:
    """Random features of the Gaussian kernel with the median distance as its width, (n, FOURIER), rows of length 1.

    Source: Rahimi and Recht, "Random Features for Large-Scale Kernel Machines", NIPS 2007.
    """
    a, b = random.integers(0, len(features), (2, 1000))
    distances = np.linalg.norm(features[a] - features[b], axis=1)
    width = float(np.median(distances[distances > 0])) if (distances > 0).any() else 1.0
    angles = features @ (random.standard_normal((features.shape[1], FOURIER // 2)) / width).astype(np.float32)
    return (np.concatenate([np.cos(angles), np.sin(angles)], 1) / np.sqrt(FOURIER / 2)).astype(np.float32)


def _flat(values: Floats) -> Floats:
    return values.reshape(len(values), -1)


def _standardized(values: Floats) -> Floats:
    centred = values - values.mean(0)
    return (centred / np.maximum(centred.std(0), 1e-12)).astype(np.float32)


def _shared(shares: Sequence[float], count: int) -> list[int]:
    """`count` in whole numbers after the shares; what is left goes to the largest remainders, then to the first."""
    exact = [share / sum(shares) * count for share in shares]
    whole = [int(value) for value in exact]
    for i in sorted(range(len(whole)), key=lambda i: whole[i] - exact[i])[: count - sum(whole)]:
        whole[i] += 1
    return whole


def _free(task: Task) -> npt.NDArray[np.int64]:
    return np.setdiff1d(np.arange(len(task.pool)), np.asarray(task.taken, dtype=np.int64))


def _first(task: Task) -> tuple[list[int], None]:
    return _free(task)[: task.count].tolist(), None


def _random(task: Task) -> tuple[list[int], None]:
    return task.random.permutation(_free(task))[: task.count].tolist(), None


def _by_class(task: Task, keys: npt.NDArray[np.float64]) -> list[int]:
    """The rows of the least keys, as many of each class as of any other, in turns; a class without rows drops out."""
    free = _free(task)
    order = free[np.argsort(keys[free], kind="stable")]
    classes = task.pool.classes[order]
    turn = np.empty(len(order), dtype=np.int64)
    for number in np.unique(classes):
        turn[classes == number] = np.arange((classes == number).sum())
    place = task.random.permutation(int(classes.max(initial=0)) + 2)[classes]  # which class comes first in a turn
    return order[np.lexsort((place, turn))][: task.count].tolist()


def _balanced(task: Task) -> tuple[list[int], None]:
    return _by_class(task, task.random.random(len(task.pool))), None


def _ranked(value: str, sign: int) -> Callable[[Task], tuple[list[int], Floats]]:
    def pick(task: Task) -> tuple[list[int], Floats]:
        scores = sign * task.pool.values[value]
        return _by_class(task, -scores.astype(np.float64)), scores

    return pick


def _herding(task: Task) -> tuple[list[int], None]:
    seen = np.concatenate([sketch(task.pool), class_columns(task.pool.classes)], 1)
    return match_mean(kernel_features(seen, task.random), task.count, task.taken), None


def _moments(task: Task, repeat: bool = False) -> tuple[list[int], None]:
    seen = np.concatenate([second_moments(task.pool), class_columns(task.pool.classes)], 1)
    return match_mean(seen, task.count, task.taken, SWEEPS, repeat=repeat), None


def _k_center(task: Task) -> tuple[list[int], None]:
    return k_center(sketch(task.pool), task.count, task.taken), None


def _facility(task: Task) -> tuple[list[int], None]:
    return facility_location(sketch(task.pool), task.count, task.random, task.taken), None


def _tail(task: Task) -> tuple[list[int], Floats]:
    peaks = task.pool.peaks
    if peaks is None:
        raise ValueError("this needs a pool that the network has seen")
    marks = peaks >= np.maximum(np.quantile(peaks, TAIL, axis=0), np.finfo(np.float32).tiny)
    return cover(marks, task.count, task.taken), marks.mean(1, dtype=np.float32)


def _best(task: Task) -> tuple[list[int], None]:
    """Draws by classes; the judging images are in none of them."""
    if task.trial is None:
        raise ValueError("this needs a trial")
    shuffled = task.random.permutation(_free(task))
    held = min(HELD_OUT, len(shuffled) - task.count)
    if held < 1:
        mend = "use a smaller calibration.count, or more candidates"
        raise DataError("calibration.strategy", "best-of-random has no images left to judge with", mend)
    judging = shuffled[:held].tolist()
    draws = [
        _by_class(Task(task.pool, task.count, [*task.taken, *judging], random), random.random(len(task.pool)))
        for random in task.random.spawn(DRAWS)
    ]
    losses = [task.trial([*task.taken, *draw], judging) for draw in draws]
    return draws[int(np.argmin(losses))], None


STRATEGIES: dict[str, Strategy] = {
    "random": Strategy("a draw without replacement", "nothing", _random),
    "first": Strategy("the first images of the set", "nothing", _first),
    "class-balanced": Strategy("a draw, as many of each class (the network's, where labels are missing)", "classes",
                               _balanced),
    "captq": Strategy("images of least total variation, as many of each class", "network", _ranked("variation", -1)),
    "captq-variance": Strategy("of least local variance", "network", _ranked("variance", -1)),
    "captq-entropy": Strategy("of highest entropy of the intensity histogram", "network", _ranked("entropy", 1)),
    "captq-flatness": Strategy("of flattest intensity histogram", "network", _ranked("flatness", 1)),
    "rough": Strategy("of highest total variation: the opposite of captq", "network", _ranked("variation", 1)),
    "hard": Strategy("of highest loss, as many of each class", "network", _ranked("loss", 1)),
    "easy": Strategy("of least loss, as many of each class", "network", _ranked("loss", -1)),
    "k-center": Strategy("every candidate is near a chosen one", "network", _k_center),
    "facility": Strategy("facility location: every candidate is well represented", "network", _facility),
    "herding": Strategy("kernel herding: the mean embedding of all layers is the pool's", "network", _herding),
    "moments": Strategy("the layers' second moments, and the classes, are the pool's", "network", _moments),
    "moments-weighted": Strategy("the same, where an image may come several times, which weighs it", "network",
                                 partial(_moments, repeat=True)),
    "tail": Strategy("every channel's highest peaks are covered", "network", _tail),
    "best-of-random": Strategy(f"of {DRAWS} class-balanced draws the one that quantizes best on held-out candidates",
                               "trial", _best),
}  # fmt: skip
