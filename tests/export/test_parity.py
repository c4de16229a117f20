"""Parity: equal files pass with counts of zero, and every kind of deviation beyond its bound is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import NETWORKS, folded, quantized
from onnx import helper, numpy_helper
from torch import Tensor

from calibquant.errors import RunFolderError
from calibquant.export import parity as module
from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import deploy_onnx
from calibquant.export.onnx_writer import fake_quant_onnx, float_onnx
from calibquant.export.parity import DEPLOY, FAKE_QUANT, FLOAT, Parity, check_parity
from calibquant.quantization import QuantModel
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe

NAME = "lenet"


@cache
def model_of(bits: int = 4, name: str = NAME) -> QuantModel:
    recipe = QuantRecipe(
        weights=WeightRecipe(bits=bits, observer="minmax"), activations=ActivationRecipe(bits=bits, observer="minmax")
    )
    return quantized(folded(name), recipe, NETWORKS[name].example(8, seed=1))


def images_of(count: int = 12) -> Tensor:
    return NETWORKS[NAME].example(count, seed=2)


@cache
def files_of(bits: int = 4, name: str = NAME) -> dict[str, bytes]:
    model, images = model_of(bits, name), NETWORKS[name].example(2)
    return {
        FLOAT: float_onnx(model, images),
        FAKE_QUANT: fake_quant_onnx(model, images),
        DEPLOY: deploy_onnx(make_program(model), images),
    }


def check(files: dict[str, bytes], count: int = 12, bits: int = 4) -> Parity:
    return check_parity(files, model_of(bits), make_program(model_of(bits)), images_of(count), threads=1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_files_as_written_pass(bits: int) -> None:
    parity = check(files_of(bits), bits=bits)
    assert [(f.file, f.against, f.decisions) for f in parity.files] == [
        (FLOAT, "float network", 12), (FAKE_QUANT, "simulation", 12), (DEPLOY, "simulation", 12),
    ]  # fmt: skip
    assert parity.files[0].relative < 1e-5
    sites = {name for name, q in model_of(bits).activation_quantizers.items()}
    assert {row.step.removesuffix(".codes") for row in parity.simulation} == sites
    assert all(row.count > 0 for row in (*parity.simulation, *parity.executor))
    program = make_program(model_of(bits))
    assert [row.step for row in parity.executor] == [s.output for s in program.steps if s.grid is not None]
    if not parity.saturating:
        assert {row.differing for row in parity.executor if row.step not in parity.approximate} == {0}
    assert json.loads(json.dumps(parity.to_dict(), allow_nan=False))["images"] == 12


def test_codes_are_counted_over_all_images() -> None:
    """12 images are more than one chunk."""
    rows = {row.step: row.count for row in check(files_of()).executor}
    assert rows["x.codes"] == images_of().numel()


def edited(data: bytes, change: Callable[[onnx.ModelProto], None]) -> bytes:
    proto = onnx.load_from_string(data)
    change(proto)
    return proto.SerializeToString()


def behind(op: str, *constants: np.ndarray) -> Callable[[onnx.ModelProto], None]:
    """Put an op between the network and its output."""

    def change(proto: onnx.ModelProto) -> None:
        old = proto.graph.output[0].name
        names = [f"added.{i}" for i in range(len(constants))]
        proto.graph.initializer.extend(numpy_helper.from_array(c, n) for c, n in zip(constants, names, strict=True))
        proto.graph.node.append(helper.make_node(op, [old, *names], ["changed"]))
        proto.graph.output[0].name = "changed"

    return change


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (FLOAT, behind("Mul", np.float32([1.01])), r"float.onnx: is [\d.e-]+ off the float network on 12 images; rep"),
        (FLOAT, behind("Log"), "float.onnx: gives outputs of another shape than the float network, or NaN, on 12"),
        (FAKE_QUANT, behind("Neg"), r"fake_quant.onnx: changes 12 of 12 decisions of the simulation on 12"),
        (DEPLOY, behind("Neg"), r"deploy.onnx: changes 12 of 12 decisions of the simulation on 12 images; re"),
        (DEPLOY, behind("ReduceSum"), "deploy.onnx: gives outputs of another shape"),
    ],
)
def test_an_output_beyond_its_bound_is_one_line(
    file: str, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    files = files_of() | {file: edited(files_of()[file], change)}
    with pytest.raises(RunFolderError, match=message) as error:
        check(files)
    assert "\n" not in str(error.value)


def test_a_file_that_does_not_load_is_one_line() -> None:
    def unknown(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].op_type = "Unheard"

    for name in files_of():
        broken = edited(files_of()[name], unknown)
        with pytest.raises(RunFolderError, match=rf"{name}: does not load \(ONNX Runtime [\d.]+: .*Unheard") as error:
            check(files_of() | {name: broken})
        assert "\n" not in str(error.value)
        for data in (b"", b"\x00" * 100, files_of()[name][:200]):
            with pytest.raises(RunFolderError, match=f"{name}: .*is not an ONNX file, or is damaged"):
                check(files_of() | {name: data})


def test_one_other_code_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that differs by one step in the file: the decisions stay, the codes do not."""
    program = make_program(model_of())
    steps = list(program.steps)
    place = next(i for i, step in enumerate(steps) if step.weight is not None)
    codes = steps[place].weight.codes.copy()
    codes.flat[0] += 1 if codes.flat[0] < 8 else -1
    steps[place] = replace(steps[place], weight=replace(steps[place].weight, codes=codes))
    wrong = deploy_onnx(replace(program, steps=tuple(steps)), images_of(2))
    monkeypatch.setattr(module, "CPU_INFO", Path(__file__))  # this file says vnni
    with pytest.raises(
        RunFolderError,
        match=r"deploy.onnx: differs from the integer executor in \d+ of \d+ codes of '\w+', by up to \d",
    ):
        check(files_of() | {DEPLOY: wrong})


def test_few_changed_decisions_are_told_with_their_margins() -> None:
    with torch.no_grad():
        logits = model_of()(images_of(64)).numpy()
    order = np.sort(logits, axis=1)
    image = int(np.argmin(order[:, -1] - order[:, -2]))
    second = int(np.argsort(logits[image])[-2])
    shift = np.zeros(logits.shape[1], np.float32)
    shift[second] = (order[image, -1] - order[image, -2]) * 1.01 + 1e-6
    changed = edited(files_of()[FAKE_QUANT], behind("Add", shift))
    parity = check({FAKE_QUANT: changed}, 64)
    (flip,) = parity.files[0].flips
    assert (flip.image, flip.reference, flip.exported) == (image, int(logits[image].argmax()), second)
    assert flip.margin == pytest.approx(float(order[image, -1] - order[image, -2]))
    assert flip.within


def test_machines_whose_kernels_saturate_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(module, "CPU_INFO", info)
    for flags, bits, expected in (("avx2", 8, True), ("avx2", 2, False), ("avx2 avx512_vnni", 8, False)):
        info.write_text(f"flags: {flags}\n")
        # with 8-bit ends a network of low bits has a layer that may saturate, so that only inner ones are looked at
        model = model_of(bits)
        program = make_program(model)
        inner = replace(program, steps=tuple(s for s in program.steps if s.weight is None or s.weight.bits == bits))
        assert module._saturates(inner) is expected
    monkeypatch.setattr(module.platform, "machine", lambda: "arm64")
    assert not module._saturates(make_program(model_of(8)))


def test_a_network_of_maps_has_no_decisions() -> None:
    model = model_of(8, "unet")
    images = NETWORKS["unet"].example(3, seed=4)
    parity = check_parity(files_of(8, "unet"), model, make_program(model), images, threads=1)
    assert {file.decisions for file in parity.files} == {None}
    wrong = edited(files_of(8, "unet")[FAKE_QUANT], behind("Neg"))
    with pytest.raises(RunFolderError, match=r"fake_quant.onnx: is [\d.]+ % off the simulation on 3 images"):
        check_parity({FAKE_QUANT: wrong}, model, None, images, threads=1)
