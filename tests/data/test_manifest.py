"""The manifest that records calibration images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from calibquant.data import (
    Manifest,
    ManifestRow,
    TensorImages,
    check_calibration_set,
    find_images,
    make_manifest,
    manifest_csv,
    read_manifest,
)
from calibquant.errors import DataError

DIGEST = "0123456789abcdef" * 4
HEADER = "path,sha256,label,score,strategy,seed\n"


@pytest.mark.parametrize(("n", "message"), [(0, "is empty"), (1, "is a single image")])
def test_too_few_calibration_images(n: int, message: str) -> None:
    with pytest.raises(DataError, match=f"calibration.count: the calibration set {message}; give at least 2"):
        check_calibration_set(n)
    check_calibration_set(2)


def test_manifest_of_a_set() -> None:
    images = TensorImages(torch.rand(4, 3, 2, 2), [5, -1, 7, 8])
    manifest = make_manifest(images, [2, 1], ["hard", "herding"], 9, scores=[1 / 3, math.nan])
    assert manifest.rows == (
        ManifestRow("tensor#2", images.sha256(2), 7, 1 / 3, "hard", 9),
        ManifestRow("tensor#1", images.sha256(1), None, None, "herding", 9),
    )
    assert make_manifest(images, [0], ["random"], 1).rows[0].score is None
    with pytest.raises(DataError, match="indices: 4 is outside"):
        make_manifest(images, [4], ["random"], 1)


def test_the_images_of_a_manifest_are_found_again_and_checked() -> None:
    images = TensorImages(torch.rand(4, 3, 2, 2))
    rows = make_manifest(images, [3, 0, 3], ["random"] * 3, 1).rows
    assert find_images(images, rows) == [3, 0, 3]
    with pytest.raises(DataError, match=r"tensor#3: this calibration image has changed .*; give the manifest's images"):
        find_images(TensorImages(torch.rand(4, 3, 2, 2)), rows)
    with pytest.raises(DataError, match="tensor#3: this calibration image is not there"):
        find_images(images.subset([0, 1]), rows[:1])


def test_csv_text_is_as_documented() -> None:
    rows = (ManifestRow("a,b.png", DIGEST, 3, 0.5, "random", 1), ManifestRow("c.png", DIGEST, None, None, "first", 0))
    expected = HEADER + f'"a,b.png",{DIGEST},3,0.5,random,1\nc.png,{DIGEST},,,first,0\n'
    assert manifest_csv(Manifest(rows)) == expected


@pytest.mark.parametrize("path", ["a.png", "dir/ä ß.jpg", " lead.png", 'quo"te,.png', "line\nbreak.png", "data.bin#17"])
@pytest.mark.parametrize("score", [None, 0.1, -1e-300, 1 / 3])
def test_reading_gives_back_what_was_written(tmp_path: Path, path: str, score: float | None) -> None:
    manifest = Manifest((ManifestRow(path, DIGEST, 12, score, "sequential", 2**40),) * 2)
    (tmp_path / "manifest.csv").write_text(manifest_csv(manifest), encoding="utf-8", newline="")
    assert read_manifest(tmp_path / "manifest.csv") == manifest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "manifest.csv: is an empty manifest"),
        (HEADER, "manifest.csv: is an empty manifest"),
        ("path,label\na.png,1\n", "manifest.csv: lacks the column sha256"),
        (HEADER + f",{DIGEST},1,,random,0\n", "line 2: names no image"),
        (HEADER + "a.png,abc,1,,random,0\n", "line 2: 'abc' is not a sha256"),
        (HEADER + f"a.png,{'g' * 64},1,,random,0\n", "line 2: 'g+' is not a sha256"),
        (HEADER + f"a.png,{DIGEST},x,,random,0\n", "line 2: label 'x' is not"),
        (HEADER + f"a.png,{DIGEST},1,much,random,0\n", "line 2: score 'much' is not a finite number"),
        (HEADER + f"a.png,{DIGEST},1,nan,random,0\n", "line 2: score 'nan' is not a finite number"),
        (HEADER + f"a.png,{DIGEST},1,,random,\n", "line 2: seed '' is not"),
        (HEADER + f"a.png,{DIGEST},1,,random,0\nb.png\n", "line 3: has another number of fields"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path / "manifest.csv")


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest.csv: cannot be read"):
        read_manifest(str(tmp_path / "manifest.csv"))
