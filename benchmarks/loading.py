"""Is loading the bottleneck? ResNet-18 evaluated from JPEG files and tar shards, against the network alone.

    python benchmarks/loading.py --data DATA [--images 320] [--rounds 7] [--threads N]

DATA holds imagenet/ (val.csv, calibration.csv and their images). The network has random weights and takes 224 x 224.
Alone, it runs over batches that are in memory. Otherwise `calibquant.evaluation.evaluate` reads, decodes, preprocesses
and scores, with `data.workers` 0 (threads) and 1. All take turns in each round, who begins rotates, and a ratio is
taken within its round. Loading alone is `batches` without network. Starting processes is counted in; below 256 images
none is started. "CPU" is the same ratio of processor times with threads: what would be left were there only one core
and nothing done beside; a busy machine disturbs it least.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from calibquant.data import ImageSet, batches, open_images
from calibquant.data.encoded import EncodedImages
from calibquant.evaluation import evaluate
from calibquant.recipe import DataRecipe, Preprocess
from calibquant.zoo import build

BATCH = 64
LARGE = (500, 375)  # the usual size of ImageNet's own files
SEED = 1005
CROP = Preprocess(crop=224)
RESIZE = Preprocess(resize=256, crop=224)


@dataclass(frozen=True)
class Source:
    """Images in one form.

    Args:
        name: of the table's row.
        images: the set.
        bytes: mean size of an encoded image.
    """

    name: str
    images: ImageSet
    bytes: float

    def by(self, workers: int) -> ImageSet:
        """The set, decoded by so many processes; 0 for threads."""
        self.images.workers = workers
        return self.images


# --- the images -------------------------------------------------------------------------------------------------------


def sources(data: Path, folder: Path, count: int) -> Iterator[Source]:
    """Every form of the images; shards and enlarged files are made in `folder`."""
    yield source("files, 227 x 227, crop", data, "csv", "val.csv", CROP, count)
    encoded = list(_encoded(open_set(data, "csv", "calibration.csv", CROP), count))
    yield source("files, shorter side 256, resize, crop", data, "csv", "calibration.csv", RESIZE, count)
    pack(folder / "small", encoded)
    yield source("shards, shorter side 256, resize, crop", folder, "shards", "small-{0..1}.tar", RESIZE, count)
    pack(folder / "large", [enlarged(data) for data in encoded])
    yield source("shards, enlarged to 500 x 375, resize, crop", folder, "shards", "large-{0..1}.tar", RESIZE, count)


def open_set(root: Path, kind: str, name: str, settings: Preprocess) -> EncodedImages:
    recipe = DataRecipe.model_validate({"kind": kind, "root": root, "evaluation": name, "preprocess": settings})
    images = open_images(recipe, "evaluation")
    assert isinstance(images, EncodedImages)
    return images


def source(title: str, root: Path, kind: str, name: str, settings: Preprocess, count: int) -> Source:
    images = open_set(root, kind, name, settings)
    size = float(np.mean([len(data) for data in _encoded(images, count)]))
    return Source(title, images.subset(range(count)), size)


def _encoded(images: EncodedImages, count: int) -> Iterator[bytes]:
    return (images.read(i) for i in range(count))


def pack(stem: Path, encoded: list[bytes]) -> None:
    """Two shards, `stem`-0.tar and `stem`-1.tar, with a label for each image."""
    for number, part in enumerate((encoded[::2], encoded[1::2])):
        with tarfile.open(f"{stem}-{number}.tar", "w") as tar:
            for i, data in enumerate(part):
                for ending, content in (("cls", b"0"), ("jpg", data)):
                    member = tarfile.TarInfo(f"{i:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def enlarged(data: bytes) -> bytes:
    """An image of the size of ImageNet's own files, at a quality that gives about their bytes."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").resize(LARGE, Image.Resampling.BICUBIC).save(file, "jpeg", quality=96)
    return file.getvalue()


# --- timing -----------------------------------------------------------------------------------------------------------


def runs(network: nn.Module, forms: list[Source], ready: list[Tensor]) -> dict[tuple[str, str], Callable[[], Any]]:
    """What is timed, by source and way."""

    def alone() -> None:
        with torch.inference_mode():
            for images in ready:
                network(images)

    result: dict[tuple[str, str], Callable[[], Any]] = {("", "alone"): alone}
    for form in forms:
        for workers in (0, 1):
            result[form.name, f"evaluate {workers}"] = lambda f=form, w=workers: evaluate(network, f.by(w), BATCH)
        for workers in (0, 1, 2):
            result[form.name, f"load {workers}"] = lambda f=form, w=workers: [None for _ in batches(f.by(w), BATCH)]
    return result


def timed(work: dict[tuple[str, str], Callable[[], Any]], rounds: int) -> dict[tuple[str, str], list[list[float]]]:
    """Seconds, and seconds of this process on processors, of each in each round."""
    seconds: dict[tuple[str, str], list[list[float]]] = {key: [] for key in work}
    order = list(work)
    for number in range(rounds):
        turn = number * len(order) // rounds
        for key in order[turn:] + order[:turn]:
            begin, busy = time.perf_counter(), time.process_time()
            work[key]()
            seconds[key].append([time.perf_counter() - begin, time.process_time() - busy])
        print(f"round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
    return seconds


def quartiles(values: Any) -> dict[str, float]:
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(SEED)
    network = build("resnet18").eval()
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        forms = list(sources(given.data / "imagenet", Path(folder), given.images))
        ready = [batch.images for batch in batches(forms[0].by(0), BATCH)]
        work = runs(network, forms, ready)
        for warm in (("", "alone"), (forms[0].name, "load 2")):
            work[warm]()
        both = {key: np.array(pairs).T for key, pairs in timed(work, given.rounds).items()}
    load.append(os.getloadavg()[0])
    wall, busy = ({key: pair[k] for key, pair in both.items()} for k in (0, 1))
    alone = "", "alone"
    rows = [
        {
            "source": form.name, "bytes": form.bytes,
            "ratio": {w: quartiles(wall[alone] / wall[form.name, f"evaluate {w}"]) for w in (0, 1)},
            "cpu_ratio": quartiles(busy[alone] / busy[form.name, "evaluate 0"]),
            "evaluate": {w: quartiles(given.images / wall[form.name, f"evaluate {w}"]) for w in (0, 1)},
            "load": {w: quartiles(given.images / wall[form.name, f"load {w}"]) for w in (0, 1, 2)},
        }
        for form in forms
    ]  # fmt: skip
    facts = {
        "images": given.images, "rounds": given.rounds, "threads": given.threads, "cores": os.cpu_count(),
        "load": load, "alone": quartiles(given.images / wall[alone]), "rows": rows,
    }  # fmt: skip
    command = f"python benchmarks/loading.py --data DATA --images {given.images} --rounds {given.rounds}"
    common.write("loading", f"{command} --threads {given.threads}", facts, markdown(facts))


def spread(found: dict[str, float]) -> str:
    return f"**{found['median']:.2f}** ({found['low']:.2f}–{found['high']:.2f})"


def markdown(facts: dict[str, Any]) -> str:
    """The two tables and what they stand for."""
    header = ["images", "kB", *(f"workers {w}: images/s, times the network alone" for w in (0, 1)), "CPU"]
    body = [
        [row["source"], f"{row['bytes'] / 1e3:.0f}",
         *(f"{row['evaluate'][w]['median']:.1f}, {spread(row['ratio'][w])}" for w in (0, 1)), spread(row["cpu_ratio"])]
        for row in facts["rows"]
    ]  # fmt: skip
    rates = [[row["source"], *(f"{row['load'][w]['median']:.0f}" for w in (0, 1, 2))] for row in facts["rows"]]
    alone, load = facts["alone"], facts["load"]
    return (
        f"ResNet-18, random weights, 224 x 224, batches of {BATCH}, {facts['threads']} thread(s) on {facts['cores']} "
        f"cores; network alone {alone['median']:.1f} images/s ({alone['low']:.1f}–{alone['high']:.1f}). "
        f"{facts['images']} images, {facts['rounds']} rounds in turns: medians, quartiles in brackets. Load average of "
        f"the machine before and after: {load[0]:.1f}, {load[1]:.1f}. CPU: ratio of processor times, workers 0.\n\n"
        f"{common.table(header, body)}\nLoading alone, images/s:\n\n"
        f"{common.table(['images', 'workers 0 (threads)', 'workers 1', 'workers 2'], rates)}"
    )


if __name__ == "__main__":
    main()
