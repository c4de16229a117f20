"""What a set leaves out, and that a line says so: files of a folder, missing CIFAR files, hidden members of shards."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calibquant.data import ImageSet, UnreadableImageError, batches, open_images
from calibquant.data.files import EXTENSIONS
from calibquant.errors import DataError
from calibquant.recipe import DataRecipe

Save = Callable[..., Path]


def opened(root: Path, caplog: pytest.LogCaptureFixture, **fields: Any) -> tuple[ImageSet, list[str]]:
    """The evaluation images of a recipe, and the warnings of opening them."""
    with caplog.at_level(logging.WARNING, logger="calibquant"):
        images = open_images(DataRecipe.model_validate({"kind": "folder", "root": root} | fields), "evaluation")
    return images, [record.getMessage() for record in caplog.records]


def names(images: ImageSet) -> list[str]:
    return [images.name(i).removeprefix("val/") for i in range(len(images))]


def test_every_suffix_of_the_documented_formats_is_an_image() -> None:
    Image.init()
    documented = {"BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"}
    known = {suffix for suffix, form in Image.registered_extensions().items() if form in documented}
    assert set(EXTENSIONS) == known - {".pfm"}  # floating point, which is refused


@pytest.mark.parametrize("name", ["a.jfif", "a.JFIF", "a.jpe", "a.JPG", "a.Tif", "a.WEBP", "a.dib", "a.PNM", "a.b.jpg"])
def test_images_are_found_whatever_the_case_of_their_suffix(
    tmp_path: Path, save_image: Save, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    save_image(f"val/x/{name}")
    images, lines = opened(tmp_path, caplog)
    assert (names(images), lines) == ([f"x/{name}"], [])
    assert images.image(0).shape == (3, 6, 8)


def test_one_line_counts_what_is_left_out_by_kind(
    tmp_path: Path, save_image: Save, caplog: pytest.LogCaptureFixture
) -> None:
    save_image("val/a/deep/deeper/1.png")
    for name in ("a/list.txt", "a/deep/b.TXT", "a/labels.json", "README", "a/._1.jpg", ".DS_Store", ".git/x.png"):
        (tmp_path / "val" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "val" / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "val/a/pipe.png")
    images, lines = opened(tmp_path, caplog)
    assert names(images) == ["a/deep/deeper/1.png"]
    kinds = "hidden 3, .txt 2, .json 1, pipe or device 1, without suffix 1"
    assert lines == [f"{tmp_path / 'val'}: files left out because they are not images: 8 ({kinds})"]


def test_many_kinds_are_not_all_named(tmp_path: Path, save_image: Save, caplog: pytest.LogCaptureFixture) -> None:
    save_image("val/1.png")
    for k in range(30):
        (tmp_path / f"val/x.{k:03d}").touch()
    _, (line,) = opened(tmp_path, caplog)
    assert "not images: 30 (" in line
    assert line.endswith(" and 22 kinds more)")


def test_links_that_lead_nowhere_or_in_circles_are_unreadable_images(
    tmp_path: Path, save_image: Save, caplog: pytest.LogCaptureFixture
) -> None:
    save_image("val/a/1.png")
    (tmp_path / "val/a/gone.png").symlink_to("/nowhere.png")
    (tmp_path / "val/a/loop.png").symlink_to("loop.png")
    images, lines = opened(tmp_path, caplog, on_error="skip")
    assert (names(images), lines) == (["a/1.png", "a/gone.png", "a/loop.png"], [])
    with pytest.raises(UnreadableImageError, match=r"gone.png: is a link to a file that does not exist; restore that"):
        images.image(1)
    with pytest.raises(UnreadableImageError, match=r"loop.png: cannot be read \(Too many levels of symbolic links\)"):
        images.image(2)
    assert [batch.indices for batch in batches(images, 3)] == [(0,)]
    assert images.skipped == {"val/a/gone.png", "val/a/loop.png"}


def test_links_to_folders_that_are_not_followed_are_counted(
    tmp_path: Path, save_image: Save, caplog: pytest.LogCaptureFixture
) -> None:
    save_image("val/a/1.png")
    save_image("more/2.png")
    for name, target in (("b", "../more"), ("cat", "/gone"), ("self", "."), ("up", ".."), ("o", "o"), ("a/in", "../a")):
        (tmp_path / "val" / name).symlink_to(target)
    images, (line,) = opened(tmp_path, caplog)
    assert (names(images), images.labels().tolist()) == (["a/1.png", "b/2.png"], [0, 1])
    assert line.endswith("not images: 5 (link to a folder 3, broken link cat 1, broken link o 1)")


def test_class_folders_without_images_keep_their_label_and_are_named(
    tmp_path: Path, save_image: Save, caplog: pytest.LogCaptureFixture
) -> None:
    save_image("val/dog/1.png")
    for name in ("cat", "emu/deep"):
        (tmp_path / "val" / name).mkdir(parents=True)
    images, lines = opened(tmp_path, caplog)
    assert (images.classes, images.labels().tolist()) == (["cat", "dog", "emu"], [1])
    assert lines == [f"{tmp_path / 'val'}: folders without images: 2 (cat, emu)"]


def test_a_folder_of_other_files_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for name in ("a.heic", "b.heic", ".c.png"):
        (tmp_path / "val" / name).touch()
    with pytest.raises(DataError, match=r"holds no images, but 3 other files \(.heic 2, hidden 1\); put files there"):
        open_images(DataRecipe(kind="folder", root=tmp_path), "evaluation")


def test_folders_that_cannot_be_listed_are_named(
    tmp_path: Path, save_image: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_image("val/a/1.png")
    save_image("val/b/2.png")
    scan = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"val/b: cannot be read \(Permission denied\); make the folder readable"):
        open_images(DataRecipe(kind="folder", root=tmp_path, on_error="skip"), "evaluation")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "loop"])
@pytest.mark.parametrize("kind", ["folder", "shards", "csv"])
def test_paths_that_no_file_can_have_are_one_line(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for fields in ({"root": tmp_path, "evaluation": name}, {"root": tmp_path / name, "evaluation": "x"}):
        with pytest.raises(DataError, match=r"there is no such|cannot be read"):
            open_images(DataRecipe.model_validate({"kind": kind} | fields), "evaluation")


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_pipes_and_devices_are_not_opened(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.png").symlink_to(target)
    (tmp_path / "list.csv").write_text(f"file\na.png\n{target}\n")
    images = open_images(DataRecipe(kind="csv", root=tmp_path, evaluation="list.csv"), "evaluation")
    for i in range(2):
        with pytest.raises(UnreadableImageError, match=r"cannot be read \(it is not a regular file\); .*data.on_error"):
            images.image(i)
    for fields in ({"kind": "csv", "evaluation": target}, {"kind": "folder", "classes": target}):
        with pytest.raises(DataError, match=r"cannot be read \(it is not a regular file\)"):
            open_images(DataRecipe.model_validate({"root": tmp_path} | fields), "evaluation")


def test_files_larger_than_any_image_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(1 << 40)  # takes no space
    images = open_images(DataRecipe(kind="folder", root=tmp_path, evaluation="."), "evaluation")
    with pytest.raises(
        UnreadableImageError, match=r"a.png: cannot be read \(it has 1,099,511,627,776 bytes, more than"
    ):
        images.image(0)


def test_missing_files_of_cifar10_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for k in (1, 4):
        (tmp_path / f"data_batch_{k}.bin").write_bytes(bytes(3073))
    with caplog.at_level(logging.WARNING, logger="calibquant"):
        images = open_images(DataRecipe(kind="cifar10", root=tmp_path), "calibration")
    missing = "data_batch_2, data_batch_3, data_batch_5"
    assert [r.getMessage() for r in caplog.records] == [f"{tmp_path}: missing files of the split train: {missing}"]
    assert len(images) == 2


def test_hidden_members_and_empty_shards_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, members in (("a.tar", ["1.png", "._1.png", "d/.x"]), ("b.tar", [])):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member in members:
                tar.addfile(tarfile.TarInfo(member), io.BytesIO())
    images, lines = opened(tmp_path, caplog, kind="shards", evaluation="{a,b}.tar")
    assert names(images) == ["a.tar#1.png"]
    where = tmp_path / "{a,b}.tar"
    assert lines == [f"{where}: hidden members left out: 2", f"{where}: shards without images: 1 (b.tar)"]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (["a.png"] * 6 + ["b.png"], "1 (a.png 6 times)"),
        (["a.png", "b.png", "c.png", "b.png", "a.png", "b.png"], "2 (b.png 3 times)"),
        (["a.png", "b.png"], None),
    ],
)
def test_images_listed_more_than_once_are_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: list[str], line: str | None
) -> None:
    (tmp_path / "list.csv").write_text("\n".join(["file", *rows]))
    images, lines = opened(tmp_path, caplog, kind="csv", evaluation="list.csv")
    told = f"{tmp_path / 'list.csv'}: images listed more than once: {line}; each row counts as an image"
    assert (len(images), lines) == (len(rows), [told] if line else [])
