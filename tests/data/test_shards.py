"""Tar shards against what was packed: order, labels, bytes; the patterns; and every way a shard can be refused."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calibquant.data import batches, open_images
from calibquant.data.shards import ShardImages, expand
from calibquant.errors import DataError
from calibquant.recipe import DataRecipe

Members = list[tuple[str, bytes]]


def png(seed: int, ending: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "jpeg"}.get(ending, ending))
    return file.getvalue()


def pack(path: Path, members: Members, form: int = tarfile.DEFAULT_FORMAT, mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shards(root: Path, pattern: str = "a.tar", **fields: Any) -> ShardImages:
    recipe = DataRecipe.model_validate({"kind": "shards", "root": root, "evaluation": pattern} | fields)
    images = open_images(recipe, "evaluation")
    assert isinstance(images, ShardImages)
    return images


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_what_was_packed(tmp_path: Path, form: int) -> None:
    deep = "d" * 90 + "/" + "e" * 60 + "/7"  # longer than a plain header's name
    encoded = [png(0), png(1, "jpg"), png(2, "webp"), png(3)]
    pack(tmp_path / "a.tar", [
        ("b.png", encoded[0]), ("b.cls", b"12\n"), ("a.JPG", encoded[1]), ("a.json", b'{"label": 3, "w": 8}'),
        ("a.cls", b"4"), (f"{deep}.json", b'{"caption": "x"}'), (f"{deep}.webp", encoded[2]), ("c.png", encoded[3]),
        ("c.txt", b"a caption"), ("._c.png", b"macOS"),
    ], form)  # fmt: skip
    images = shards(tmp_path)
    assert [images.name(i) for i in range(4)] == ["a.tar#b.png", "a.tar#a.JPG", f"a.tar#{deep}.webp", "a.tar#c.png"]
    assert images.labels().tolist() == [12, 4, -1, -1]
    assert [images.label(i) for i in range(4)] == [12, 4, None, None]
    for i, data in enumerate(encoded):
        assert images.read(i) == data
        assert images.sha256(i) == hashlib.sha256(data).hexdigest()
    assert np.asarray(images.decoded(0)).tolist() == np.asarray(Image.open(io.BytesIO(encoded[0]))).tolist()


def test_shards_equal_the_same_images_as_files(tmp_path: Path) -> None:
    names = [f"{k // 4}/{k:03d}" for k in range(20)]
    for k, name in enumerate(names):
        (tmp_path / f"val/{name}.png").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"val/{name}.png").write_bytes(png(k))
    for s in range(3):
        chosen = [(k, name) for k, name in enumerate(names) if s * 8 <= k < s * 8 + 8]
        pack(
            tmp_path / f"x-{s}.tar",
            [m for k, n in chosen for m in ((f"{n}.png", png(k)), (f"{n}.cls", n[:1].encode()))],
        )
    files = open_images(DataRecipe(kind="folder", root=tmp_path), "evaluation")
    for pattern in ("x-{0..2}.tar", "x-*.tar", "x-{0,1,2}.tar", "x-[0-9].tar", str(tmp_path / "x-?.tar")):
        images = shards(tmp_path, pattern)
        assert images.labels().tolist() == files.labels().tolist()
        assert [images.sha256(i) for i in range(20)] == [files.sha256(i) for i in range(20)]
        for ours, theirs in zip(batches(images, 7), batches(files, 7), strict=True):
            assert torch.equal(ours.images, theirs.images)
    assert images.name(19) == "x-2.tar#4/019.png"
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.image(11), files.image(11))


def test_links_and_folders_inside(tmp_path: Path) -> None:
    (tmp_path / "s/n1").mkdir(parents=True)
    (tmp_path / "s/n1/a.png").write_bytes(png(0))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "s", arcname=".")
    assert shards(tmp_path).name(0) == "a.tar#./n1/a.png"
    (tmp_path / "s/n1/b.png").symlink_to("a.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "s", arcname=".")
    with pytest.raises(DataError, match=r"a.tar#./n1/b.png: is a link or special file; pack the files themselves"):
        shards(tmp_path)


def test_labels_may_name_classes(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("n01440764 tench\nn01443537 goldfish\n")
    pack(
        tmp_path / "a.tar", [("a.png", b""), ("a.cls", b"n01443537"), ("b.png", b""), ("b.json", b'{"label": "Tench"}')]
    )
    images = shards(tmp_path, classes="classes.txt")
    assert images.labels().tolist() == [1, 0]
    assert images.classes == ["tench", "goldfish"]


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("a.tar", ["a.tar"]),
        ("a{0..2}.tar", ["a0.tar", "a1.tar", "a2.tar"]),
        ("a{008..011}.tar", ["a008.tar", "a009.tar", "a010.tar", "a011.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{b,a}{1..2}", ["b1", "b2", "a1", "a2"]),
        ("{a,b{0..1}}", ["a", "b0", "a", "b1"]),
    ],
)
def test_braces(pattern: str, texts: list[str]) -> None:
    assert list(expand(pattern)) == texts


@pytest.mark.parametrize("pattern", ["a{3..1}", "a{}", "a{x}", "a{0...2}"])
def test_braces_that_say_nothing_are_refused(pattern: str) -> None:
    with pytest.raises(DataError, match="is no rising range and no list; write a range such as"):
        list(expand(pattern))


BAD: dict[str, tuple[Members, str]] = {
    "no image": ([("a.cls", b"1")], r"a.tar#a.cls: belongs to a sample without image; a sample is KEY.jpg"),
    "two images": ([("a.png", b"x"), ("a.jpg", b"y")], r"a.tar#a.jpg: a.png belongs to the same sample"),
    "two labels": ([("a.png", b"x"), ("a.cls", b"1"), ("a.cls", b"2")], r"a.tar#a.cls: a.cls belongs to the same"),
    "no number": ([("a.png", b"x"), ("a.cls", b"cat")], r"a.tar#a.cls: label 'cat' is not a class index; write a"),
    "negative": ([("a.png", b"x"), ("a.cls", b"-1")], "label '-1' is not a class index"),
    "no JSON": ([("a.png", b"x"), ("a.json", b"{")], r"a.tar#a.json: is not valid JSON"),
    "a float": ([("a.png", b"x"), ("a.json", b'{"label": 1.5}')], r"a.json: label 1.5 is not a class index"),
    "true": ([("a.png", b"x"), ("a.json", b'{"label": true}')], "label True is not a class index"),
    "nothing": ([], r"a.tar: holds no images; a sample is KEY.jpg"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_named(tmp_path: Path, name: str) -> None:
    members, message = BAD[name]
    pack(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        shards(tmp_path)


GOOD: Members = [(f"{k}.{ending}", png(k) if ending == "png" else b"1") for k in range(8) for ending in ("png", "cls")]


@pytest.mark.parametrize("size", [0, 100, 512, 700, 512 * 3, 512 * 3 + 200, 512 * 8, 512 * 8 + 1])
def test_truncated_shards_are_refused_wherever_they_end(tmp_path: Path, size: int) -> None:
    path = pack(tmp_path / "a.tar", GOOD)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"a.tar: is truncated or (no tar file|damaged at byte [\d,]+).*; download"):
        shards(tmp_path)


def test_a_damaged_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", GOOD)
    with tarfile.open(path) as tar:
        place = tar.getmembers()[6].offset
    data = bytearray(path.read_bytes())
    data[place + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"a.tar: is truncated or damaged at byte {place:,}"):
        shards(tmp_path)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_are_refused(tmp_path: Path, mode: str) -> None:
    pack(tmp_path / "a.tar", GOOD, mode=mode)
    with pytest.raises(DataError, match=r"a.tar: is compressed, .*; decompress it"):
        shards(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("b.tar", "b.tar: there is no such file; correct"),
        ("{a,b}.tar", "b.tar: there is no such file"),
        ("b-*.tar", r"b-\*.tar: matches no file"),
        ("{a,a}.tar", "names the file a.tar twice"),
        (None, "data.evaluation: names no file; set it to tar files"),
    ],
)
def test_patterns_that_name_nothing(tmp_path: Path, pattern: str, message: str) -> None:
    pack(tmp_path / "a.tar", GOOD)
    with pytest.raises(DataError, match=message):
        shards(tmp_path, pattern)


def test_corrupt_images_in_shards_fail_or_are_skipped(tmp_path: Path) -> None:
    members = [("0.png", png(0)), ("1.png", b""), ("2.png", png(2)[:50]), ("3.png", png(3))]
    pack(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=r"a.tar#1.png: is empty; replace or remove it, or set data.on_error to skip"):
        list(batches(shards(tmp_path), 4))
    images = shards(tmp_path, on_error="skip")
    assert [batch.indices for batch in batches(images, 4)] == [(0, 3)]
    assert images.skipped == {"a.tar#1.png", "a.tar#2.png"}


def test_a_shard_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", GOOD)
    images = shards(tmp_path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"a.tar#5.png: is missing: the shard became shorter"):
        images.image(5)
    path.unlink()
    with pytest.raises(DataError, match=r"a.tar#5.png: cannot be read"):
        images.image(5)
