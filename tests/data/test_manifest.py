"""Drawing calibration images and the manifest that records them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calibquant.data import (
    Manifest,
    ManifestRow,
    TensorImages,
    check_calibration_set,
    draw,
    make_manifest,
    manifest_csv,
    read_manifest,
)
from calibquant.errors import DataError

DIGEST = "0123456789abcdef" * 4
HEADER = "path,sha256,label,score,strategy,seed\n"


@pytest.mark.parametrize(("available", "count"), [(10, 10), (1000, 7), (5, 0), (50_000, 1024)])
def test_random_draw_is_seeded_and_without_replacement(available: int, count: int) -> None:
    drawn = draw(available, count, "random", seed=3)
    assert len(drawn) == len(set(drawn)) == count
    assert all(0 <= i < available for i in drawn)
    assert drawn == draw(available, count, "random", seed=3)
    if 1 < count < available:
        assert drawn != draw(available, count, "random", seed=4)
        assert drawn != sorted(drawn)


def test_a_longer_draw_begins_with_the_shorter() -> None:
    assert draw(100, 20, "random", seed=1)[:5] == draw(100, 5, "random", seed=1)


def test_draw_reaches_every_image_equally() -> None:
    counts = np.zeros(10)
    for seed in range(2000):
        counts[draw(10, 3, "random", seed)] += 1
    # Each image is drawn with p = 0.3: mean 600, standard deviation sqrt(2000 * 0.3 * 0.7) = 20.5.
    assert np.abs(counts - 600).max() < 5 * 20.5


def test_first_takes_the_first() -> None:
    assert draw(10, 4, "first", seed=99) == [0, 1, 2, 3]


@pytest.mark.parametrize("order", ["random", "first"])
def test_drawing_too_many_states_both_numbers(order: str) -> None:
    with pytest.raises(DataError, match="1024 images are asked for but the set has 650"):
        draw(650, 1024, order, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "message"), [(0, "is empty"), (1, "is a single image")])
def test_too_few_calibration_images(n: int, message: str) -> None:
    with pytest.raises(DataError, match=f"calibration.count: the calibration set {message}; give at least 2"):
        check_calibration_set(n)
    check_calibration_set(2)


def test_manifest_of_a_set() -> None:
    images = TensorImages(torch.rand(4, 3, 2, 2), [5, -1, 7, 8])
    manifest = make_manifest(images, [2, 1], "herding", 9, scores=[0.1, 1 / 3])
    assert manifest.rows == (
        ManifestRow("tensor#2", images.sha256(2), 7, 0.1, "herding", 9),
        ManifestRow("tensor#1", images.sha256(1), None, 1 / 3, "herding", 9),
    )
    assert make_manifest(images, [0], "random", 1).rows[0].score is None
    with pytest.raises(DataError, match="indices: 4 is outside"):
        make_manifest(images, [4], "random", 1)


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
