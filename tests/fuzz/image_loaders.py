"""Loaders of images: lists, class files, shards, image files and CIFAR-10."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from calibquant.data import batches, read_manifest
from calibquant.data.cifar import open_cifar10
from calibquant.data.classes import read_classes
from calibquant.data.files import open_folder
from calibquant.data.imageset import ImageSet
from calibquant.data.lists import open_csv
from calibquant.data.shards import open_shards
from calibquant.recipe import Preprocess

from .loaders import Loader

SMALL = Preprocess(resize=8, crop=8)
SYNSETS = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn02123394 Persian cat\n"
CLASS_INDEX = '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"], "2": ["n02123394", "Persian_cat"]}'


def _image(form: str = "png", mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(stream, form)
    return stream.getvalue()


def _use(images: ImageSet) -> None:
    """All that a run asks of a set."""
    images.labels()
    for i in range(min(len(images), 20)):
        images.name(i), images.label(i)
    for batch in batches(images, 4, range(min(len(images), 20))):
        assert batch.images.isfinite().all()


# --- lists ------------------------------------------------------------------------------------------------------------


def _csv(folder: Path) -> list[Path]:
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(_image())
    (folder / "list.csv").write_text("file,label,note\na.png,0,\nb.png,1,x\n./b.png,,\n")
    return [folder / "list.csv"]


def _kaggle(folder: Path) -> list[Path]:
    (folder / "classes.txt").write_text(SYNSETS)
    for name in ("train/n01440764/n01440764_10", "val/ILSVRC2012_val_00000001"):
        path = folder / f"ILSVRC/Data/CLS-LOC/{name}.JPEG"
        path.parent.mkdir(parents=True)
        path.write_bytes(_image("jpeg"))
    rows = "n01440764_10,n01440764 1 2 3 4\nILSVRC2012_val_00000001,n02123394 1 2 3 4 n02123394 1 2 3 4\n"
    (folder / "list.csv").write_text("ImageId,PredictionString\n" + rows)
    return [folder / "list.csv"]


def _load_kaggle(folder: Path) -> None:
    _use(open_csv(folder, "list.csv", SMALL, "fail", read_classes(folder / "classes.txt")))


def _manifest(folder: Path) -> list[Path]:
    digest = "0123456789abcdef" * 4
    rows = f'a.png,{digest},0,0.5,herding,7\nb c.png,{digest},,,random,7\n"d,e.png",{digest},1,-1e-3,random,7\n'
    (folder / "manifest.csv").write_text("path,sha256,label,score,strategy,seed\n" + rows)
    return [folder / "manifest.csv"]


# --- classes ----------------------------------------------------------------------------------------------------------


def _classes(name: str, text: str) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        (folder / name).write_text(text)
        return [folder / name]

    return make


def _load_classes(name: str) -> Callable[[Path], object]:
    return lambda folder: read_classes(folder / name).index("goldfish", str(folder / name))


# --- shards -----------------------------------------------------------------------------------------------------------


def _shard(folder: Path) -> list[Path]:
    members = {
        "a.png": _image(), "a.cls": b"0", "b.jpg": _image("jpeg"), "b.json": b'{"label": 1, "more": [1, {"a": 2}]}',
        "c/d.webp": _image("webp"), "c/d.cls": b"2\n",
    }  # fmt: skip
    with tarfile.open(folder / "a-0.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return [folder / "a-0.tar"]


# --- image files ------------------------------------------------------------------------------------------------------


def _file(form: str, mode: str = "RGB") -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        path = folder / "val" / f"a.{form}"
        path.parent.mkdir()
        path.write_bytes(_image(form, mode))
        return [path]

    return make


def _load_folder(folder: Path) -> None:
    _use(open_folder(folder, "val", SMALL))


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def _cifar_binary(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    records = [bytes([i % 10]) + rng.bytes(3072) for i in range(5)]
    (folder / "test_batch.bin").write_bytes(b"".join(records))
    return [folder / "test_batch.bin"]


def _cifar_pickle(folder: Path) -> list[Path]:
    data = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    tree = {b"data": data, b"labels": [0, 3, 9, 1], b"batch_label": b"testing batch", b"filenames": [b"a.png"] * 4}
    (folder / "test_batch").write_bytes(pickle.dumps(tree, protocol=2))
    return [folder / "test_batch"]


def _load_cifar(folder: Path) -> None:
    _use(open_cifar10(folder, "test", Preprocess()))


IMAGES = (
    Loader("CSV list", ("text", "text", "bytes"), _csv, lambda f: _use(open_csv(f, "list.csv", SMALL)),
           names=("list.csv", ".png", "data.")),
    Loader("Kaggle list", ("text", "text", "bytes"), _kaggle, _load_kaggle, names=("list.csv", ".JPEG", "site")),
    Loader("manifest", ("text", "text", "bytes"), _manifest, lambda f: read_manifest(f / "manifest.csv")),
    Loader("class list (text)", ("text", "bytes"), _classes("classes.txt", SYNSETS), _load_classes("classes.txt")),
    Loader("class list (JSON)", ("json", "text", "bytes"), _classes("classes.json", CLASS_INDEX),
           _load_classes("classes.json")),
    Loader("tar shard", ("tar", "tar", "bytes", "text"), _shard, lambda f: _use(open_shards(f, "a-{0..0}.tar", SMALL)),
           names=("a-",)),
    *(Loader(f"image ({form})", ("png", "bytes") if form == "png" else ("bytes",), _file(form), _load_folder,
             names=(f"a.{form}", "val"))
      for form in ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm")),
    Loader("CIFAR-10 (binary)", ("bytes",), _cifar_binary, _load_cifar, names=("test_batch", "site")),
    Loader("CIFAR-10 (pickle)", ("pickle", "bytes"), _cifar_pickle, _load_cifar, names=("test_batch", "site")),
)  # fmt: skip
