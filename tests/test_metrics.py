"""Metrics against closed forms and brute force."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from calibquant.errors import DataError
from calibquant.metrics import ScoreAccumulator, Scores, mcnemar, score, wilson


def random_case(n: int = 200, classes: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    labels = torch.randint(0, classes - 1, (n,), generator=generator)  # the last class never occurs
    logits[torch.arange(n), labels] += 1.0
    return logits, labels


def confusion(predictions: list[int], labels: list[int], classes: int) -> np.ndarray:
    table = np.zeros((classes, classes))
    for p, t in zip(predictions, labels, strict=True):
        table[t, p] += 1
    return table


def closed_wilson(k: int, n: int, z: float) -> tuple[float, float]:
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(("k", "n"), [(1, 10), (5, 10), (9, 10), (917, 1000), (1, 2), (49_000, 50_000)])
@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.959963984540054), (0.99, 2.5758293035489004)])
def test_wilson_equals_its_formula(k: int, n: int, confidence: float, z: float) -> None:
    assert wilson(k, n, confidence) == pytest.approx(closed_wilson(k, n, z), abs=1e-12)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="k"):
        wilson(3, 2)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 0), (5, 5), (10, 2), (2, 10), (30, 12)])
def test_mcnemar_equals_the_binomial_sum(only_a: int, only_b: int) -> None:
    n, low = only_a + only_b, min(only_a, only_b)
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(low + 1))
    a = [True] * only_a + [False] * only_b + [True] * 7 + [False] * 3
    b = [False] * only_a + [True] * only_b + [True] * 7 + [False] * 3
    assert mcnemar(a, b) == pytest.approx(float(min(Fraction(1), 2 * tail)), abs=1e-12)


def test_mcnemar_needs_pairs() -> None:
    with pytest.raises(ValueError, match="shapes"):
        mcnemar([True], [True, False])


@pytest.mark.parametrize("seed", range(4))
def test_label_scores_equal_the_confusion_matrix(seed: int) -> None:
    logits, labels = random_case(seed=seed)
    got = score(logits, labels)
    table = confusion(logits.argmax(1).tolist(), labels.tolist(), 8)
    hits, truth, predicted = np.diag(table), table.sum(1), table.sum(0)
    precision = np.divide(hits, predicted, out=np.zeros(8), where=predicted > 0)
    recall = np.divide(hits, truth, out=np.zeros(8), where=truth > 0)
    f1 = np.divide(2 * precision * recall, precision + recall, out=np.zeros(8), where=precision + recall > 0)
    used = truth + predicted > 0
    assert got.count == got.labelled == 200
    assert got.top1 == pytest.approx(hits.sum() / 200)
    assert got.per_class is not None
    assert got.per_class[7] is None
    assert got.per_class[:7] == pytest.approx((hits / np.maximum(truth, 1))[:7])
    for averaged, weights in ((got.macro, used / used.sum()), (got.weighted, truth / 200)):
        assert averaged is not None
        expected = [float((values * weights).sum()) for values in (precision, recall, f1)]
        assert [averaged.precision, averaged.recall, averaged.f1] == pytest.approx(expected)
    assert got.micro is not None
    assert [got.micro.precision, got.micro.recall, got.micro.f1] == pytest.approx([got.top1] * 3)
    assert got.worst_class is not None
    assert got.worst_class.index == int(np.argmin((hits / np.maximum(truth, 1))[:7]))
    assert got.worst_class.accuracy == pytest.approx(min((hits / np.maximum(truth, 1))[:7]))
    assert got.top1_interval == pytest.approx(closed_wilson(int(hits.sum()), 200, 1.959963984540054))


def test_loss_is_the_mean_cross_entropy() -> None:
    logits, labels = random_case()
    rows = logits.double().numpy()
    expected = [math.log(sum(math.exp(v) for v in row)) - row[t] for row, t in zip(rows, labels.tolist(), strict=True)]
    assert score(logits, labels).loss == pytest.approx(sum(expected) / 200, rel=1e-12)


def test_loss_of_large_logits_stays_finite() -> None:
    assert score(torch.tensor([[1000.0, -1000.0]]), [1]).loss == pytest.approx(2000.0)


def test_top5_equals_brute_force() -> None:
    logits, labels = random_case()
    inside = [t in sorted(range(8), key=lambda c: -row[c])[:5] for row, t in zip(logits, labels.tolist(), strict=True)]
    assert score(logits, labels).top5 == pytest.approx(sum(inside) / 200)


@pytest.mark.parametrize(("classes", "present"), [(2, False), (5, False), (6, True), (1000, True)])
def test_top5_needs_6_classes(classes: int, present: bool) -> None:
    assert (score(torch.randn(4, classes), [0, 1, 0, 1]).top5 is not None) == present


# All logits equal: the prediction is class 0, and the first five classes are the top five.
@pytest.mark.parametrize(("label", "top1", "top5"), [(0, 1.0, 1.0), (4, 0.0, 1.0), (5, 0.0, 0.0)])
def test_equal_logits_favour_the_first_class(label: int, top1: float, top5: float) -> None:
    got = score(torch.zeros(1, 7), [label])
    assert (got.top1, got.top5) == (top1, top5)


def test_a_known_small_case() -> None:
    # truth 0 0 1 1 2, predictions 0 1 1 1 0: precision (1/2, 2/3, 0), recall (1/2, 1, 0), F1 (1/2, 4/5, 0)
    got = score(torch.eye(3)[[0, 1, 1, 1, 0]], [0, 0, 1, 1, 2], reference_predictions=[0, 1, 1, 0, 0])
    assert got.top1 == pytest.approx(3 / 5)
    assert got.macro is not None
    assert [got.macro.precision, got.macro.recall, got.macro.f1] == pytest.approx([7 / 18, 1 / 2, 13 / 30])
    assert got.weighted is not None
    assert [got.weighted.precision, got.weighted.recall, got.weighted.f1] == pytest.approx([7 / 15, 3 / 5, 13 / 25])
    assert got.per_class == (0.5, 1.0, 0.0)
    assert got.worst_class is not None
    assert (got.worst_class.index, got.worst_class.accuracy) == (2, 0.0)
    assert got.agreement == pytest.approx(4 / 5)
    assert got.agreement_interval == pytest.approx(closed_wilson(4, 5, 1.959963984540054))


def test_unknown_labels_count_for_agreement_only() -> None:
    logits, labels = random_case()
    partly = labels.clone()
    partly[::3] = -1
    known = partly >= 0
    got = score(logits, partly, logits.argmax(1).numpy())
    only_known = score(logits[known], labels[known])
    assert (got.count, got.labelled) == (200, int(known.sum()))
    assert got.agreement == 1.0
    for field in ("top1", "top1_interval", "top5", "loss", "macro", "micro", "weighted", "per_class", "worst_class"):
        assert getattr(got, field) == getattr(only_known, field)


def test_without_labels_only_agreement_is_left() -> None:
    got = score(torch.eye(6), [-1] * 6, [0, 1, 2, 3, 0, 0])
    interval = got.agreement_interval
    assert got == Scores(count=6, labelled=0, agreement=4 / 6, agreement_interval=interval)


def test_nothing_at_all() -> None:
    assert ScoreAccumulator().result() == Scores(count=0, labelled=0)
    assert ScoreAccumulator().result([]) == Scores(count=0, labelled=0)


@pytest.mark.parametrize("size", [1, 7, 64, 199, 200])
def test_batches_and_merging_change_nothing(size: int) -> None:
    logits, labels = random_case()
    labels[::7] = -1
    reference = labels.clamp(min=0).numpy()
    parts = [ScoreAccumulator() for _ in range(3)]
    chunks = list(zip(logits.split(size), labels.split(size), strict=True))
    for k, (some, known) in enumerate(chunks):
        parts[k * 3 // len(chunks)].update(some, known)
    total = ScoreAccumulator()
    for part in parts:
        total.merge(part)
    assert total.result(reference) == score(logits, labels, reference)
    assert total.predictions.tolist() == logits.argmax(1).tolist()


def test_arrays_and_bfloat16_are_taken() -> None:
    logits, labels = random_case()
    assert score(logits.numpy(), labels.numpy()) == score(logits, labels)
    assert score(logits.bfloat16(), labels) == score(logits.bfloat16().float(), labels)


@pytest.mark.parametrize("label", [-2, 3, 1000])
def test_labels_outside_the_classes_are_refused(label: int) -> None:
    with pytest.raises(DataError, match=rf"labels: {label} is outside 0..2"):
        score(torch.zeros(2, 3), [0, label])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="are not"):
        score(torch.zeros(2, 3), [0])
    with pytest.raises(ValueError, match="are not"):
        score(torch.zeros(3), [0, 1, 2])
    with pytest.raises(ValueError, match="reference"):
        score(torch.zeros(2, 3), [0, 1], [0])
    accumulator = ScoreAccumulator()
    accumulator.update(torch.zeros(2, 3), [0, 1])
    with pytest.raises(ValueError, match="4 classes after batches with 3"):
        accumulator.update(torch.zeros(2, 4), [0, 1])


def test_dictionary_is_json() -> None:
    logits, labels = random_case()
    tree = json.loads(json.dumps(score(logits, labels, labels.numpy()).to_dict(), allow_nan=False))
    assert tree["count"] == 200
    assert set(tree["macro"]) == {"precision", "recall", "f1"}
    assert set(tree["worst_class"]) == {"index", "accuracy"}
    assert len(tree["agreement_interval"]) == 2
