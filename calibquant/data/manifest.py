"""The manifest: which images calibrate, why these, and the hashes that make the choice checkable."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from calibquant.data.imageset import ImageSet, check_indices
from calibquant.data.lists import parse_digest, parse_label, read_rows
from calibquant.errors import DataError
from calibquant.reading import parse_whole


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


def check_calibration_set(n: int) -> None:
    """Check that `n` images are enough to calibrate with.

    Raises:
        DataError: there are fewer than 2.
    """
    if n < 2:
        problem = "the calibration set is empty" if n == 0 else "the calibration set is a single image"
        raise DataError("calibration.count", problem, "give at least 2 images, better 256 or more")


def make_manifest(
    images: ImageSet, indices: Sequence[int], strategy: Sequence[str], seed: int, scores: Sequence[float] | None = None
) -> Manifest:
    """The manifest of the chosen images; reads and hashes each once.

    Args:
        images: the set.
        indices: the chosen images, in order.
        strategy: how each was chosen.
        seed: of the draw.
        scores: one for each chosen image, NaN where it has none, or None.

    Raises:
        DataError: an index is outside the set, or a file cannot be read.
    """
    chosen = check_indices(indices, len(images))
    marks = [None] * len(chosen) if scores is None else [None if math.isnan(s) else float(s) for s in scores]
    return Manifest(
        tuple(
            ManifestRow(images.name(i), images.sha256(i), images.label(i), score, name, seed)
            for i, name, score in zip(chosen, strategy, marks, strict=True)
        )
    )


def find_images(images: ImageSet, rows: Sequence[ManifestRow]) -> list[int]:
    """Where the images of a manifest stand in their set; an image may come several times.

    Raises:
        DataError: one is not there, or its hash is another.
    """
    wanted = {row.path: row.sha256 for row in rows}
    found = {name: i for i in range(len(images)) if (name := images.name(i)) in wanted}
    for name, digest in wanted.items():
        if name not in found or images.sha256(found[name]) != digest:
            problem = "is not there" if name not in found else "has changed (its hash is not the manifest's)"
            raise DataError(name, f"this calibration image {problem}", "give the manifest's images with data.root=…")
    return [found[row.path] for row in rows]


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
    try:
        return parse_whole(text)
    except ValueError as error:
        raise DataError(where, f"seed is too large ({error})", "write the seed of the draw") from None
