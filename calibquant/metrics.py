"""How good predictions are: accuracy, cross entropy, precision, recall, F1, agreement, intervals, paired tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from calibquant.errors import DataError

Interval = tuple[float, float]


@dataclass(frozen=True)
class Averaged:
    """Precision, recall and F1 under one way of averaging over the classes."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class WorstClass:
    """The class with the lowest accuracy among those that occur; the first of equals."""

    index: int
    accuracy: float


@dataclass(frozen=True)
class Scores:
    """What was measured on a set of images. All shares are fractions of 1.

    Attributes:
        count: images.
        labelled: images with a known label. The fields up to `per_class` are about these, and None when there are none.
        top1: share of correct predictions; of equal logits the first class is the prediction.
        top1_interval: Wilson 95 % interval of top1.
        top5: share of labels among the five highest logits; None below 6 classes.
        loss: mean cross entropy.
        macro: mean over the classes that are labelled or predicted.
        micro: over all decisions; with one label an image this is top1.
        weighted: mean over classes, weighted by how often each is labelled.
        worst_class: lowest of per_class.
        per_class: accuracy of each class, None for those that do not occur.
        agreement: share of predictions equal to the reference's; None without a reference.
        agreement_interval: Wilson 95 % interval of agreement.
    """

    count: int
    labelled: int
    top1: float | None = None
    top1_interval: Interval | None = None
    top5: float | None = None
    loss: float | None = None
    macro: Averaged | None = None
    micro: Averaged | None = None
    weighted: Averaged | None = None
    worst_class: WorstClass | None = None
    per_class: tuple[float | None, ...] | None = None
    agreement: float | None = None
    agreement_interval: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries, ready for JSON."""
        return asdict(self)


class ScoreAccumulator:
    """Scores of a large set from its batches: keeps a few numbers an image, not the logits.

    Example:
        >>> scores = ScoreAccumulator()
        >>> scores.update(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        >>> scores.result().top1
        0.5
    """

    def __init__(self) -> None:
        self.num_classes: int | None = None
        self._predictions: list[npt.NDArray[np.int64]] = []
        self._labels: list[npt.NDArray[np.int64]] = []
        self._ranks: list[npt.NDArray[np.int64]] = []
        self._losses: list[npt.NDArray[np.float64]] = []

    @property
    def predictions(self) -> npt.NDArray[np.int64]:
        """Predicted class of each image so far, shape (N,)."""
        return _join(self._predictions, np.int64)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Label of each image so far, -1 where unknown, shape (N,)."""
        return _join(self._labels, np.int64)

    def update(self, logits: Tensor | npt.NDArray[Any], labels: Tensor | npt.NDArray[np.int64] | Sequence[int]) -> None:
        """Add a batch.

        Args:
            logits: shape (N, classes).
            labels: shape (N,), -1 where unknown.

        Raises:
            DataError: a label is outside -1..classes-1.
            ValueError: the shapes do not fit each other or earlier batches.
        """
        values = torch.as_tensor(logits).detach().to("cpu", torch.float64)
        targets = torch.as_tensor(labels, dtype=torch.int64).cpu()
        if values.ndim != 2 or targets.shape != values.shape[:1]:
            raise ValueError(
                f"logits {tuple(values.shape)} and labels {tuple(targets.shape)} are not (N, classes), (N,)"
            )
        self._fix_classes(values.shape[1])
        _check_range(targets, values.shape[1])
        known = targets >= 0
        self._predictions.append(values.argmax(dim=1).numpy())
        self._labels.append(targets.numpy().copy())
        self._ranks.append(_ranks(values[known], targets[known]).numpy())
        self._losses.append(F.cross_entropy(values[known], targets[known], reduction="none").numpy())

    def merge(self, other: ScoreAccumulator) -> None:
        """Add what another accumulator saw, after what this one saw.

        Raises:
            ValueError: it counts another number of classes.
        """
        if other.num_classes is not None:
            self._fix_classes(other.num_classes)
        self._predictions += other._predictions
        self._labels += other._labels
        self._ranks += other._ranks
        self._losses += other._losses

    def result(self, reference_predictions: npt.ArrayLike | None = None) -> Scores:
        """The scores of all images so far; the same however they were split into batches.

        Args:
            reference_predictions: class predicted by the reference for each image, shape (N,), in the order of updates.

        Raises:
            ValueError: the reference has another length.
        """
        predictions, labels = self.predictions, self.labels
        known = labels >= 0
        fields: dict[str, Any] = {}
        if known.any():
            ranks, losses = _join(self._ranks, np.int64), _join(self._losses, np.float64)
            fields |= _label_scores(predictions[known], labels[known], ranks, losses, self.num_classes or 0)
        if reference_predictions is not None:
            fields |= _agreement(predictions, np.asarray(reference_predictions))
        return Scores(count=len(labels), labelled=int(known.sum()), **fields)

    def _fix_classes(self, count: int) -> None:
        if self.num_classes not in (None, count):
            raise ValueError(f"{count} classes after batches with {self.num_classes}")
        self.num_classes = count


def score(
    logits: Tensor | npt.NDArray[Any],
    labels: Tensor | npt.NDArray[np.int64] | Sequence[int],
    reference_predictions: npt.ArrayLike | None = None,
) -> Scores:
    """Scores of logits (N, classes) against labels (N,), -1 where unknown, and optionally a reference's predictions.

    Raises:
        DataError: a label is outside -1..classes-1.
        ValueError: the shapes do not fit each other.

    Example:
        >>> scores = score(torch.eye(3), [0, 1, 1], reference_predictions=[0, 1, 2])
        >>> round(scores.top1, 3), scores.agreement
        (0.667, 1.0)
    """
    accumulator = ScoreAccumulator()
    accumulator.update(logits, labels)
    return accumulator.result(reference_predictions)


def confusion_matrix(
    labels: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64], classes: int
) -> npt.NDArray[np.int64]:
    """How many images of each label got each prediction, int64 (classes, classes); rows are labels.

    Args:
        labels: below `classes`, shape (N,); images of label -1 are left out.
        predictions: from 0 and below `classes`, shape (N,).

    Example:
        >>> confusion_matrix(np.array([0, 1, 1, -1]), np.array([0, 0, 1, 1]), 2).tolist()
        [[1, 0], [1, 1]]
    """
    known = labels >= 0
    cells = labels[known] * classes + predictions[known]
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share: where the true one lies when `successes` of `n` were seen. (0, 1) for n = 0.

    Raises:
        ValueError: successes is outside 0..n, or confidence outside 0..1.

    Example:
        >>> [round(end, 4) for end in wilson(8, 10)]
        [0.4902, 0.9433]
    """
    if n == 0 and successes == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(correct_a: npt.ArrayLike, correct_b: npt.ArrayLike) -> float:
    """Exact two-sided McNemar test of two networks on the same images: p-value of "they are equally accurate".

    Args:
        correct_a: whether the first network was right on each image, bool, shape (N,).
        correct_b: the same for the second.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> mcnemar([True, True, True, False], [False, False, False, False])
        0.25
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"paired results have shapes {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    if only_a + only_b == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue)


def _label_scores(
    predictions: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    ranks: npt.NDArray[np.int64],
    losses: npt.NDArray[np.float64],
    num_classes: int,
) -> dict[str, Any]:
    correct = predictions == labels
    occurring = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[correct], minlength=num_classes)
    per_class = tuple(float(h / n) if n else None for h, n in zip(hits, occurring, strict=True))
    accuracy, worst = min((share, index) for index, share in enumerate(per_class) if share is not None)
    return {
        "top1": float(correct.mean()),
        "top1_interval": wilson(int(correct.sum()), len(correct)),
        "top5": float((ranks < 5).mean()) if num_classes >= 6 else None,
        "loss": math.fsum(losses) / len(losses),
        **{average: _averaged(predictions, labels, average) for average in ("macro", "micro", "weighted")},
        "worst_class": WorstClass(worst, accuracy),
        "per_class": per_class,
    }


def _averaged(predictions: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], average: str) -> Averaged:
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(labels, predictions, average=average, zero_division=0)
    return Averaged(float(precision), float(recall), float(f1))


def _agreement(predictions: npt.NDArray[np.int64], reference: npt.NDArray[Any]) -> dict[str, Any]:
    if reference.shape != predictions.shape:
        raise ValueError(f"{len(predictions)} predictions against a reference of shape {reference.shape}")
    if not len(predictions):
        return {}
    same = predictions == reference
    return {"agreement": float(same.mean()), "agreement_interval": wilson(int(same.sum()), len(same))}


def _ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the label, int64 (N,); of equal logits, common after quantization, the first."""
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1])[None] < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(dim=1)


def _check_range(labels: Tensor, num_classes: int) -> None:
    wrong = labels[(labels < -1) | (labels >= num_classes)]
    if wrong.numel():
        problem = f"{int(wrong[0])} is outside 0..{num_classes - 1}"
        raise DataError("labels", problem, "use class indices of the network, or -1 for unknown")


def _join(parts: list[Any], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)
