"""Scores of single classes against scikit-learn's."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from calibquant.evaluation.classes import class_names, class_scores, confusion_csv, most_confused
from calibquant.metrics import ScoreAccumulator, confusion_matrix

CLASSES = 9
Case = tuple[ScoreAccumulator, np.ndarray, np.ndarray]  # its labels and predictions


@pytest.fixture
def case() -> Case:
    """Batches of unequal size, some labels unknown; class 7 is never labelled, class 8 never seen at all."""
    generator = np.random.default_rng(3)
    labels, logits = generator.integers(-1, 7, 300), generator.normal(size=(300, CLASSES))
    logits[np.arange(300), labels] += 1.5
    logits[:, 8] = -9
    accumulator, other = ScoreAccumulator(), ScoreAccumulator()
    for part in np.split(np.arange(200), [1, 80, 81]):
        accumulator.update(torch.from_numpy(logits[part]), labels[part])
    other.update(torch.from_numpy(logits[200:]), labels[200:])
    accumulator.merge(other)
    return accumulator, labels, logits.argmax(axis=1)


def matrix(seen: ScoreAccumulator) -> np.ndarray:
    return confusion_matrix(seen.labels, seen.predictions, CLASSES)


def test_the_matrix_is_scikit_learns(case: Case) -> None:
    accumulator, labels, predictions = case
    known = labels >= 0
    expected = sklearn_metrics.confusion_matrix(labels[known], predictions[known], labels=range(CLASSES))
    assert matrix(accumulator).dtype == np.int64
    assert np.array_equal(matrix(accumulator), expected)
    assert matrix(ScoreAccumulator()).sum() == 0


def test_scores_of_classes_are_scikit_learns(case: Case) -> None:
    accumulator, labels, predictions = case
    known = labels >= 0
    rows = class_scores(matrix(accumulator), class_names(None, CLASSES))
    assert [row.index for row in rows] == list(range(8))
    precision, recall, f1, images = sklearn_metrics.precision_recall_fscore_support(
        labels[known], predictions[known], labels=range(8), zero_division=0
    )
    for i, row in enumerate(rows):
        assert (row.name, row.images) == (str(i), images[i])
        assert row.predicted == (predictions[known] == i).sum()
        assert (row.accuracy or 0, row.precision or 0, row.f1) == pytest.approx((recall[i], precision[i], f1[i]))
    assert rows[7].accuracy is None
    scores = accumulator.result()
    assert scores.per_class is not None
    assert [row.accuracy for row in rows] == list(scores.per_class[:8])
    assert scores.macro is not None
    assert np.mean([row.f1 for row in rows]) == pytest.approx(scores.macro.f1)


def test_the_most_confused_pairs_by_search(case: Case) -> None:
    accumulator, labels, predictions = case
    names = class_names(["a", "b"], CLASSES)
    assert names == ["a", "b", "2", "3", "4", "5", "6", "7", "8"]
    found = most_confused(matrix(accumulator), names, 5)
    pairs = [((labels == i) & (predictions == j), i, j) for i in range(CLASSES) for j in range(CLASSES) if i != j]
    expected = sorted(((int(both.sum()), i, j) for both, i, j in pairs), key=lambda pair: -pair[0])[:5]
    assert [(p.images, p.label, p.prediction) for p in found] == [(n, names[i], names[j]) for n, i, j in expected]
    assert [p.share for p in found] == pytest.approx([n / (labels == i).sum() for n, i, _ in expected])


def test_nothing_confused_is_no_pair() -> None:
    assert most_confused(np.diag([3, 0, 2]), ["a", "b", "c"]) == []


def test_the_file_can_be_read_again(case: Case) -> None:
    accumulator, _, _ = case
    names = ["Rock, paper", 'the "dog"', *map(str, range(2, CLASSES))]
    header, *rows = csv.reader(io.StringIO(confusion_csv(matrix(accumulator), names)))
    assert header == ["label", *names]
    assert [row[0] for row in rows] == names
    assert np.array_equal(np.array([row[1:] for row in rows], dtype=int), matrix(accumulator))
