"""The artifact: exactly the network again without user code, really small, readable by plain numpy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from networks import NETWORKS, folded, quantized
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from calibquant.errors import QuantizationError
from calibquant.export.artifact import GRAPH, MODEL, load, load_artifact, save_artifact, size_of
from calibquant.graph import capture, fold_batch_norm
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import ActivationRecipe, Placement, QuantRecipe, WeightRecipe
from calibquant.runfolder import RunFolder
from calibquant.zoo.cifar_resnet import CifarResNet


def recipe_of(
    bits: int = 4, activations: int | None = None, placement: Placement = "integer", symmetric: bool = False,
    per_tensor: bool = False, dynamic: bool = False,
) -> QuantRecipe:  # fmt: skip
    granularity: Literal["per_tensor", "per_channel"] = "per_tensor" if per_tensor else "per_channel"
    return QuantRecipe(
        placement=placement,
        weights=WeightRecipe(bits=bits, symmetric=symmetric, granularity=granularity, observer="minmax"),
        activations=ActivationRecipe(
            bits=activations or bits, symmetric=symmetric, dynamic=dynamic, observer="minmax"
        ),
    )  # fmt: skip


def model_of(name: str, recipe: QuantRecipe) -> QuantModel:
    return quantized(folded(name), recipe, NETWORKS[name].example(4, seed=1))


def saved(model: QuantModel, folder: Path) -> RunFolder:
    run = RunFolder(folder)
    save_artifact(model, run)
    return run


def assert_same(model: QuantModel, loaded: QuantModel, x: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))
    assert loaded.plan == model.plan
    assert list(loaded.weight_quantizers) == list(model.weight_quantizers)
    for name, quantizer in model.weight_quantizers.items():
        a, b = quantizer.get(), loaded.weight_quantizers[name].get()
        for field in ("codes", "scale", "zero_point"):
            want, got = getattr(a, field), getattr(b, field)
            assert torch.equal(want, got)
            assert want.dtype == got.dtype
    for name, activation in model.activation_quantizers.items():
        other = loaded.activation_quantizers[name]
        assert other.dynamic is activation.dynamic
        if not activation.dynamic:
            assert torch.equal(activation.scale, other.scale)
            assert torch.equal(activation.zero_point, other.zero_point)


@pytest.mark.parametrize("placement", ["integer", "academic"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("name", ["cifar_resnet", "unet", "tied_embedding"])
def test_what_is_loaded_is_what_was_saved(name: str, bits: int, placement: Placement, tmp_path: Path) -> None:
    model = model_of(name, recipe_of(bits, placement=placement))
    assert_same(model, load_artifact(saved(model, tmp_path)), NETWORKS[name].example(3, seed=2))


@pytest.mark.parametrize(
    "name", ["mobilenet_v3", "squeezenet", "convnext", "tied_linears", "attention", "same_padding"]
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "options",
    [{"dynamic": True}, {"per_tensor": True}, {"symmetric": True}, {"bits": 3, "activations": 8}],
    ids=lambda options: next(iter(options)),
)
def test_other_grids_and_networks_too(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(name, recipe_of(**options))
    assert_same(model, load_artifact(saved(model, tmp_path)), NETWORKS[name].example(3, seed=2))


def test_float_weights_of_a_loaded_network_are_the_dequantized_codes(tmp_path: Path) -> None:
    model = model_of("cifar_resnet", recipe_of())
    loaded = load_artifact(saved(model, tmp_path))
    for name, tensor in loaded.teacher.named_buffers():
        if name in loaded.weight_quantizers:
            assert torch.equal(tensor, model.weight_quantizers[name].get().dequantize())
        else:
            assert torch.equal(tensor, dict(model.teacher.named_buffers())[name])


def test_loading_needs_no_user_code(tmp_path: Path) -> None:
    model = model_of("mobilenet_v2", recipe_of())
    run = saved(model, tmp_path / "run") if (tmp_path / "run").mkdir() is None else None
    assert run is not None
    run.seal({})
    x = NETWORKS["mobilenet_v2"].example(3)
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = (
        "import sys, calibquant\n"
        "model = calibquant.load(sys.argv[1])\n"
        "assert not any(m == 'networks' or m.startswith(('networks.', 'calibquant.zoo')) for m in sys.modules)\n"
        "from safetensors.torch import load_file, save_file\n"
        "save_file({'y': model(load_file(sys.argv[2])['x'])}, sys.argv[3])\n"
    )
    files = [tmp_path / "run", tmp_path / "x.safetensors", tmp_path / "y.safetensors"]
    subprocess.run([sys.executable, "-c", script, *files], check=True, cwd=tmp_path, capture_output=True)
    logits = load_file(tmp_path / "y.safetensors")["y"]
    torch.testing.assert_close(logits, model(x), rtol=1e-6, atol=1e-6)  # other thread counts sum in another order
    assert torch.equal(load(tmp_path / "run")(x), model(x))


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet20() -> fx.GraphModule:
    torch.manual_seed(0)
    return fold_batch_norm(capture(CifarResNet(3).eval(), torch.randn(2, 3, 32, 32)))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("placement", ["integer", "academic"])
def test_the_file_holds_packed_codes(resnet20: fx.GraphModule, bits: int, placement: Placement, tmp_path: Path) -> None:
    model = quantized(resnet20, recipe_of(bits, placement=placement), torch.randn(4, 3, 32, 32))
    tensors = load_file(saved(model, tmp_path).path / MODEL)
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    # by hand: 16·3·9 + 6·(16·16·9) + 16·32·9 + 5·(32·32·9) + 32·64·9 + 5·(64·64·9) + 64·10 weights, the ends at 8
    # bits, which integer kernels that add pairs of products in 16 bits take as 7
    ends, inner = 16 * 3 * 9 + 640, 6 * 2304 + 4608 + 5 * 9216 + 18432 + 5 * 36864
    weight_bits = (7 if placement == "integer" else 8) * ends + bits * inner
    float_bits = 32 * sum(t.numel() for t in tensors.values() if t.dtype == torch.float32)
    assert stored <= 1.02 * (weight_bits + float_bits) / 8
    assert sum(t.numel() for n, t in tensors.items() if n.endswith(".codes")) == weight_bits // 8
    # what stays float: a bias and a scale for each of 16·7 + 32·6 + 64·6 channels and 10 classes, activations' scales
    channels = 16 * 7 + 32 * 6 + 64 * 6 + 10
    assert float_bits == 32 * (2 * channels + len(model.activation_quantizers))


@pytest.mark.parametrize("options", [{}, {"bits": 3}, {"dynamic": True}, {"per_tensor": True}, {"symmetric": True}])
@pytest.mark.parametrize("name", ["cifar_resnet", "convnext", "tied_embedding", "functional_conv", "bn_before_conv"])
def test_size_of_equals_the_files_bytes(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(name, recipe_of(**options))
    tensors = load_file(saved(model, tmp_path).path / MODEL)
    size = size_of(model)
    assert size.packed == sum(t.numel() * t.element_size() for t in tensors.values())
    assert size.codes == sum(t.numel() for n, t in tensors.items() if n.endswith(".codes"))
    parameters = dict(model.teacher.named_buffers())
    assert size.float32 == 4 * sum(t.numel() for t in parameters.values())
    assert size.remainder == 4 * sum(t.numel() for n, t in parameters.items() if n in tensors)
    assert size.packed == size.codes + size.scales + size.remainder


# --- the file by plain numpy ------------------------------------------------------------------------------------------


def raw_tensors(data: bytes) -> dict[str, np.ndarray]:
    """safetensors by its specification: length of the header, header, bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    dtypes = {"F32": "<f4", "U8": "u1", "I32": "<i4"}
    return {
        name: np.frombuffer(data[8 + length :][slice(*row["data_offsets"])], dtypes[row["dtype"]]).reshape(row["shape"])
        for name, row in header.items()
        if name != "__metadata__"
    }


def unpacked(stream: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Codes from a stream of bits, most significant first, as one string of digits."""
    digits = "".join(f"{byte:08b}" for byte in stream.tobytes())
    assert len(digits) - count * bits < 8
    assert set(digits[count * bits :]) <= {"0"}
    return np.array([int(digits[i * bits : (i + 1) * bits], 2) for i in range(count)])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_a_layer_by_plain_numpy(bits: int, symmetric: bool, tmp_path: Path) -> None:
    model = model_of("lenet", recipe_of(bits, symmetric=symmetric, placement="academic"))
    run = saved(model, tmp_path)
    stored, rows = raw_tensors(run.read(MODEL)), json.loads(run.read(GRAPH))["weights"]
    name = "c3.weight"
    row = rows[name]
    assert (row["bits"], row["symmetric"], row["axis"], row["shape"]) == (bits, symmetric, 0, [16, 6, 5, 5])
    codes = unpacked(stored[f"{name}.codes"], 16 * 6 * 25, bits).reshape(row["shape"])
    assert (f"{name}.zero_point" in stored) is not symmetric
    zero = np.full(16, 2 ** (bits - 1)) if symmetric else unpacked(stored[f"{name}.zero_point"], 16, bits)
    scale = stored[f"{name}.scale"]
    values = (codes - zero[:, None, None, None]).astype(np.float32) * scale[:, None, None, None]
    assert np.array_equal(values, model.weight_quantizers[name](torch.zeros(0)).numpy())
    original = dict(model.teacher.named_buffers())[name].numpy()
    assert np.abs(values - original).max() <= scale.max() * 1.01


@pytest.mark.parametrize("calibrated", ["weights", "activations"])
def test_what_is_not_calibrated_cannot_be_saved(calibrated: str, tmp_path: Path) -> None:
    recipe = recipe_of()
    model = QuantModel(folded("lenet"), make_plan(folded("lenet"), recipe))
    if calibrated == "weights":
        calibrate_weights(model, recipe)
    else:
        calibrate_activations(model, recipe.activations, [NETWORKS["lenet"].example(4)])
    with pytest.raises(QuantizationError, match="is not calibrated"):
        save_artifact(model, RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())
