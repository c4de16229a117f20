"""Where features are kept: in memory, in mapped files, in bfloat16; it changes nothing but their roundings."""

from __future__ import annotations

import errno
import gc
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NETWORKS, folded, quantized, values_of
from test_features import COUNT, NAMES, order, quantized_image, recipe
from torch import Tensor, fx

from calibquant.errors import RunFolderError
from calibquant.features import Features, FeatureStore, take
from calibquant.graph.subgraph import subgraph

MAPS = Path("/proc/self/maps")
linux = pytest.mark.skipif(not MAPS.exists(), reason="only Linux tells what a process has mapped")


def mapped_ranges(folder: Path) -> list[range]:
    """The addresses that are mapped from files of a folder, by the operating system's own account."""
    lines = [re.split(r"\s+", line, maxsplit=5) for line in MAPS.read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[5].startswith(f"{folder}/")]
    return [range(int(a, 16), int(b, 16)) for a, b in spans]


def open_files(folder: Path) -> list[Path]:
    """The process's open files of a folder, whether or not they still have a name."""
    return [p for p in Path("/proc/self/fd").iterdir() if p.is_symlink() and str(p.readlink()).startswith(f"{folder}/")]


def is_mapped(value: Tensor, folder: Path) -> bool:
    first, last = value.data_ptr(), value.data_ptr() + value.nbytes - 1
    return any(first in span and last in span for span in mapped_ranges(folder))


class Watched(FeatureStore):
    """Remembers the most bytes it ever had in memory."""

    most = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = super().allocate(shape, dtype)
        self.most = max(self.most, self.in_memory)
        return tensor


def both_sides(name: str, store: FeatureStore | None) -> tuple[Features, Features]:
    """The float and the quantized side on one store."""
    graph, images = folded(name), NETWORKS[name].example(COUNT, seed=5)
    model = quantized(graph, recipe("integer"), NETWORKS[name].example(8, seed=6))
    return (
        Features(graph.graph, partial(subgraph, graph), images, 2, store=store),
        Features(graph.graph, model.part, quantized_image(model, images), 2, store=store),
    )


@pytest.mark.parametrize("limit", [0, 30_000, 10**9])
@pytest.mark.parametrize("name", NAMES)
def test_where_features_are_kept_does_not_change_them(name: str, limit: float, tmp_path: Path) -> None:
    plain, stored = both_sides(name, None), both_sides(name, FeatureStore(limit=limit, folder=tmp_path))
    for node in order(folded(name))[1:]:
        for expected, found in zip(plain, stored, strict=True):
            expected.advance(node.name)
            found.advance(node.name)
            assert list(found.live) == list(expected.live)
            for value in found.live:
                assert torch.equal(found.live[value], expected.live[value]), value


@linux
@pytest.mark.parametrize("name", ["cifar_resnet", "hrnet", "densenet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_the_limit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Two sides share the limit; what is in memory is counted here by the addresses of the live tensors."""
    unlimited, nodes = Watched(dtype), order(folded(name))
    for side in both_sides(name, unlimited):
        for node in nodes[1:]:
            side.advance(node.name)
    store = Watched(dtype, unlimited.most / 3, tmp_path)
    sides, places = both_sides(name, store), set[bool]()
    images = [side.live[nodes[0].name] for side in sides]
    for node in nodes[1:]:
        for side in sides:
            side.advance(node.name)
        values = [v for side in sides for v in side.live.values() if not any(v is image for image in images)]
        mapped = [is_mapped(v, tmp_path) for v in values]
        assert {v.dtype for v in values} <= {dtype}
        assert sum(v.nbytes for v, far in zip(values, mapped, strict=True) if not far) == store.in_memory
        places.update(mapped)
    assert store.most <= unlimited.most / 3
    assert places == {True, False}


def test_a_limit_counts_what_is_still_used() -> None:
    store = FeatureStore(torch.bfloat16, limit=100)
    a, b = store.allocate((5, 5)), store.allocate((3, 2), torch.int64)
    assert (a.dtype, b.dtype, store.in_memory) == (torch.bfloat16, torch.int64, 98)
    part, alias = a[1:3], a.detach()
    del a
    assert store.in_memory == 98
    del part
    assert store.in_memory == 98  # the alias still holds the memory of all of it
    del alias
    gc.collect()
    assert store.in_memory == 48
    exactly, nothing = store.allocate((2, 13)), store.allocate((0, 4))
    assert store.in_memory == 100
    beyond = store.allocate((1,))
    assert store.in_memory == 100
    del b, exactly, nothing, beyond
    assert store.in_memory == 0


@linux
def test_mapped_features_are_in_files_that_nobody_sees(tmp_path: Path) -> None:
    store = FeatureStore(limit=0, folder=tmp_path)
    values = store.allocate((1000, 7))
    (file,) = open_files(tmp_path)
    assert file.stat().st_blocks * 512 >= values.nbytes  # the disk has promised the space before anything is written
    values.copy_(torch.arange(7000.0).view(1000, 7))
    assert is_mapped(values, tmp_path)
    assert list(tmp_path.iterdir()) == []  # without a name a file goes with its process, killed or not
    part = values[990:]
    del values
    assert is_mapped(part, tmp_path)
    assert part[-1].tolist() == [6993.0, 6994.0, 6995.0, 6996.0, 6997.0, 6998.0, 6999.0]
    del part
    assert mapped_ranges(tmp_path) == open_files(tmp_path) == []


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_folder_that_cannot_be_written_is_one_line(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    if kind == "a file":
        folder.touch()
    graph, images = folded("cifar_resnet"), NETWORKS["cifar_resnet"].example(COUNT)
    features = Features(graph.graph, partial(subgraph, graph), images, 2, store=FeatureStore(limit=0, folder=folder))
    for _ in range(2):  # a refusal leaves the features as they were
        with pytest.raises(
            RunFolderError, match=rf"^{re.escape(str(folder))}: features cannot be kept there .*; free space"
        ) as caught:
            features.advance(order(graph)[-1].name)
        assert "\n" not in str(caught.value)
    assert list(features.live) == [order(graph)[0].name]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """By the process's own limit on a file's size, which refuses space as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        store = FeatureStore(limit=0, folder=tmp_path)
        store.allocate((1 << 18,)).fill_(1)
        with pytest.raises(RunFolderError, match=re.escape(os.strerror(errno.EFBIG))) as caught:
            store.allocate(((1 << 18) + 1,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def rounded(x: Tensor) -> Tensor:
    """To 8 significant bits, ties to even, by the bits of float32; itself float32."""
    bits = x.numpy().view(np.uint32).astype(np.int64)
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return torch.from_numpy(kept.astype(np.uint32).view(np.float32))


class Rounding(fx.Interpreter):
    """Runs the whole network in float32; at each stop every value computed so far and still to be read is rounded."""

    def __init__(self, graph: fx.GraphModule, stops: set[str]) -> None:
        super().__init__(graph)
        self.stops, self.found = stops, dict[str, dict[str, Tensor]]()

    def run_node(self, n: fx.Node) -> object:
        if n.name in self.stops:
            computed = {k: rounded(v) for k, v in self.env.items() if k.op == "call_function"}
            self.env.update(computed)
            self.found[n.name] = {k.name: v for k, v in computed.items()}
        return super().run_node(n)


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_rounds_what_is_kept_and_nothing_else(name: str, limit: int | None, every: int) -> None:
    graph, images = folded(name), NETWORKS[name].example(COUNT, seed=5)
    nodes = order(graph)
    stops = [n.name for n in nodes[1::every]]
    expected = Rounding(graph, set(stops))
    with torch.no_grad():
        expected.run(images)
    store = FeatureStore(torch.bfloat16, limit)
    features = Features(graph.graph, partial(subgraph, graph), images, COUNT, store=store)
    for stop in stops:
        features.advance(stop)
        kept = {k: v for k, v in features.live.items() if k != nodes[0].name}
        assert set(kept) == set(expected.found[stop])
        for value in kept:
            assert kept[value].dtype == torch.bfloat16
            assert torch.equal(kept[value].float(), expected.found[stop][value]), value
    assert nodes[0].name not in features.live or features.live[nodes[0].name] is images


def test_bfloat16_of_a_target() -> None:
    graph, images = folded("cifar_resnet"), NETWORKS["cifar_resnet"].example(COUNT)
    nodes = [n.name for n in order(graph)[1:4]]
    store = FeatureStore(torch.bfloat16)
    features = Features(graph.graph, partial(subgraph, graph), images, COUNT, store=store)
    (target,) = features.run(nodes, nodes[-1:])
    assert torch.equal(target.float(), rounded(values_of(graph, images)[nodes[-1]]))
    assert store.in_memory == target.nbytes == target.numel() * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_rows_are_taken_as_they_are_computed_with(dtype: torch.dtype) -> None:
    values = FeatureStore(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, limit=0).allocate((6, 2), dtype)
    values.copy_(torch.arange(12).view(6, 2))
    wanted = torch.int64 if dtype == torch.int64 else torch.float32
    for rows, expected in (
        (slice(4, 9), [[8, 9], [10, 11]]),
        (slice(None, None, 4), [[0, 1], [8, 9]]),
        (torch.tensor([5, 0, 5]), [[10, 11], [0, 1], [10, 11]]),
    ):
        found = take(values, rows)
        assert found.dtype == wanted
        assert found.tolist() == expected
