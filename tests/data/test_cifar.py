"""Both official forms of CIFAR-10, their damage, and pickles that attack the reader."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibquant.data import check_labels, open_images
from calibquant.data.batch_pickle import read_batch
from calibquant.errors import DataError
from calibquant.recipe import DataRecipe, Preprocess

Records = Callable[[int, int], tuple[Any, list[int]]]
Write = Callable[..., None]


def recipe(root: Path, **fields: Any) -> DataRecipe:
    return DataRecipe(kind="cifar10", root=root, **fields)


def test_binary_train_is_the_batches_in_order(tmp_path: Path, cifar_records: Records, write_bin: Write) -> None:
    parts = [cifar_records(count, count) for count in (3, 2, 4)]
    for k, (pixels, labels) in zip((1, 2, 4), parts, strict=True):
        write_bin(tmp_path / f"data_batch_{k}.bin", pixels, labels)
    images = open_images(recipe(tmp_path, preprocess=Preprocess(mean=(0, 0, 0), std=(1, 1, 1))), "calibration")
    every = np.concatenate([pixels for pixels, _ in parts])
    assert len(images) == 9
    assert images.labels().tolist() == [label for _, labels in parts for label in labels]
    assert [images.label(i) for i in range(9)] == images.labels().tolist()
    assert images.name(0) == "data_batch_1.bin#0"
    assert images.name(4) == "data_batch_2.bin#1"
    assert images.name(8) == "data_batch_4.bin#3"
    for i in range(9):
        expected = torch.from_numpy(every[i].reshape(3, 32, 32).astype(np.float32)) / 255
        assert torch.equal(images.image(i), expected)
        assert images.sha256(i) == hashlib.sha256(every[i].tobytes()).hexdigest()


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_binary_test_split_is_found(tmp_path: Path, folder: str, cifar_records: Records, write_bin: Write) -> None:
    write_bin(tmp_path / folder / "test_batch.bin", *cifar_records(2, 0))
    images = open_images(recipe(tmp_path), "evaluation")
    assert len(images) == 2
    assert images.classes is not None
    assert images.classes[3] == "cat"


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize(
    "form", [{"python2": True}, {"python2": False, "protocol": 2}, {"python2": False, "protocol": 4}]
)
def test_python_form_equals_binary_form(
    tmp_path: Path, folder: str, form: dict[str, Any], cifar_records: Records, write_bin: Write, write_py: Write
) -> None:
    for k in (1, 2):
        pixels, labels = cifar_records(3, k)
        write_bin(tmp_path / "bin" / f"data_batch_{k}.bin", pixels, labels)
        write_py(tmp_path / "py" / folder / f"data_batch_{k}", pixels, labels, **form)
    binary = open_images(recipe(tmp_path / "bin"), "calibration")
    python = open_images(recipe(tmp_path / "py"), "calibration")
    assert len(binary) == len(python) == 6
    assert python.name(4) == "data_batch_2#1"
    for i in range(6):
        assert torch.equal(binary.image(i), python.image(i))
        assert (binary.label(i), binary.sha256(i)) == (python.label(i), python.sha256(i))


def test_resized_cifar_goes_through_pil(tmp_path: Path, cifar_records: Records, write_bin: Write) -> None:
    write_bin(tmp_path / "test_batch.bin", *cifar_records(1, 0))
    images = open_images(recipe(tmp_path, preprocess=Preprocess(resize=48, crop=40)), "evaluation")
    assert images.image(0).shape == (3, 40, 40)


@pytest.mark.parametrize("size", [0, 1, 3072, 3074, 2 * 3073 - 1])
def test_truncated_binary_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "test_batch.bin").write_bytes(bytes(size))
    with pytest.raises(DataError, match=rf"test_batch.bin: is truncated or not CIFAR-10: {size} bytes .* 3073"):
        open_images(recipe(tmp_path), "evaluation")


def test_label_outside_0_to_9_is_refused(tmp_path: Path, cifar_records: Records, write_bin: Write) -> None:
    pixels, _ = cifar_records(3, 0)
    write_bin(tmp_path / "test_batch.bin", pixels, [1, 9, 10])
    with pytest.raises(DataError, match=r"label 10 of record 2 is outside 0..9"):
        open_images(recipe(tmp_path), "evaluation")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_pickle_is_refused(tmp_path: Path, share: float, cifar_records: Records, write_py: Write) -> None:
    path = tmp_path / "test_batch"
    write_py(path, *cifar_records(2, 0))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match="test_batch: is truncated or not a CIFAR-10 batch; download"):
        open_images(recipe(tmp_path), "evaluation")


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "eval"), (subprocess.check_output, "check_output"), (np.load, "load")],
)
def test_attacking_pickles_run_nothing(
    tmp_path: Path, protocol: int, function: Callable[..., Any], name: str, cifar_records: Records
) -> None:
    witness = tmp_path / "witness"
    command = f"__import__('pathlib').Path({str(witness)!r}).touch()" if name == "eval" else f"touch {witness}"
    tree = {"data": cifar_records(1, 0)[0], "labels": [1], "x": Call(function, command)}
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps(tree, protocol))
    with pytest.raises(DataError, match=rf"asks to run [\w.]*\.{name}, which no CIFAR-10 file does"):
        open_images(recipe(tmp_path), "evaluation")
    assert not witness.exists()


# Each abuses only allowed names: state given to a function, another codec, a direct array, an array of objects.
@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02c_codecs\nencode\nN}X\x05\x00\x00\x00_makec_codecs\nencode\ns\x86b.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
        b"\x80\x02cnumpy\nndarray\nK\x05\x85R.",
        b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x02\x85NNC\x02abtb.",
        b"\x80\x04\x8c\x05numpy\x8c\x0c__builtins__\x93.",
        b"\x80\x02\x82\x01.",
        b"cos\nsystem\n(S'true'\ntR.",
    ],
)
def test_abuse_of_allowed_names_is_refused(tmp_path: Path, code: bytes) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(code)
    with pytest.raises(DataError, match=r"data_batch_1: is (truncated|not read)"):
        read_batch(path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1, 2], "holds no images of 3072 bytes"),
        ({"labels": [1]}, "holds no images of 3072 bytes"),
        ({"data": np.zeros((2, 100), np.uint8), "labels": [1, 2]}, "holds no images of 3072 bytes"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "holds no list of 2 class indices"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [2**70]}, "holds no list of 1 class indices"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}, "holds no list of 1 class indices"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [1]}, "is truncated or not a CIFAR-10 batch"),
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path: Path, tree: Any, message: str) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(tree, 4))
    with pytest.raises(DataError, match=message):
        read_batch(path)


def test_column_major_pixels_are_read(tmp_path: Path, cifar_records: Records) -> None:
    pixels, labels = cifar_records(3, 0)
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": np.asfortranarray(pixels), "labels": labels}, 2))
    np.testing.assert_array_equal(read_batch(path)[0], pixels)


def test_missing_files_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no CIFAR-10 files of the split test .*; set data.root"):
        open_images(recipe(tmp_path), "evaluation")


def test_real_cifar10(cifar10_bin: Path) -> None:
    train = open_images(recipe(cifar10_bin), "calibration")
    test = open_images(recipe(cifar10_bin), "evaluation")
    assert (len(train), len(test)) == (50_000, 5_000)
    assert np.bincount(train.labels()).tolist() == [5_000] * 10
    check_labels(train, 10)
    means = torch.stack([train.image(i) for i in range(0, 50_000, 100)]).mean(dim=(0, 2, 3))
    published = (torch.tensor([0.4914, 0.4822, 0.4465]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(means, published, atol=0.1, rtol=0)
