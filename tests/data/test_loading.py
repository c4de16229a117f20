"""Batches: order, prefetching, skipping, and what they refuse."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibquant.data import ImageSet, TensorImages, batches, open_images
from calibquant.data.loading import PREFETCH, images_within
from calibquant.errors import DataError
from calibquant.recipe import DataRecipe, Preprocess

Save = Callable[..., Path]


class SlowImages(TensorImages):
    """Earlier images take longer, so that threads finish out of order; counts what was decoded."""

    decoded = 0

    def image(self, i: int) -> Tensor:
        time.sleep(0.002 * (len(self) - i) / len(self))
        self.decoded += 1
        return super().image(i)


def numbered(count: int) -> Tensor:
    return torch.arange(float(count)).reshape(count, 1, 1, 1).expand(count, 3, 2, 2)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 12, 100])
def test_every_image_comes_once_in_order(batch_size: int) -> None:
    got = list(batches(SlowImages(numbered(12), list(range(12))), batch_size))
    assert [i for b in got for i in b.indices] == list(range(12))
    assert [len(b.indices) for b in got[:-1]] == [batch_size] * (len(got) - 1)
    assert torch.equal(torch.cat([b.images for b in got]), numbered(12))
    assert torch.cat([b.labels for b in got]).tolist() == list(range(12))
    assert (got[0].images.dtype, got[0].labels.dtype) == (torch.float32, torch.int64)


def test_chosen_indices_in_their_order() -> None:
    images = TensorImages(numbered(9), [*range(8), -1])
    got = list(batches(images, 2, indices=[8, 2, 5]))
    assert [b.indices for b in got] == [(8, 2), (5,)]
    assert [b.labels.tolist() for b in got] == [[-1, 2], [5]]
    assert list(batches(images, 2, indices=[])) == []


def test_decoding_runs_only_a_little_ahead_and_stops_with_its_reader() -> None:
    images = SlowImages(numbered(100))
    reader = batches(images, 2)
    next(reader)
    time.sleep(0.1)
    assert images.decoded <= 2 * (PREFETCH + 1)
    reader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("calibquant-data")]


@pytest.mark.parametrize(
    ("batch_size", "indices", "message"),
    [(0, None, "batch_size: 0 is not"), (2, [0, 9], r"indices: 9 is outside 0..3"), (2, [-1], "indices: -1 is")],
)
def test_wrong_arguments_are_refused_at_once(batch_size: int, indices: list[int] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        batches(TensorImages(numbered(4)), batch_size, indices)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_name_the_image(value: float) -> None:
    tensor = numbered(6).clone()
    tensor[4, 2, 1, 0] = value
    with pytest.raises(DataError, match="tensor#4: holds NaN or infinity"):
        list(batches(TensorImages(tensor), 3))


def test_finite_values_are_taken_however_large() -> None:
    tensor = torch.full((4, 3, 2, 2), 3e38)  # their sum is infinite
    assert torch.equal(next(iter(batches(TensorImages(tensor), 4))).images, tensor)


def folder(root: Path, on_error: str = "fail", settings: Preprocess | None = None) -> ImageSet:
    fields = {"kind": "folder", "root": root, "on_error": on_error, "preprocess": settings or Preprocess()}
    return open_images(DataRecipe.model_validate(fields), "calibration")


def test_different_sizes_name_both_and_the_mend(tmp_path: Path, save_image: Save) -> None:
    save_image("train/a.png", 6, 8)
    save_image("train/b.png", 7, 8)
    with pytest.raises(DataError, match=r"b.png: is 7 x 8 but train/a.png .* is 6 x 8; set data.preprocess.resize and"):
        list(batches(folder(tmp_path), 2))
    cropped = list(batches(folder(tmp_path, settings=Preprocess(resize=8, crop=8)), 2))
    assert cropped[0].images.shape == (2, 3, 8, 8)
    assert [b.images.shape[2:] for b in batches(folder(tmp_path), 1)] == [(6, 8), (7, 8)]


def broken_folder(root: Path, save_image: Save) -> None:
    """Images a to f, of which b, c and e are empty, corrupt and truncated."""
    for seed, name in enumerate("abcdef"):
        save_image(f"train/x/{name}.png", seed=seed)
    (root / "train/x/b.png").write_bytes(b"")
    (root / "train/x/c.png").write_bytes(b"no image")
    path = root / "train/x/e.png"
    path.write_bytes(path.read_bytes()[:60])


def test_unreadable_images_fail_by_default(tmp_path: Path, save_image: Save) -> None:
    broken_folder(tmp_path, save_image)
    with pytest.raises(DataError, match=r"b.png: is empty"):
        list(batches(folder(tmp_path), 2))


def test_unreadable_images_are_skipped_and_logged_once(
    tmp_path: Path, save_image: Save, caplog: pytest.LogCaptureFixture
) -> None:
    broken_folder(tmp_path, save_image)
    images = folder(tmp_path, "skip")
    with caplog.at_level(logging.WARNING, logger="calibquant"):
        got = list(batches(images, 2))
        again = list(batches(images.subset([1, 2, 3]), 1))
    assert [b.indices for b in got] == [(0,), (3,), (5,)]
    assert [b.indices for b in again] == [(2,)]
    assert images.skipped == {"train/x/b.png", "train/x/c.png", "train/x/e.png"}
    assert len(caplog.records) == 3
    assert "b.png: is empty" in caplog.text


def test_skipping_every_image_is_an_error(tmp_path: Path, save_image: Save) -> None:
    broken_folder(tmp_path, save_image)
    with pytest.raises(DataError, match=r"b.png: this image and all others are unreadable"):
        list(batches(folder(tmp_path, "skip"), 2, indices=[1, 2, 4]))


def test_skip_does_not_hide_what_the_recipe_must_mend(tmp_path: Path, save_image: Save) -> None:
    save_image("train/a.png", mode="L")
    with pytest.raises(DataError, match="3-channel RGB"):
        list(batches(folder(tmp_path, "skip", Preprocess(color="strict")), 1))
    with pytest.raises(DataError, match="the crop of 100 x 100 is larger"):
        list(batches(folder(tmp_path, "skip", Preprocess(crop=100)), 1))


def test_batches_of_real_cifar10_equal_single_images(cifar10_bin: Path) -> None:
    images = open_images(DataRecipe(kind="cifar10", root=cifar10_bin), "evaluation")
    for batch in batches(images, 64, indices=range(0, 5000, 25)):
        for row, i in enumerate(batch.indices):
            assert torch.equal(batch.images[row], images.image(i))
            assert batch.labels[row] == images.label(i)


@pytest.mark.parametrize(
    ("batch_size", "shape", "expected"),
    [(64, (64, 3, 836, 836), 64), (64, (1, 3, 2048, 2048), 10), (8, (1, 3, 2000, 2000), 8), (4, (1, 3, 9000, 9000), 1)],
)
def test_large_images_pass_in_smaller_batches(batch_size: int, shape: tuple[int, ...], expected: int) -> None:
    assert images_within(batch_size, shape) == expected


@pytest.mark.parametrize(("most", "ahead"), [(1 << 28, 2), (95, 0), (96, 1)])
def test_fewer_batches_of_large_images_are_decoded_ahead(
    monkeypatch: pytest.MonkeyPatch, most: int, ahead: int
) -> None:
    monkeypatch.setattr("calibquant.data.loading.MOST_AHEAD", most)  # a batch has 2 images of 48 bytes
    images = SlowImages(numbered(40))
    reader = batches(images, 2)
    got = [next(reader).indices, next(reader).indices]
    time.sleep(0.1)
    assert images.decoded == 2 * (2 + ahead)
    assert [*got, *(batch.indices for batch in reader)] == [(i, i + 1) for i in range(0, 40, 2)]


def test_a_batch_is_held_by_its_reader_alone() -> None:
    class Counted(TensorImages):
        """Makes each image anew and remembers whether it is still held."""

        def __init__(self, images: Tensor) -> None:
            super().__init__(images)
            self.made: list[weakref.ref[Tensor]] = []

        def image(self, i: int) -> Tensor:
            image = super().image(i).clone()
            self.made.append(weakref.ref(image))
            return image

    images = Counted(numbered(4))
    reader = batches(images, 4)
    next(reader)
    deadline = time.monotonic() + 5
    while any(made() is not None for made in images.made) and time.monotonic() < deadline:
        time.sleep(0.01)  # the threads let go of their last result a moment later
    assert [made() for made in images.made] == [None] * 4
