"""Test vectors: plain Python loops reproduce every expected code from the files alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import NETWORKS, folded, quantized

from calibquant.errors import RunFolderError
from calibquant.export import vectors
from calibquant.export.executor import execute
from calibquant.export.lowering import make_program
from calibquant.export.program import Program
from calibquant.export.vectors import write_vectors
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe

F = np.float32


def program_of(name: str, bits: int = 4) -> Program:
    recipe = QuantRecipe(
        placement="integer",
        weights=WeightRecipe(bits=bits, observer="minmax"),
        activations=ActivationRecipe(bits=bits, observer="minmax"),
    )
    return make_program(quantized(folded(name), recipe, NETWORKS[name].example(4, seed=1)))


class Files:
    """What a hardware engineer has: the index and the arrays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = json.loads((folder / "index.json").read_text())

    def array(self, entry: dict[str, Any]) -> np.ndarray:
        array = np.load(self.folder / entry["file"], allow_pickle=False)
        assert (list(array.shape), array.dtype.name) == (entry["shape"], entry["dtype"])
        return array

    def value(self, name: str) -> np.ndarray:
        return self.array(self.index["values"][name])


def some(shape: tuple[int, ...], count: int = 40) -> Iterator[tuple[int, ...]]:
    """Places spread over an array, corners included."""
    places = list(itertools.product(*[range(n) for n in shape]))
    yield from places[:: max(1, len(places) // count)]
    yield places[-1]


def requantized(total: int, multiplier: np.float32, grid: dict[str, Any]) -> int:
    code = int(np.rint(F(total) * multiplier)) + grid["zero_point"]
    return min(max(code, grid["low"]), grid["high"])


def convolved(files: Files, step: dict[str, Any], place: tuple[int, ...]) -> int:
    """One output code of a convolution."""
    source, a = files.index["values"][step["inputs"][0]], step["attributes"]
    x, weight = files.value(step["inputs"][0]), files.array(step["weight"]["codes"])
    n, channel, row, column = place
    zero = int(files.array(step["weight"]["zero_point"])[channel])
    total = 0 if step["bias"] is None else int(files.array(step["bias"])[channel])
    per_group = weight.shape[0] // a["groups"]
    for c, i, j in itertools.product(*[range(size) for size in weight.shape[1:]]):
        y = row * a["stride"][0] - a["padding"][0] + i * a["dilation"][0]
        z = column * a["stride"][1] - a["padding"][1] + j * a["dilation"][1]
        if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
            code = int(x[n, channel // per_group * weight.shape[1] + c, y, z])
            total += (code - source["grid"]["zero_point"]) * (
                (int(weight[channel, c, i, j]) - zero) << step["weight"]["shift"]
            )
    return requantized(total, files.array(step["multiplier"])[channel], files.index["values"][step["output"]]["grid"])


@pytest.mark.parametrize(("name", "bits"), [("cifar_resnet", 4), ("mobilenet_v2", 2), ("depthwise_grouped", 8)])
def test_plain_loops_reproduce_convolutions_from_the_files(name: str, bits: int, tmp_path: Path) -> None:
    program = program_of(name, bits)
    write_vectors(program, NETWORKS[name].example(2, seed=3).numpy(), tmp_path / "vectors")
    files = Files(tmp_path / "vectors")
    layers = [step for step in files.index["steps"] if step["op"] == "conv2d" and step["kernel"] == "integer"]
    assert len(layers) > 2
    for step in layers:
        want = files.value(step["output"])
        for place in some(want.shape):
            assert convolved(files, step, place) == want[place], (step["output"], place)


def test_plain_loops_reproduce_the_linear_layer_the_image_and_moves(tmp_path: Path) -> None:
    program = program_of("cifar_resnet")
    write_vectors(program, NETWORKS["cifar_resnet"].example(2, seed=3).numpy(), tmp_path)
    files = Files(tmp_path)
    steps = {step["output"]: step for step in files.index["steps"]}
    linear = steps[files.index["output"]]
    x, weight = files.value(linear["inputs"][0]), files.array(linear["weight"]["codes"])
    zero = files.index["values"][linear["inputs"][0]]["grid"]["zero_point"]
    bias, multiplier = files.array(linear["bias"]), files.array(linear["multiplier"])
    for n, o in itertools.product(range(2), range(len(weight))):
        total = sum((int(q) - zero) * int(w) for q, w in zip(x[n], weight[o], strict=True)) + int(bias[o])
        assert F(total) * multiplier[o] == files.value(linear["output"])[n, o]

    image, grid = files.value("x"), files.index["values"]["x.codes"]["grid"]
    for place in some(image.shape):
        code = int(np.rint(image[place] / F(grid["scale"]))) + grid["zero_point"]
        assert min(max(code, grid["low"]), grid["high"]) == files.value("x.codes")[place]
    moved = next(s for s in files.index["steps"] if s["op"] == "pad")
    before, after = files.value(moved["inputs"][0]), files.value(moved["output"])
    assert moved["kernel"] == "codes"
    assert after.size > before.size
    assert set(np.unique(after)) <= {*np.unique(before), files.index["values"][moved["output"]]["grid"]["zero_point"]}


def test_the_index_describes_every_step_and_value(tmp_path: Path) -> None:
    program = program_of("squeezenet")
    images = NETWORKS["squeezenet"].example(2, seed=3).numpy()
    index = write_vectors(program, images, tmp_path)
    files = Files(tmp_path)
    assert index == tmp_path / "index.json"
    done = execute(program, images, keep=True)
    assert [s["output"] for s in files.index["steps"]] == [s.output for s in program.steps]
    for row, step in zip(files.index["steps"], program.steps, strict=True):
        assert np.array_equal(files.value(row["output"]), done.values[step.output])
        grid = files.index["values"][row["output"]]["grid"]
        assert (grid is None) == (step.grid is None)
        if step.grid is not None:
            assert F(grid["scale"]) == step.grid.scale
        if step.weight is not None:
            centered = files.array(row["weight"]["codes"]).astype(int)
            centered = centered - files.array(row["weight"]["zero_point"]).reshape(-1, *[1] * (centered.ndim - 1))
            assert np.array_equal(centered << row["weight"]["shift"], step.weight.centered)
            assert np.array_equal(files.array(row["weight"]["scale"]), step.weight.scale)
        assert row["exact"] == (step.output not in done.approximate)
        assert all(name in files.index["values"] or name in files.index["parameters"] for name in row["reads"])
    named = {entry["file"] for entry in entries(files.index)}
    assert {p.name for p in tmp_path.iterdir()} == {*named, "index.json"}


def entries(value: Any) -> Iterator[dict[str, Any]]:
    """All descriptions of arrays in an index."""
    if isinstance(value, dict) and "file" in value:
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from entries(item)


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    program, images = program_of("squeezenet"), NETWORKS["squeezenet"].example(1, seed=3).numpy()
    write_vectors(program, images, tmp_path)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_vectors(program, images, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first


def test_an_interrupted_folder_has_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, images = program_of("squeezenet"), NETWORKS["squeezenet"].example(1, seed=3).numpy()
    write_vectors(program, images, tmp_path)
    written = 0

    def full(path: Path, data: bytes) -> Path:
        nonlocal written
        written += 1
        if written == 5:
            raise RunFolderError(path, "cannot be written (No space left on device)", "free space there")
        return path

    monkeypatch.setattr(vectors, "write_atomic", full)
    with pytest.raises(RunFolderError):
        write_vectors(program, images, tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_names_become_files_of_their_own(tmp_path: Path) -> None:
    writer = vectors._Writer(program_of("squeezenet"), NETWORKS["squeezenet"].example(1).numpy(), tmp_path)
    names = [writer._file(name) for name in ("a/b", "a_b", "A_B", "..", "weight")]
    assert names == ["a_b.npy", "a_b.1.npy", "A_B.2.npy", "_.npy", "weight.npy"]
