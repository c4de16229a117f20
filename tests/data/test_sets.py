"""Digits, folders, CSV lists, tensors and subsets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibquant.data import (
    TensorImages,
    UnreadableImageError,
    batches,
    check_labels,
    make_manifest,
    manifest_csv,
    open_images,
)
from calibquant.errors import DataError
from calibquant.recipe import DataRecipe, Preprocess

Save = Callable[..., Path]
GREY = Preprocess(mean=(0.0,), std=(1.0,))


def test_digits_are_split_into_1200_and_597_without_overlap() -> None:
    recipe = DataRecipe(kind="digits", preprocess=GREY)
    train, test = open_images(recipe, "calibration"), open_images(recipe, "evaluation")
    names = {s.name(i) for s in (train, test) for i in range(len(s))}
    assert (len(train), len(test), len(names)) == (1200, 597, 1797)
    assert {train.name(i) for i in range(1200)} == {open_images(recipe, "calibration").name(i) for i in range(1200)}
    assert set(train.labels().tolist()) == set(test.labels().tolist()) == set(range(10))


def test_digits_spread_16_grey_steps_over_the_bytes() -> None:
    from sklearn.datasets import load_digits

    images = open_images(DataRecipe(kind="digits", preprocess=GREY), "evaluation")
    raw = load_digits()
    for i in (0, 100, 596):
        original = int(images.name(i).split("#")[1])
        expected = np.round(raw.images[original] * 255 / 16) / 255
        np.testing.assert_allclose(images.image(i)[0].numpy(), expected, atol=1e-6)
        assert images.label(i) == raw.target[original]
    assert max(float(images.image(i).max()) for i in range(50)) == 1.0


def test_digits_are_resized() -> None:
    settings = GREY.model_copy(update={"resize": 16})
    images = open_images(DataRecipe(kind="digits", calibration="test", preprocess=settings), "calibration")
    assert len(images) == 597
    assert images.image(0).shape == (1, 16, 16)
    assert images.sha256(0) != images.sha256(1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "digits"}, "data.preprocess.mean: has length 3 but these are grey images"),
        ({"kind": "digits", "preprocess": GREY, "calibration": "trian"}, "data.calibration: .*did you mean 'train'"),
        ({"kind": "folder"}, "data.root: is not given, but folder needs it"),
        ({"kind": "cifar10", "root": "missing"}, "data.root, missing: there is no such folder"),
        ({"kind": "csv", "root": "."}, "data.calibration: names no file"),
    ],
)
def test_recipes_that_cannot_be_opened_name_their_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_images(DataRecipe(**fields), "calibration")


def folder(root: Path, **fields: Any) -> DataRecipe:
    return DataRecipe(kind="folder", root=root, **fields)


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path: Path, save_image: Save) -> None:
    names = ["dog/b.PNG", "dog/a.jpg", "cat/z.JPEG", "bird/deep/x.webp", "dog/c.bmp"]
    for seed, name in enumerate(names):
        save_image(f"train/{name}", seed=seed)
    (tmp_path / "train/dog/notes.txt").write_text("no image")
    (tmp_path / "train/dog/._a.jpg").write_bytes(b"resource fork")
    (tmp_path / "train/.cache").mkdir()
    images = open_images(folder(tmp_path), "calibration")
    assert images.classes == ["bird", "cat", "dog"]
    expected = ["bird/deep/x.webp", "cat/z.JPEG", "dog/a.jpg", "dog/b.PNG", "dog/c.bmp"]
    assert [images.name(i) for i in range(5)] == [f"train/{name}" for name in expected]
    assert images.labels().tolist() == [images.label(i) for i in range(5)] == [0, 1, 2, 2, 2]
    assert images.sha256(2) == hashlib.sha256((tmp_path / "train/dog/a.jpg").read_bytes()).hexdigest()
    assert images.image(3).shape == (3, 6, 8)


def test_images_without_class_folders_have_no_labels(tmp_path: Path, save_image: Save) -> None:
    for name in ("b.png", "a.png"):
        save_image(f"val/{name}")
    (tmp_path / "val/empty").mkdir()
    images = open_images(folder(tmp_path), "evaluation")
    assert images.classes is None
    assert [images.name(i) for i in range(2)] == ["val/a.png", "val/b.png"]
    assert images.label(0) is None
    assert images.labels().tolist() == [-1, -1]


def test_another_folder_can_be_named(tmp_path: Path, save_image: Save) -> None:
    save_image("mine/x.png")
    assert len(open_images(folder(tmp_path, calibration="mine"), "calibration")) == 1
    with pytest.raises(DataError, match="train: there is no such folder; name one of the folders there: mine"):
        open_images(folder(tmp_path), "calibration")


def test_folders_without_images_or_with_both_kinds_are_refused(tmp_path: Path, save_image: Save) -> None:
    (tmp_path / "train/cat").mkdir(parents=True)
    with pytest.raises(DataError, match="train: holds no images"):
        open_images(folder(tmp_path), "calibration")
    save_image("train/cat/a.png")
    save_image("train/b.png")
    with pytest.raises(DataError, match=r"holds images \(b.png\) beside class folders \(cat\)"):
        open_images(folder(tmp_path), "calibration")


def csv_set(root: Path, text: str | bytes) -> Any:
    (root / "list.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return open_images(DataRecipe(kind="csv", root=root, evaluation="list.csv"), "evaluation")


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("file,label\nb.png,3\na.png,0\n", [3, 0]),
        ("file\nb.png\na.png\n", [-1, -1]),
        (f"path,sha256,label,score\nb.png,{'0' * 64},7,0.5\na.png,,,\n", [7, -1]),
        ("\ufefffile,label\r\nb.png,3\r\n\r\na.png,12\r\n", [3, 12]),
        ("label, file\n3,b.png\n 4 ,a.png\n", [3, 4]),
    ],
)
def test_csv_lists(tmp_path: Path, text: str, labels: list[int]) -> None:
    images = csv_set(tmp_path, text)
    assert [images.name(i) for i in range(len(images))] == ["b.png", "a.png"]
    assert images.labels().tolist() == labels
    assert [images.label(i) for i in range(2)] == [None if x < 0 else x for x in labels]


def test_a_listed_hash_is_checked_whenever_the_file_is_read(tmp_path: Path, save_image: Save) -> None:
    digest = hashlib.sha256(save_image("a.png").read_bytes()).hexdigest()
    save_image("b.png", seed=1)
    images = csv_set(tmp_path, f"path,sha256\na.png,{digest.upper()}\nb.png,{digest}\nb.png,\n")
    assert images.image(0).shape == images.image(2).shape == (3, 6, 8)
    assert images.sha256(0) == digest
    for read in (images.image, images.sha256):
        with pytest.raises(DataError, match=r"b.png: is not the file that was listed: .*; restore the file") as raised:
            read(1)
        assert not isinstance(raised.value, UnreadableImageError)


def test_a_manifest_of_files_is_a_list(tmp_path: Path, save_image: Save) -> None:
    for name in ("train/x/a.png", "train/y/b.png", "train/y/c.png"):
        save_image(name, seed=ord(name[-5]))
    found = open_images(folder(tmp_path), "calibration")
    manifest = make_manifest(found, [2, 0], ["random", "random"], 7)
    again = csv_set(tmp_path, manifest_csv(manifest))
    assert [again.name(i) for i in range(2)] == ["train/y/c.png", "train/x/a.png"]
    assert again.labels().tolist() == [1, 0]
    assert torch.equal(again.image(0), found.image(2))


def test_links_to_class_folders_are_followed(tmp_path: Path, save_image: Save) -> None:
    save_image("elsewhere/cat/a.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/cat").symlink_to(tmp_path / "elsewhere/cat")
    (tmp_path / "elsewhere/cat/circle").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/cat/gone.png").symlink_to(tmp_path / "nowhere.png")
    images = open_images(folder(tmp_path), "calibration")
    assert [images.name(i) for i in range(len(images))] == ["train/cat/a.png", "train/cat/gone.png"]


def test_csv_takes_absolute_paths(tmp_path: Path, save_image: Save) -> None:
    inside, root = save_image("root/a.png"), tmp_path / "root"
    outside = save_image("elsewhere/b.png", seed=1)
    images = csv_set(root, f'file,label\n"{inside}",1\n"{outside}",2\n')
    assert [images.name(0), images.name(1)] == ["a.png", outside.as_posix()]
    assert images.image(1).shape == (3, 6, 8)
    assert images.sha256(1) == hashlib.sha256(outside.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list.csv: holds no rows under a header with the column file"),
        ("file,label\n", "list.csv: holds no rows"),
        ("name,label\na.png,1\n", "list.csv: holds no rows under a header with the column file"),
        ("file,label\na.png,1\nb.png,-1\n", "line 3: label '-1' is not a class index; write a whole number from 0"),
        ("file,label\na.png,cat\n", "line 2: label 'cat' is not a class index"),
        ("file,label\na.png,1.0\n", "line 2: label '1.0' is not"),
        ("file,label\na.png,99999999999999999999\n", "line 2: label '9+' is not"),
        ("file,label\na.png\n", "line 2: has another number of fields"),
        ("file,label\na.png,1,2\n", "line 2: has another number of fields"),
        ("file,label\n,1\n", "line 2: names no file"),
        (b"file,label\n\xff\xfe,1\n", "list.csv: is not a CSV file in UTF-8"),
    ],
)
def test_csv_errors_name_file_and_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        csv_set(tmp_path, text)


def test_missing_csv_and_missing_image_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.csv: cannot be read"):
        open_images(DataRecipe(kind="csv", root=tmp_path, calibration="gone.csv"), "calibration")
    images = csv_set(tmp_path, "file\na.png\n")
    with pytest.raises(DataError, match=r"a.png: there is no such file"):
        images.image(0)
    with pytest.raises(DataError, match=r"a.png: there is no such file"):
        images.sha256(0)


def test_tensor_images() -> None:
    tensor = torch.rand(3, 2, 4, 5, dtype=torch.float64)
    images = TensorImages(tensor, [4, -1, 0])
    assert images.image(1).dtype == torch.float32
    assert [images.label(i) for i in range(3)] == [4, None, 0]
    assert images.name(2) == "tensor#2"
    assert images.sha256(0) == hashlib.sha256(tensor[0].float().numpy().tobytes()).hexdigest()
    assert TensorImages(tensor).labels().tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("tensor", "labels", "message"),
    [
        (torch.zeros(3, 4, 4), None, r"images: are float32 of shape \(3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), None, "images: are uint8"),
        (torch.zeros(2, 3, 4, 4), [1], "labels: are 1 for 2 images"),
        (torch.zeros(2, 3, 4, 4), [1, -2], "labels: hold -2"),
        (torch.zeros(2, 3, 4, 4), [0.5, 1], "labels: are no whole numbers"),
        (torch.zeros(2, 3, 4, 4), ["cat", "dog"], "labels: are no numbers"),
        (torch.zeros(2, 3, 4, 4), [[0, 1], [1, 0]], r"labels: have shape \(2, 2\)"),
        (torch.zeros(2, 3, 4, 4), 1, r"labels: have shape \(\)"),
        (torch.zeros(2, 3, 4, 4, device="meta"), None, "images: are on the meta device"),
        (torch.zeros(2, 3, 4, 4).to_sparse(), None, "images: are stored as sparse_coo"),
        (np.zeros((2, 3, 4, 4)), None, r"images: are of type ndarray, not a tensor; pass torch\.from_numpy\(images\)"),
        ([torch.zeros(3, 4, 4)], None, r"images: are of type list, not a tensor; pass torch\.stack\(images\)"),
        ("images/", None, "images: are of type str, not a tensor; pass all images in one tensor of shape"),
    ],
)
def test_tensor_images_refuse_other_things(tensor: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        TensorImages(tensor, labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "labels", [torch.tensor([1, 0]), np.array([1.0, 0.0]), (True, False), torch.tensor([1, 0]).int()]
)
def test_labels_may_be_any_whole_numbers(labels: Any) -> None:
    assert TensorImages(torch.zeros(2, 3, 4, 4), labels).labels().tolist() == [1, 0]


def test_images_of_inference_mode_are_ordinary_ones() -> None:
    with torch.inference_mode():
        images = TensorImages(torch.rand(2, 3, 4, 4), torch.tensor([1, 0]))
    parameter = torch.zeros(2, 3, 4, 4, requires_grad=True)
    (next(iter(batches(images, 2))).images + parameter).square().sum().backward()
    assert parameter.grad is not None
    assert len(images.sha256(0)) == 64


def test_subsets_keep_their_order_and_nest() -> None:
    images = TensorImages(torch.arange(5.0).reshape(5, 1, 1, 1), [10, 11, 12, 13, 14])
    some = images.subset([4, 0, 0, 2])
    assert [float(some.image(i)) for i in range(4)] == [4, 0, 0, 2]
    assert some.labels().tolist() == [some.label(i) for i in range(4)] == [14, 10, 10, 12]
    nested = some.subset([3, 0])
    assert [nested.name(0), nested.name(1)] == ["tensor#2", "tensor#4"]
    assert nested.sha256(1) == images.sha256(4)
    assert len(images.subset([])) == 0


@pytest.mark.parametrize("index", [-1, 5])
def test_subset_outside_the_set_is_refused(index: int) -> None:
    with pytest.raises(DataError, match=rf"indices: {index} is outside 0..4"):
        TensorImages(torch.zeros(5, 1, 1, 1)).subset([0, index])


def test_check_labels_names_the_first_offender() -> None:
    images = TensorImages(torch.zeros(4, 1, 1, 1), [1, -1, 3, 9])
    check_labels(images, 10)
    with pytest.raises(DataError, match=r"tensor#2: label 3 is outside 0..2; "):
        check_labels(images, 3)


def test_real_imagenet_list(shared_data: Path) -> None:
    settings = Preprocess(resize=256, crop=224)
    recipe = DataRecipe(kind="csv", root=shared_data / "imagenet", evaluation="val.csv", preprocess=settings)
    images = open_images(recipe, "evaluation")
    assert len(images) == 650
    check_labels(images, 1000)
    assert images.image(0).shape == images.image(649).shape == (3, 224, 224)


def test_real_imagenette_folder(shared_data: Path) -> None:
    images = open_images(folder(shared_data / "imagenette10", preprocess=Preprocess(crop=96)), "calibration")
    assert len(images) == 9469
    assert images.classes is not None
    assert (len(images.classes), images.classes[0]) == (10, "n01440764")
    assert images.image(0).shape == (3, 96, 96)
