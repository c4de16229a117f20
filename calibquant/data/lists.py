"""Lists of image files as CSV: `file,label`, a manifest of calibration images, or Kaggle's ImageNet lists."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from calibquant.data.classes import Classes
from calibquant.data.encoded import Strings
from calibquant.data.files import FileImages, relative
from calibquant.data.imageset import OnError
from calibquant.errors import DataError
from calibquant.reading import MOST_LIST, read_regular
from calibquant.recipe import Preprocess

KAGGLE = "ImageId"
KAGGLE_FOLDER = Path("ILSVRC", "Data", "CLS-LOC")


def open_csv(
    root: Path, name: str, settings: Preprocess, on_error: OnError = "fail", classes: Classes | None = None
) -> FileImages:
    """Open a list of images.

    A CSV file with the header `file,label` or `path,…,label`; the label may be missing or empty. With `classes` it may
    also be a class's id or name. A column `sha256`, which manifests have, is checked whenever a file is read. Other
    columns are ignored. Paths are relative to the root, or absolute. Kaggle's LOC_val_solution.csv and
    LOC_train_solution.csv (`ImageId,PredictionString`) are taken too; they need `classes`.

    Raises:
        DataError: the list cannot be read, lacks its file column, holds no rows, or a row is not valid; names the line.
    """
    path = root / name
    rows = read_rows(path)
    header = rows[0][1] if rows else {}
    key = next((column for column in ("file", "path", KAGGLE) if column in header), None)
    if key is None:
        raise DataError(path, "holds no rows under a header with the column file", "write file,label as the first line")
    if key == KAGGLE:
        return _open_kaggle(root, path, rows, settings, on_error, classes)
    names, labels, digests = [], [], []
    for line, row in rows:
        where = f"{path}, line {line}"
        if not row[key]:
            raise DataError(where, "names no file", f"fill the column {key}")
        names.append(relative(root, root / row[key]))
        labels.append(parse_label(row.get("label", ""), where, classes))
        digests.append(parse_digest(row["sha256"], where) if row.get("sha256", "").strip() else "")
    checked = Strings(digests) if any(digests) else None
    shown = list(classes.names) if classes else None
    images = FileImages(root, Strings(names), labels, settings, shown, on_error, checked)
    images.remarks = tuple(f"{path}: {remark}" for remark in repeated(names))
    return images


def repeated(keys: Sequence[str], shown: Sequence[str] | None = None) -> list[str]:
    """A remark on the images that a list names more than once, or nothing if there are none.

    Args:
        keys: what tells images apart, one for each row.
        shown: what a person calls them; None for `keys` themselves.

    Example:
        >>> repeated(["a.png", "b.png", "a.png"])
        ['images listed more than once: 1 (a.png 2 times); each row counts as an image']
    """
    several = [(key, count) for key, count in Counter(keys).most_common() if count > 1]
    if not several:
        return []
    key, count = several[0]
    most = f"{(shown or keys)[keys.index(key)]} {count:,} times"
    return [f"images listed more than once: {len(several):,} ({most}); each row counts as an image"]


def _open_kaggle(
    root: Path,
    path: Path,
    rows: list[tuple[int, dict[str, str]]],
    settings: Preprocess,
    on_error: OnError,
    classes: Classes | None,
) -> FileImages:
    """A list of Kaggle's ImageNet challenge: image names without folder and ending; the label leads the boxes.

    The images lie where Kaggle's archive has them below the root, train/<WordNet id>/ and val/, or directly in it.
    """
    if classes is None:
        mend = "set data.classes to LOC_synset_mapping.txt"
        raise DataError(path, "labels images by WordNet id, and no classes are given", mend)
    unpacked, names, labels = (root / KAGGLE_FOLDER).is_dir(), [], []
    for line, row in rows:
        where, image = f"{path}, line {line}", row[KAGGLE].strip()
        if not image:
            raise DataError(where, "names no image", f"fill the column {KAGGLE}")
        folder = Path("val") if image.startswith("ILSVRC2012_val_") else Path("train", image.partition("_")[0])
        names.append(((KAGGLE_FOLDER / folder if unpacked else Path()) / f"{image}.JPEG").as_posix())
        first = row.get("PredictionString", "").split()[:1]
        labels.append(parse_label(first[0] if first else "", where, classes))
    images = FileImages(root, Strings(names), labels, settings, list(classes.names), on_error)
    images.remarks = tuple(f"{path}: {remark}" for remark in repeated(names))
    return images


def parse_label(text: str, where: str, classes: Classes | None = None) -> int | None:
    """A written label: a whole number from 0, with `classes` also a class's id or name; None for an empty field.

    Raises:
        DataError: it is none of these.
    """
    text = text.strip()
    if not text:
        return None
    if text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    if classes is not None:
        return classes.index(text, where)
    raise DataError(where, f"label '{text[:40]}' is not a class index", "write a whole number from 0")


def parse_digest(text: str, where: str) -> str:
    """A sha256 in hexadecimal digits.

    Raises:
        DataError: it is none.
    """
    digest = text.strip().lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise DataError(where, f"'{text[:20]}' is not a sha256", "it has 64 hexadecimal digits")
    return digest


def _check_nul(path: Path, text: str) -> None:
    """Refuse NUL bytes, which no path holds and which csv refuses or takes by Python's version."""
    place = text.find("\0")
    if place >= 0:
        where = f"{path}, line {text.count(chr(10), 0, place) + 1}"
        raise DataError(where, "holds a NUL byte", "save the list as CSV in UTF-8, not UTF-16, and take the byte out")


def read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with a header: each with the number of its last line.

    Raises:
        DataError: the file cannot be read, or a row has more or fewer fields than the header.
    """
    try:
        text = read_regular(path, MOST_LIST, links=True).decode("utf-8-sig")
        _check_nul(path, text)
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "give the path of a CSV file") from None
    except (UnicodeDecodeError, csv.Error):
        raise DataError(path, "is not a CSV file in UTF-8", "save it as CSV, UTF-8") from None
    for line, row in rows:
        if None in row or None in row.values():
            problem = "has another number of fields than the header"
            raise DataError(f"{path}, line {line}", problem, "quote fields that hold commas")
    return [(line, {key.strip(): value for key, value in row.items()}) for line, row in rows]
