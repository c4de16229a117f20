"""Parity: equal files pass with counts of zero, and every kind of deviation beyond its bound is one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import onnx
import pytest
import torch
from networks import NETWORKS, folded, quantized
from onnx import helper, numpy_helper
from test_saturation import heavy
from torch import Tensor

from calibquant.export import code_parity
from calibquant.export import parity as module
from calibquant.export.executor import execute
from calibquant.export.file_names import DEPLOY, FAKE_QUANT, FLOAT
from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import deploy_onnx
from calibquant.export.onnx_writer import fake_quant_onnx, float_onnx
from calibquant.export.parity import Parity, check_parity, image_count, in_chunks
from calibquant.export.processor import NOT_SATURATING, runtime_saturates
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
    chunks = in_chunks(images_of(count))
    return check_parity(files, model_of(bits), make_program(model_of(bits)), chunks, threads=1)


def fault(files: dict[str, bytes], name: str) -> str:
    """Why one file must not be used; the others are right, and stay."""
    faults = check(files).faults
    assert list(faults) == [name]
    assert "\n" not in faults[name]
    return faults[name]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_files_as_written_pass(bits: int) -> None:
    parity = check(files_of(bits), bits=bits)
    assert [(f.file, f.against, f.decisions) for f in parity.files] == [
        (FLOAT, "float network", 12), (FAKE_QUANT, "simulation", 12), (DEPLOY, "simulation", 12),
        (DEPLOY, "integer network", 12),
    ]  # fmt: skip
    assert not parity.faults
    assert parity.exact_on == "every processor"
    assert not parity.files[-1].flips
    assert parity.files[-1].largest == 0
    assert parity.files[0].relative < 1e-5
    sites = {name for name, q in model_of(bits).activation_quantizers.items()}
    assert {row.step.removesuffix(".codes") for row in parity.simulation} == sites
    assert all(row.count > 0 for row in (*parity.simulation, *parity.executor))
    program = make_program(model_of(bits))
    coded = [s.output for s in program.steps if s.grid is not None]
    assert [row.step for row in parity.executor] == [*coded, program.output]
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


def test_decisions_are_compared_on_more_images_than_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CODED", 8)
    parity = check(files_of(), 40)
    assert parity.images == 40
    assert {(f.file, f.against): f.images for f in parity.files} == {
        (FLOAT, "float network"): 8, (FAKE_QUANT, "simulation"): 8, (DEPLOY, "simulation"): 8,
        (DEPLOY, "integer network"): 40,
    }  # fmt: skip
    assert {row.step: row.count for row in parity.executor}["x.codes"] == 8 * images_of(1).numel()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (FLOAT, behind("Mul", np.float32([1.01])), r"is [\d.e-]+ off the float network on 12 images; rep"),
        (FLOAT, behind("Log"), "gives outputs of another shape than the float network, or NaN, on 12"),
        (FAKE_QUANT, behind("Neg"), r"changes 12 of 12 decisions of the simulation; rep"),
        (FAKE_QUANT, behind("Mul", np.float32([1.4])), r"is [\d.]+ % off the simulation on average, on 12 images; rep"),
        (DEPLOY, behind("Neg"), r"node fc3: \d+ of \d+ codes differ from the integer network"),
        (DEPLOY, behind("Add", np.float32([1e-5])), r"node fc3: \d+ of \d+ codes differ from the integer network"),
        (DEPLOY, behind("ReduceSum"), "gives outputs of another shape than the integer network"),
    ],
)
def test_an_output_beyond_its_bound_is_one_line(
    file: str, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    assert re.match(message, fault(files_of() | {file: edited(files_of()[file], change)}, file))


def test_a_file_that_does_not_load_is_one_line() -> None:
    def unknown(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].op_type = "Unheard"

    for name in files_of():
        broken = edited(files_of()[name], unknown)
        assert re.match(r"does not load \(ONNX Runtime [\d.]+: .*Unheard", fault(files_of() | {name: broken}, name))
        for data in (b"", b"\x00" * 100, files_of()[name][:200]):
            assert "is not an ONNX file, or is damaged" in fault(files_of() | {name: data}, name)


def test_one_other_code_is_a_fault() -> None:
    """A weight that differs by one step in the file: the decisions stay, the codes do not."""
    program = make_program(model_of())
    steps = list(program.steps)
    place = next(i for i, step in enumerate(steps) if step.weight is not None)
    codes = steps[place].weight.codes.copy()
    codes.flat[0] += 1 if codes.flat[0] < 8 else -1
    steps[place] = replace(steps[place], weight=replace(steps[place].weight, codes=codes))
    wrong = deploy_onnx(replace(program, steps=tuple(steps)), images_of(2))
    found = fault(files_of() | {DEPLOY: wrong}, DEPLOY)
    step = program.steps[place].output
    assert re.match(
        rf"node {step}: [\d,]+ of [\d,]+ codes differ from the integer network, by up to \d+ steps \(ONNX Runtime",
        found,
    ), "the step itself is named, not what follows it"


def test_few_changed_decisions_are_told_with_their_margins() -> None:
    with torch.no_grad():
        logits = model_of()(images_of(32)).numpy()
    order = np.sort(logits, axis=1)
    image = int(np.argmin(order[:, -1] - order[:, -2]))
    second = int(np.argsort(logits[image])[-2])
    shift = np.zeros(logits.shape[1], np.float32)
    shift[second] = (order[image, -1] - order[image, -2]) * 1.01 + 1e-6
    changed = edited(files_of()[FAKE_QUANT], behind("Add", shift))
    parity = check({FAKE_QUANT: changed}, 32)
    (flip,) = parity.files[0].flips
    assert (flip.image, flip.reference, flip.exported) == (image, int(logits[image].argmax()), second)
    assert flip.margin == pytest.approx(float(order[image, -1] - order[image, -2]), rel=1e-4)
    assert flip.within


@pytest.mark.parametrize("saturates", [True, False])
def test_full_reach_names_the_processors(saturates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that differ because the processor saturates say so, and what to do.

    The executor computes as the other kind of processor does; only the words depend on what the processor is held for.
    """
    model, images = heavy("full")
    program = make_program(model)
    monkeypatch.setattr(module, "runtime_saturates", lambda: saturates)
    monkeypatch.setattr(code_parity, "execute", partial(execute, saturating=not runtime_saturates()))
    parity = check_parity({DEPLOY: deploy_onnx(program, images[:1])}, model, program, in_chunks(images), threads=1)
    assert parity.exact_on == NOT_SATURATING
    assert parity.saturating is saturates
    reason = parity.faults[DEPLOY]
    assert re.match(r"node relu: [\d,]+ of [\d,]+ codes differ from the integer network", reason)
    assert ("because this processor (x86 without VNNI) saturates" in reason) is saturates
    assert ("use quant.weights.reach=auto" in reason) is saturates


def test_float_steps_are_fed_the_runtimes_codes_and_named() -> None:
    """Softmax is computed in float by the runtime: within one step, and a difference there taints no other step."""
    model = model_of(8, "attention")
    program = make_program(model)
    images = NETWORKS["attention"].example(12, seed=3)
    parity = check_parity(files_of(8, "attention"), model, program, in_chunks(images), threads=1)
    assert not parity.faults
    assert "softmax" in parity.approximate
    ops = {step.output: step.op for step in program.steps}
    assert {ops[name] for name in parity.approximate} <= {"softmax", "layer_norm", "gelu", "mean"}
    assert {row.differing for row in parity.executor if row.step not in parity.approximate} == {0}
    assert {row.largest for row in parity.executor if row.step in parity.approximate} <= {0, 1}


def test_a_network_of_maps_has_no_decisions() -> None:
    model = model_of(8, "unet")
    images = NETWORKS["unet"].example(3, seed=4)
    parity = check_parity(files_of(8, "unet"), model, make_program(model), in_chunks(images), threads=1)
    assert {file.decisions for file in parity.files} == {None}
    wrong = edited(files_of(8, "unet")[FAKE_QUANT], behind("Neg"))
    parity = check_parity({FAKE_QUANT: wrong}, model, None, in_chunks(images), threads=1)
    assert re.match(r"is [\d.]+ % off the simulation on average, on 3 images", parity.faults[FAKE_QUANT])


def test_large_images_are_fewer() -> None:
    assert image_count((8, 3, 32, 32)) == 256
    assert image_count((8, 3, 224, 224), 100) == 100
    assert image_count((8, 3, 2000, 2000)) == 16
    assert [len(x) for (x,) in in_chunks(torch.zeros(3, 3, 1000, 1000))] == [1, 1, 1]
