"""The manifest: which images calibrate, why these, and the hashes that make the choice checkable."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from calibquant.data.imageset import ImageSet, check_indices
from calibquant.data.lists import parse_digest, parse_label, read_rows
from calibquant.errors import DataError


@dataclass(frozen=True)
class ManifestRow:
    """One calibration image.

    Attributes:
        path: the image's name in its set: a path relative to the root, or `file#record`.
        sha256: hex digest, as `ImageSet.sha256` gives it.
        label: class index, None when unknown.
        score: what the strategy gave this image, None for strategies without scores.
        strategy: how the images were chosen, e.g. "random".
        seed: of the draw.
    """

    path: str
    sha256: str
    label: int | None
    score: float | None
    strategy: str
    seed: int


@dataclass(frozen=True)
class Manifest:
    """Calibration images, in the order they were drawn."""

    rows: tuple[ManifestRow, ...]


COLUMNS = tuple(field.name for field in fields(ManifestRow))


def draw(images_count: int, count: int, order: Literal["random", "first"], seed: int) -> list[int]:
    """Choose `count` of `images_count` images without replacement, in drawn order.

    Raises:
        DataError: more images are asked for than there are.

    Example:
        >>> draw(10, 3, "first", seed=0)
        [0, 1, 2]
    """
    if not 0 <= count <= images_count:
        problem = f"{count} images are asked for but the set has {images_count}"
        raise DataError("calibration.count", problem, f"use a count of at most {images_count}, or more images")
    if order == "first":
        return list(range(count))
    return [int(i) for i in np.random.default_rng(seed).permutation(images_count)[:count]]


def check_calibration_set(n: int) -> None:
    """Check that `n` images are enough to calibrate with.

    Raises:
        DataError: there are fewer than 2.
    """
    if n < 2:
        problem = "the calibration set is empty" if n == 0 else "the calibration set is a single image"
        raise DataError("calibration.count", problem, "give at least 2 images, better 256 or more")


def make_manifest(
    images: ImageSet, indices: Sequence[int], strategy: str, seed: int, scores: Sequence[float] | None = None
) -> Manifest:
    """The manifest of the chosen images; reads and hashes each once.

    Args:
        images: the set.
        indices: the chosen images, in order.
        strategy: how they were chosen.
        seed: of the draw.
        scores: one for each chosen image, or None.

    Raises:
        DataError: an index is outside the set, or a file cannot be read.
    """
    chosen = check_indices(indices, len(images))
    marks: Sequence[float | None] = [None] * len(chosen) if scores is None else [float(s) for s in scores]
    return Manifest(
        tuple(
            ManifestRow(images.name(i), images.sha256(i), images.label(i), score, strategy, seed)
            for i, score in zip(chosen, marks, strict=True)
        )
    )


def manifest_csv(manifest: Manifest) -> str:
    """The manifest as CSV text, one header line and one line an image; unknown labels and scores are empty.

    Example:
        >>> print(manifest_csv(Manifest(())), end="")
        path,sha256,label,score,strategy,seed
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in manifest.rows)
    return text.getvalue()


def read_manifest(path: str | Path) -> Manifest:
    """Read what `manifest_csv` wrote.

    Raises:
        DataError: the file cannot be read, has no rows, lacks a column, or a field is not valid; names file and line.
    """
    path = Path(path)
    rows = read_rows(path)
    if not rows:
        raise DataError(
            path, "is an empty manifest", f"it must hold the columns {', '.join(COLUMNS)} and a row an image"
        )
    missing = [column for column in COLUMNS if column not in rows[0][1]]
    if missing:
        mend = f"a manifest has the columns {', '.join(COLUMNS)}"
        raise DataError(path, f"lacks the column {missing[0]}", mend)
    return Manifest(tuple(_parse_row(row, f"{path}, line {line}") for line, row in rows))


def _parse_row(row: dict[str, str], where: str) -> ManifestRow:
    if not row["path"]:
        raise DataError(where, "names no image", "fill the column path")
    return ManifestRow(
        row["path"],
        parse_digest(row["sha256"], where),
        parse_label(row["label"], where),
        _parse_score(row["score"], where),
        row["strategy"],
        _parse_seed(row["seed"], where),
    )


def _parse_score(text: str, where: str) -> float | None:
    if not text.strip():
        return None
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise DataError(where, f"score '{text}' is not a finite number", "write a number, or leave it empty")
    return score


def _parse_seed(text: str, where: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit()):
        raise DataError(where, f"seed '{text}' is not a whole number from 0", "write the seed of the draw")
    return int(text)
