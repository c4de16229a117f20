"""Strategies as a table: what must hold of every one, and what makes each of them."""

from __future__ import annotations

import numpy as np
import pytest

from calibquant.errors import DataError
from calibquant.selection import STRATEGIES, Pool, needs_of, parse_strategy, select
from calibquant.selection.strategies import DRAWS, HELD_OUT, kernel_features, second_moments, sketch

N, LAYERS = 600, 3
_RANDOM = np.random.default_rng(5)
CLASSES = _RANDOM.choice(4, N, p=[0.5, 0.3, 0.15, 0.05])
POOL = Pool(
    indices=np.arange(N) * 2,
    classes=CLASSES,
    values={
        name: _RANDOM.random(N).astype(np.float32)
        for name in ("variation", "variance", "entropy", "flatness", "loss", "margin")
    },
    layers=("a", "b", "c"),
    means=_RANDOM.standard_normal((N, LAYERS, 8)).astype(np.float32),
    squares=_RANDOM.chisquare(3, (N, LAYERS, 8)).astype(np.float32),
    peaks=_RANDOM.exponential(size=(N, 30)).astype(np.float32),
    peak_layers=np.repeat(np.arange(LAYERS), 10),
)


def trial(rows: list[int], judging: list[int]) -> float:
    assert not set(rows) & set(judging)
    return abs(float(POOL.values["loss"][rows].sum()) - 0.5 * len(rows))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("count", [0, 1, 60])
def test_every_strategy_chooses_so_many_rows_each_once_and_the_same_again(name: str, count: int) -> None:
    choice = select(POOL, count, name, 7, trial)
    assert len(choice.rows) == len(choice.strategies) == count
    assert len(set(choice.rows)) == count or name == "moments-weighted"
    assert choice.rows == select(POOL, count, name, 7, trial).rows
    assert all(0 <= row < N for row in choice.rows)
    if choice.scores is not None:
        assert len(choice.scores) == count


@pytest.mark.parametrize("name", ["random", "class-balanced", "herding", "facility", "best-of-random"])
def test_a_strategy_that_draws_depends_on_the_seed(name: str) -> None:
    assert select(POOL, 40, name, 1, trial).rows != select(POOL, 40, name, 2, trial).rows


def test_a_draw_is_without_replacement_and_a_longer_one_begins_with_the_shorter() -> None:
    rows = select(POOL, N, "random", 3).rows
    assert sorted(rows) == list(range(N))
    assert rows != list(range(N))
    assert select(POOL, 20, "random", 3).rows == rows[:20]
    assert select(POOL, 4, "first", 99).rows == [0, 1, 2, 3]


def test_a_draw_reaches_every_image_equally() -> None:
    counts = np.zeros(10)
    pool = Pool(np.arange(10), np.full(10, -1))
    for seed in range(2000):
        counts[select(pool, 3, "random", seed).rows] += 1
    # Each image is drawn with p = 0.3: mean 600, standard deviation sqrt(2000 * 0.3 * 0.7) = 20.5.
    assert np.abs(counts - 600).max() < 5 * 20.5


@pytest.mark.parametrize("name", ["class-balanced", "captq", "rough", "hard", "easy", "best-of-random"])
def test_classes_have_as_many_images_as_they_can(name: str) -> None:
    """The rarest class gives all it has; the others share the rest evenly."""
    rarest = int((CLASSES == 3).sum())
    assert np.bincount(CLASSES[select(POOL, 48, name, 0, trial).rows]).tolist() == [12] * 4
    most = np.bincount(CLASSES[select(POOL, 200, "class-balanced", 0).rows])
    assert most[3] == rarest
    assert np.ptp(most[:3]) <= 1


def test_any_beginning_of_a_balanced_set_is_balanced() -> None:
    rows = select(POOL, 48, "class-balanced", 0).rows
    assert all(np.ptp(np.bincount(CLASSES[rows[:k]], minlength=4)) <= 1 for k in range(1, 49))


@pytest.mark.parametrize(
    ("name", "value", "sign"),
    [
        ("captq", "variation", -1), ("captq-variance", "variance", -1), ("captq-entropy", "entropy", 1),
        ("captq-flatness", "flatness", 1), ("rough", "variation", 1), ("hard", "loss", 1), ("easy", "loss", -1),
    ],
)  # fmt: skip
def test_ranked_strategies_take_the_best_of_each_class(name: str, value: str, sign: int) -> None:
    choice = select(POOL, 40, name, 0)
    chosen = np.zeros(N, dtype=bool)
    chosen[choice.rows] = True
    scores = sign * POOL.values[value]
    for number in range(4):
        mine = number == CLASSES
        assert scores[mine & chosen].min() > scores[mine & ~chosen].max()
    assert choice.scores == pytest.approx(scores[choice.rows])


def error(rows: list[int], features: np.ndarray) -> float:
    return float(np.linalg.norm(features[rows].mean(0) - features.mean(0)))


@pytest.mark.parametrize(
    ("name", "features"), [("moments", second_moments(POOL)), ("herding", sketch(POOL))]
)  # fmt: skip
def test_matching_strategies_are_nearer_the_pool_than_draws(name: str, features: np.ndarray) -> None:
    draws = [error(select(POOL, 40, "class-balanced", seed).rows, features) for seed in range(30)]
    assert error(select(POOL, 40, name, 0).rows, features) < 0.7 * min(draws)


def test_repeating_images_comes_nearer_to_the_moments() -> None:
    features = second_moments(POOL)
    errors = [error(select(POOL, 300, name, 0).rows, features) for name in ("moments", "moments-weighted")]
    assert errors[1] <= errors[0]
    rows = select(POOL, 300, "moments-weighted", 0).rows
    assert 30 < len(set(rows)) < 300


def test_moments_keep_the_shares_of_the_classes() -> None:
    shares = np.bincount(CLASSES[select(POOL, 60, "moments", 0).rows], minlength=4) / 60
    assert np.abs(shares - np.bincount(CLASSES) / N).max() < 0.04


def test_tail_covers_more_channels_than_draws() -> None:
    assert POOL.peaks is not None
    marks = POOL.peaks >= np.quantile(POOL.peaks, 0.98, axis=0)
    draws = [marks[select(POOL, 40, "random", seed).rows].any(0).mean() for seed in range(20)]
    assert marks[select(POOL, 40, "tail", 0).rows].any(0).mean() == 1 > np.mean(draws)


def test_the_best_draw_has_the_least_loss_of_all_tried() -> None:
    losses: list[float] = []

    def remember(rows: list[int], judging: list[int]) -> float:
        assert len(judging) == HELD_OUT
        losses.append(trial(rows, judging))
        return losses[-1]

    rows = select(POOL, 40, "best-of-random", 0, remember).rows
    assert len(losses) == DRAWS
    assert trial(rows, []) == min(losses)


def test_a_mixture_shares_the_count_and_repeats_nothing() -> None:
    choice = select(POOL, 41, "tail=1,class-balanced=3", 0)
    assert [choice.strategies.count(name) for name in ("tail", "class-balanced")] == [10, 31]
    assert len(set(choice.rows)) == 41
    assert choice.rows[:10] == select(POOL, 10, "tail", 0).rows
    assert choice.scores is not None
    assert np.isnan(choice.scores[10:]).all()
    assert not np.isnan(choice.scores[:10]).any()


def test_kernel_features_are_a_kernel() -> None:
    features = sketch(POOL)[:200]
    found = kernel_features(features, np.random.default_rng(0))
    distances = np.linalg.norm(features[:, None] - features, axis=2)
    expected = np.exp(-0.5 * (distances / np.median(distances[distances > 0])) ** 2)
    assert np.abs(found @ found.T - expected).mean() < 0.05  # random features: about 1 / sqrt(256)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(200), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("herdng", "there is no strategy 'herdng'; did you mean 'herding'"),
        ("tail=0,random=1", "'0' is no share of tail; write such as"),
        ("tail=much", "'much' is no share of tail"),
        ("", "there is no strategy ''"),
    ],
)
def test_a_strategy_that_is_none(text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"calibration.strategy: {message}"):
        parse_strategy(text)


def test_too_many_images_state_both_numbers() -> None:
    with pytest.raises(DataError, match=r"calibration.count: 601 images are asked for but there are 600 candidates"):
        select(POOL, 601, "random", 0)


def test_the_most_that_a_mixture_needs() -> None:
    assert [needs_of(s) for s in ("random", "random=1,class-balanced=1", "tail,first", "best-of-random")] == [
        "nothing", "classes", "network", "trial",
    ]  # fmt: skip
