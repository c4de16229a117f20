"""Channels with bits of their own, from the file to ONNX Runtime: nothing but the codes' places changes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_cases import relative, result
from safetensors.torch import load_file, save_file
from test_artifact import assert_same, saved, unpacked
from test_executor import assert_equal, runtime_values
from torch import Tensor, fx, nn

from calibquant.errors import RunFolderError
from calibquant.export.amct import amct_config
from calibquant.export.artifact import GRAPH, MODEL, load_artifact, size_of
from calibquant.export.audit import audit
from calibquant.export.executor import execute
from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import deploy_onnx
from calibquant.export.onnx_writer import fake_quant_onnx
from calibquant.export.parity import check_parity, in_chunks
from calibquant.export.record import record, record_text
from calibquant.graph import capture, fold_batch_norm
from calibquant.numerics.grid import Grid
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.quantization.allocation import quantize_channels
from calibquant.recipe import QuantRecipe, WeightRecipe

BITS = {"0.weight": [0, 2, 3, 4, 8, 8, 0, 4], "2.weight": [3, 0, 2, 4, 4, 3], "5.weight": [4, 2, 0, 3, 2]}


@cache
def graph_of() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(6 * 16, 5),
        ).eval()  # fmt: skip
    return fold_batch_norm(capture(net, torch.zeros(2, 3, 9, 9)))


def images(count: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


@cache
def model_of(symmetric: bool, allocation: str = "banner", placement: str = "integer") -> QuantModel:
    """The network with `BITS` in place of what an allocation finds; to be read only."""
    weights = {"bits": 3, "symmetric": symmetric, "observer": "minmax", "allocation": allocation}
    recipe = QuantRecipe.model_validate(
        {"weights": weights, "activations": {"bits": 8, "observer": "minmax"}, "boundary": "none",
         "placement": placement}
    )  # fmt: skip
    model = QuantModel(graph_of(), make_plan(graph_of(), recipe))
    calibrate_weights(model, recipe)
    parameters = dict(model.teacher.named_buffers())
    for name, bits in BITS.items():
        plan = model.plan.weights[name]
        model.weight_quantizers[name].set(
            quantize_channels(parameters[name], recipe.weights, plan, placement, np.array(bits))
        )
    calibrate_activations(model, recipe.activations, [images()])
    return model


@pytest.mark.parametrize("symmetric", [False, True])
def test_onnx_runtime_the_executor_and_the_simulation_agree(symmetric: bool) -> None:
    """0, 2, 3, 4 and 8 bits in one tensor: codes are equal in all three."""
    model, x = model_of(symmetric), images(8, seed=2)
    program = make_program(model)
    weights = {step.weight.name: step.weight for step in program.steps if step.weight is not None}
    assert {name: weight.bits for name, weight in weights.items()} == {"0.weight": 8, "2.weight": 4, "5.weight": 4}
    done = execute(program, x.numpy(), keep=True)
    assert assert_equal(program, done, runtime_values(program, x)) > 1000
    parity = check_parity({"deploy.onnx": deploy_onnx(program, x)}, model, program, in_chunks(x), threads=1)
    assert sum(row.differing for row in parity.executor) == 0
    assert sum(row.differing for row in parity.simulation) == 0
    assert parity.files[0].relative < 1e-5
    old = deploy_onnx(program, x, "int8")
    np.testing.assert_array_equal(result(old, x), result(deploy_onnx(program, x), x))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_tensor_lies_in_the_container_of_its_widest_channel(symmetric: bool) -> None:
    """The first weight has a channel of 8 bits, whose pairs of products could pass 16 bits: it is stored as uint8."""
    file = onnx.load_from_string(deploy_onnx(make_program(model_of(symmetric)), images(2)))
    kinds = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in file.graph.initializer}
    four = "INT4" if symmetric else "UINT4"
    assert {n: k for n, k in kinds.items() if n.endswith("weight.codes")} == {
        "0.weight.codes": "UINT8", "2.weight.codes": four, "5.weight.codes": four,
    }  # fmt: skip


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_bias_of_a_channel_without_bits_is_all_that_it_gives_and_is_precise(symmetric: bool) -> None:
    """Its step is the input's scale / 4096, so that the output is the bias to within half of that."""
    model, x = model_of(symmetric), images(4)
    source, quantizer, bias = model.biases()["_0"]
    rounded = model.simulation.get_submodule("bias_roundings._0")(bias)
    empty = [0, 6]
    step = float(source.get()[0]) / 4096
    assert (rounded - bias).abs()[empty].max() <= step / 2 * (1 + 1e-6)
    assert quantizer.get().scale[empty].tolist() == [1.0, 1.0]
    assert not quantizer.get().dequantize()[empty].any()
    product = next(step for step in make_program(model).steps if step.is_product)
    assert product.weight is not None
    assert product.bias is not None
    assert not product.weight.centered[empty].any()
    steps = np.rint(bias.numpy()[empty] / step)
    assert product.bias[empty].tolist() == steps.tolist()
    rows = [row for row in audit(make_program(model)) if row.step == product.output and row.channel in empty]
    assert [(row.lowest, row.highest) for row in rows] == [(int(s), int(s)) for s in steps]
    with torch.no_grad():
        out = model.simulation(x)
    assert torch.isfinite(out).all()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["integer", "academic"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_loaded_is_what_was_saved(symmetric: bool, placement: str, tmp_path: Path) -> None:
    model = model_of(symmetric, placement=placement)
    loaded = load_artifact(saved(model, tmp_path))
    assert_same(model, loaded, images(4, seed=5))
    for name, bits in BITS.items():
        q = loaded.weight_quantizers[name].get()
        assert q.channel_bits is not None
        assert (q.channel_bits.dtype, q.channel_bits.tolist()) == (torch.int32, bits)
        assert q.grid == model.weight_quantizers[name].get().grid
    assert [r.note for r in loaded.coverage()] == [r.note for r in model.coverage()]


def test_symmetric_weights_on_unsigned_grids_too(tmp_path: Path) -> None:
    """A plan edited by hand may ask for them; their zero points are not stored."""
    recipe = QuantRecipe.model_validate({"weights": {"allocation": "banner", "observer": "minmax"}})
    made = make_plan(graph_of(), recipe)
    weights = {name: replace(plan, grid=Grid(4), symmetric=True) for name, plan in made.weights.items()}
    model = QuantModel(graph_of(), replace(made, weights=weights))
    calibrate_weights(model, recipe)
    model.weight_quantizers["2.weight"].set(
        quantize_channels(
            dict(model.teacher.named_buffers())["2.weight"], recipe.weights, weights["2.weight"], "integer",
            np.array(BITS["2.weight"]),
        )
    )  # fmt: skip
    calibrate_activations(model, recipe.activations, [images()])
    assert model.weight_quantizers["2.weight"].get().zero_point.tolist() == [4, 0, 2, 8, 8, 4]
    assert_same(model, load_artifact(saved(model, tmp_path)), images(4, seed=5))


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_file_holds_each_channel_in_its_own_bits(symmetric: bool, tmp_path: Path) -> None:
    """Sizes by hand, and one tensor read as a string of digits."""
    model = model_of(symmetric)
    run = saved(model, tmp_path)
    tensors = load_file(run.path / MODEL)
    # 27 weights a channel, 29 bits: 783 bits; 72 and 16 bits: 1152; 96 and 11 bits: 1056
    assert [len(tensors[f"{n}.codes"]) for n in BITS] == [98, 144, 132]
    assert [tensors[f"{n}.channel_bits"].tolist() for n in BITS] == list(BITS.values())
    # zero points: 29, 16 and 11 bits
    assert [len(tensors.get(f"{n}.zero_point", [])) for n in BITS] == ([0, 0, 0] if symmetric else [4, 2, 2])
    digits = "".join(f"{byte:08b}" for byte in tensors["0.weight.codes"].tolist())
    q, at = model.weight_quantizers["0.weight"].get(), 0
    for c, b in enumerate(BITS["0.weight"]):
        low = -(2 ** (b - 1)) if symmetric and b else 0
        for code in q.codes[c].flatten().tolist() if b else []:
            assert int(digits[at : at + b], 2) + low == code
            at += b
    assert digits[at:] == "0"
    size = size_of(model)
    assert size.codes == 98 + 144 + 132
    assert size.packed == sum(t.numel() * t.element_size() for t in tensors.values())
    weights = [27 * 8, 72 * 6, 96 * 5]
    assert size.weight_bits == pytest.approx((27 * 29 + 72 * 16 + 96 * 11) / sum(weights))
    assert json.loads(run.read(GRAPH))["weights"]["0.weight"]["allocation"] == "banner"


def test_a_plan_without_allocation_is_written_as_ever(tmp_path: Path) -> None:
    """No new key, no new tensor: files of version 1 read and write as before."""
    recipe = QuantRecipe(weights=WeightRecipe(reach="full"))
    model = QuantModel(graph_of(), make_plan(graph_of(), recipe))
    calibrate_weights(model, recipe)
    calibrate_activations(model, recipe.activations, [images()])
    run = saved(model, tmp_path)
    rows = json.loads(run.read(GRAPH))
    plans = [*rows["weights"].values(), *rows["activations"]]
    assert all(set(row) - {"shape", "node"} == {"bits", "signed", "symmetric", "axis", "role"} for row in plans)
    assert not any("channel_bits" in name for name in load_file(run.path / MODEL))
    stored = load_file(run.path / MODEL)
    assert unpacked(stored["2.weight.codes"].numpy(), 6 * 72, 4).max() <= 15


def test_damaged_bits_do_not_fit(tmp_path: Path) -> None:
    run = saved(model_of(False), tmp_path)
    for change in ([9, *BITS["2.weight"][1:]], BITS["2.weight"][1:], [4, *BITS["2.weight"][1:]]):
        tensors = load_file(run.path / MODEL)
        tensors["2.weight.channel_bits"] = torch.tensor(change, dtype=torch.uint8)
        save_file(tensors, tmp_path / MODEL)
        with pytest.raises(RunFolderError, match="does not fit"):
            load_artifact(run)
        saved(model_of(False), tmp_path)


@pytest.mark.parametrize("symmetric", [False, True])
def test_records_name_the_widest_and_each_channels_bits(symmetric: bool) -> None:
    model = model_of(symmetric)
    row = record(model)[1]["weight"]
    assert (row["bits"], row["channel_bits"]) == (4, BITS["2.weight"])
    assert row["scale"][1] == 1.0
    text = record_text(model).split("record {")[2]
    offsets = [int(line.split()[1]) for line in text.splitlines() if "offset_w" in line]
    zeros = model.weight_quantizers["2.weight"].get().zero_point.tolist()
    assert offsets == [z if symmetric else z - 8 for z in zeros]
    config = amct_config(model, QuantRecipe(), 1, False)
    assert [config[str(i)]["weight_quant_params"]["num_bits"] for i in (0, 2, 5)] == [8, 4, 4]


def test_the_simulation_as_onnx() -> None:
    model, x = model_of(False), images(4, seed=7)
    with torch.no_grad():
        assert relative(model(x), result(fake_quant_onnx(model, x), x)) < 1e-5
