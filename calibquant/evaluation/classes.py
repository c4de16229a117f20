"""What a confusion matrix says of single classes. Rows are labels, columns predictions."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Confusion = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassScores:
    """One class; shares are fractions of 1, and None where there is nothing to divide by.

    Args:
        index: the class.
        name: its name, or its index in words.
        images: how many are labelled with it.
        predicted: how many are predicted as it.
        accuracy: share of its images that are predicted as it, which is its recall.
        precision: share of what is predicted as it that is labelled with it.
        f1: harmonic mean of the two, 2 hits / (images + predicted).
    """

    index: int
    name: str
    images: int
    predicted: int
    accuracy: float | None
    precision: float | None
    f1: float


@dataclass(frozen=True)
class Confused:
    """A label and another class that its images are taken for.

    Args:
        label, prediction: names of the classes.
        images: how many.
        share: of the label's images, as a fraction of 1.
    """

    label: str
    prediction: str
    images: int
    share: float


def class_names(names: Sequence[str] | None, classes: int) -> list[str]:
    """A name for each class: the set's, and the index where the set has none.

    Example:
        >>> class_names(["cat", "dog"], 3)
        ['cat', 'dog', '2']
    """
    known = list(names or [])[:classes]
    return [*known, *(str(index) for index in range(len(known), classes))]


def class_scores(confusion: Confusion, names: Sequence[str]) -> list[ClassScores]:
    """The classes that are labelled or predicted, in their order.

    Example:
        >>> [row.f1 for row in class_scores(np.array([[2, 0], [2, 4]]), ["cat", "dog"])]
        [0.6666666666666666, 0.8]
    """
    hits, images, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return [
        ClassScores(
            index=i,
            name=names[i],
            images=int(images[i]),
            predicted=int(predicted[i]),
            accuracy=float(hits[i] / images[i]) if images[i] else None,
            precision=float(hits[i] / predicted[i]) if predicted[i] else None,
            f1=float(2 * hits[i] / (images[i] + predicted[i])),
        )
        for i in np.flatnonzero(images + predicted).tolist()
    ]


def most_confused(confusion: Confusion, names: Sequence[str], count: int = 10) -> list[Confused]:
    """The pairs of label and wrong prediction that most images have; of equals the first ones.

    Example:
        >>> most_confused(np.array([[5, 1], [2, 2]]), ["cat", "dog"])[0]
        Confused(label='dog', prediction='cat', images=2, share=0.5)
    """
    wrong = confusion * (1 - np.eye(len(confusion), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [divmod(int(cell), len(confusion)) for cell in order]
    return [
        Confused(names[i], names[j], int(wrong[i, j]), float(wrong[i, j] / confusion[i].sum()))
        for i, j in pairs
        if wrong[i, j]
    ]


def confusion_csv(confusion: Confusion, names: Sequence[str]) -> str:
    """The matrix as CSV, a header of predicted classes above and the label first in each row.

    Example:
        >>> print(confusion_csv(np.array([[5, 1], [2, 2]]), ["cat", "dog"]), end="")
        label,cat,dog
        cat,5,1
        dog,2,2
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", *names])
    writer.writerows([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))
    return text.getvalue()
