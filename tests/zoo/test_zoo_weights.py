"""Weights: every form that loads, and every error; a file never runs code and never half-loads."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from calibquant import zoo
from calibquant.errors import ModelError
from calibquant.recipe import ModelRecipe

State = dict[str, Tensor]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return zoo.build("digits_resnet")


@pytest.fixture
def other() -> State:
    torch.manual_seed(2)
    return zoo.build("digits_resnet").state_dict()


def same(network: nn.Module, state: State) -> bool:
    return all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "net": lambda state: {"net": state, "acc": 0.9},
    "pycls": lambda state: {"epoch": 99, "model_state": state, "optimizer_state": {}},
    "EMA only": lambda state: {"state_dict_ema": state},
    "module.": lambda state: {"state_dict": prefixed(state, "module.")},
    "compiled": lambda state: prefixed(state, "module._orig_mod."),
    "compiled inside": lambda state: prefixed(state, "_orig_mod.module."),
    "no counters": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    "parameters": lambda state: {key: nn.Parameter(v, requires_grad=False) for key, v in state.items()},
    "double": lambda state: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zipped", [True, False])
def test_forms_that_load(form: str, zipped: bool, network: nn.Module, other: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth.tar"
    torch.save(FORMS[form](other), path, _use_new_zipfile_serialization=zipped)
    assert zoo.load_weights(network, path) == ""
    assert same(network, other)


def thop(state: State) -> State:
    """With what thop.profile registers in each module."""
    modules = {"", *(f"{key.rpartition('.')[0]}." for key in state)}
    return state | {f"{module}{name}": torch.zeros(1) for module in modules for name in ("total_ops", "total_params")}


def part_wrapped(state: State, part: str) -> State:
    """Of a network of which one stage is wrapped."""
    return {key.replace("layer1.", f"layer1.{part}."): value for key, value in state.items()}


NO_WEIGHTS = "its entries {} are no weights and are left out"
TAKEN_OFF = "the prefix '{}' of its keys is taken off"
REMARKED: dict[str, tuple[Callable[[State], Any], str]] = {
    "Lightning": (lambda s: {"epoch": 3, "state_dict": prefixed(s, "model.")}, TAKEN_OFF.format("model.")),
    "net": (lambda s: prefixed(s, "net."), TAKEN_OFF.format("net.")),
    "backbone": (lambda s: {"state_dict": prefixed(s, "backbone.")}, TAKEN_OFF.format("backbone.")),
    "of anyone": (lambda s: prefixed(s, "student.body."), TAKEN_OFF.format("student.body.")),
    "compiled in Lightning": (lambda s: prefixed(s, "model._orig_mod."), TAKEN_OFF.format("model.")),
    "Lightning in DDP": (lambda s: prefixed(s, "module.net."), TAKEN_OFF.format("net.")),
    "averaged": (lambda s: {"n_averaged": torch.tensor(3)} | prefixed(s, "module."), NO_WEIGHTS.format("n_averaged")),
    "thop": (thop, NO_WEIGHTS.format("total_ops, total_params")),
    "thop in Lightning": (
        lambda s: prefixed(thop(s), "model."),
        f"{NO_WEIGHTS.format('total_ops, total_params')}; {TAKEN_OFF.format('model.')}",
    ),
    "compiled part": (lambda s: part_wrapped(s, "_orig_mod"), ""),
    "parallel part": (lambda s: part_wrapped(s, "module"), ""),
}


@pytest.mark.parametrize("form", REMARKED)
def test_prefixes_and_counters_of_other_tools_are_taken_off(
    form: str, network: nn.Module, other: State, tmp_path: Path
) -> None:
    change, remark = REMARKED[form]
    path = tmp_path / "w.ckpt"
    torch.save(change(other), path)
    assert zoo.load_weights(network, path) == (f"{path}: {remark}" if remark else "")
    assert same(network, other)


def test_a_network_whose_own_keys_begin_alike_keeps_them(tmp_path: Path) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
            self.register_buffer("n_averaged", torch.tensor(0))

    torch.manual_seed(0)
    want = {key: value + 1 for key, value in Module().state_dict().items()}
    for prefix in ("", "net."):
        network = Module()
        torch.save(prefixed(want, prefix), tmp_path / "w.pt")
        zoo.load_weights(network, tmp_path / "w.pt")
        assert same(network, want)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: prefixed(s, "model.") | {"criterion.weight": torch.ones(10)},
            r"\d+ missing .*, \d+ unexpected .*; save only the entries that begin with 'model\.'",
        ),
        (lambda s: dict(list(prefixed(s, "model.").items())[:-1]), r"\d+ missing \(.*, \d+ unexpected \(model\."),
        (lambda s: {"total_ops": torch.ones(1)}, r"does not fit the network: \d+ missing"),
        (lambda s: {"module.a": torch.ones(1)}, r"\d+ missing .*, 1 unexpected \(a\)"),
    ],
)  # fmt: skip
def test_what_still_does_not_fit_is_refused_by_its_own_keys(
    change: Callable[[State], State], said: str, network: nn.Module, other: State, tmp_path: Path
) -> None:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    torch.save(change(other), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=said) as caught:
        zoo.load_weights(network, tmp_path / "w.pt")
    assert "\n" not in str(caught.value)
    assert same(network, before)


@pytest.mark.parametrize(
    ("layer", "said"),
    [("nn.LazyConv2d(2, 3)", "has no shape yet"), ("nn.Conv2d(3, 2, 3, device='meta')", "is on the meta device")],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_network_without_values_is_named_before_weights_are_read(layer: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(f"from torch import nn\ndef make():\n    return nn.Sequential({layer})\n")
    recipe = ModelRecipe(name=f"{tmp_path / 'net.py'}:make", weights=tmp_path / "none.pt")
    with pytest.raises(ModelError, match=rf"^network, parameter '0\.weight': {said}"):
        zoo.build_model(recipe)


@pytest.mark.parametrize(
    ("taken", "left"), [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model_state", "ema_state")]
)
def test_of_several_wrappers_the_trained_weights_are_taken_and_named(
    taken: str, left: str, network: nn.Module, other: State, tmp_path: Path
) -> None:
    averaged = {key: value + 1 for key, value in other.items()}
    torch.save({left: averaged, "epoch": 3, taken: prefixed(other, "module.")}, tmp_path / "w.pth")
    said = zoo.load_weights(network, tmp_path / "w.pth")
    assert said == f"{tmp_path / 'w.pth'}: of its weights '{taken}' are taken; it also holds {left}"
    assert same(network, other)


def test_save_weights_and_load_again(network: nn.Module, other: State, tmp_path: Path) -> None:
    source = zoo.build("digits_resnet")
    source.load_state_dict(other)
    zoo.save_weights(source, tmp_path / "w.safetensors")
    zoo.load_weights(network, tmp_path / "w.safetensors")
    assert same(network, other)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_save_weights_accepts_tied_weights(tmp_path: Path) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    tied = nn.Sequential(first, second)
    zoo.save_weights(tied, tmp_path / "w.safetensors")
    zoo.load_weights(tied, tmp_path / "w.safetensors")


def test_save_weights_errors_leave_no_file(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be written"):
        zoo.save_weights(network, tmp_path / "nowhere" / "w.safetensors")
    with pytest.raises(ModelError, match=r"end the name with \.safetensors"):
        zoo.save_weights(network, tmp_path / "w.pt")
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(ModelError, match="cannot be written"):
        zoo.save_weights(network, tmp_path / "w.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


class Evil:
    """A pickle of this creates the file `mark` when it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def write_evil(path: Path, how: str) -> None:
    held = {"state_dict": Evil(path.parent / "mark")}
    if how.startswith("torch"):
        torch.save(held, path, _use_new_zipfile_serialization=how == "torch zip")
    else:
        path.write_bytes(pickle.dumps(held, protocol=int(how[-1])))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch zip", "torch legacy", "pickle 0", "pickle 2", "pickle 4", "pickle 5"])
def test_a_pickle_never_runs_code(how: str, network: nn.Module, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "mark"
    write_evil(path, how)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ModelError, match=r"run code.*save network\.state_dict\(\)|is not a file of weights"):
        zoo.load_weights(network, path)
    assert not mark.exists()
    assert same(network, before)
    if how == "torch zip":  # the trap works where it is not guarded
        torch.load(path, weights_only=False)
        assert mark.exists()


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def write_safetensors(state: State, path: Path) -> None:
    save_file({key: value.clone() for key, value in state.items()}, path)


def replaced(state: State, **new: Tensor | None) -> State:
    """The state with `fc__weight=…` replaced; None removes the entry."""
    changed = {key.replace("__", "."): value for key, value in new.items()}
    kept: dict[str, Tensor | None] = {**state, **changed}
    return {key: value for key, value in kept.items() if value is not None}


def renamed(state: State) -> State:
    return {key.replace("layer", "stage").replace("fc.", "head."): value for key, value in state.items()}


# What is written, and what the one-line error must say.
ERRORS: dict[str, tuple[Callable[[State, Path], Any], str]] = {
    "missing": (lambda state, path: None, "there is no such file; give the path"),
    "folder": (lambda state, path: path.mkdir(), "there is no such file; give the path"),
    "empty": (lambda state, path: path.write_bytes(b""), "is not a file of weights, or is truncated or damaged"),
    "text": (lambda state, path: path.write_text("hello world"), "is not a file of weights"),
    "image": (lambda state, path: path.write_bytes(b"\x89PNG\r\n" + bytes(range(200))), "is not a file of weights"),
    "truncated": (lambda state, path: (torch.save(state, path), cut(path, 0.6)), "truncated or damaged"),
    "truncated legacy": (
        lambda state, path: (torch.save(state, path, _use_new_zipfile_serialization=False), cut(path, 0.6)),
        "truncated or damaged",
    ),
    "whole module": (lambda state, path: torch.save(nn.Sequential(nn.ReLU()), path), "is a whole pickled network"),
    "whole legacy module": (
        lambda state, path: torch.save(nn.Sequential(nn.ReLU()), path, _use_new_zipfile_serialization=False),
        "is a whole pickled network",
    ),
    "own class": (lambda state, path: torch.save(zoo.build("digits_resnet"), path), "is a whole pickled network"),
    "list": (lambda state, path: torch.save([torch.zeros(2)], path), "holds a list, not a state_dict"),
    "tensor": (lambda state, path: torch.save(torch.zeros(2), path), "holds a Tensor, not a state_dict"),
    "empty dict": (lambda state, path: torch.save({}, path), "holds an empty state_dict"),
    "empty wrapped": (lambda state, path: torch.save({"state_dict": {}}, path), "holds an empty state_dict"),
    "no tensor": (lambda state, path: torch.save({"epoch": 3, **state}, path), "entry 'epoch': is a int, not a tensor"),
    "missing key": (
        lambda state, path: torch.save(replaced(state, fc__weight=None), path),
        "does not fit the network: 1 missing (fc.weight); check model.name",
    ),
    "unexpected key": (
        lambda state, path: torch.save(replaced(state, extra=torch.zeros(1)), path),
        "does not fit the network: 1 unexpected (extra); check",
    ),
    "renamed": (
        lambda state, path: torch.save(renamed(state), path),
        "42 missing (",
    ),
    "other shape": (
        lambda state, path: torch.save(replaced(state, fc__weight=torch.zeros(100, 64)), path),
        "tensor 'fc.weight': has shape (100, 64), but the network's is (10, 64); check model.name",
    ),
    "nan": (
        lambda state, path: torch.save(replaced(state, fc__bias=torch.full((10,), float("nan"))), path),
        "tensor 'fc.bias': holds NaN or infinite values",
    ),
    "overflow": (
        lambda state, path: torch.save(replaced(state, fc__bias=torch.full((10,), 1e300, dtype=torch.float64)), path),
        "tensor 'fc.bias': holds NaN or infinite values",
    ),
    "codes": (
        lambda state, path: torch.save(replaced(state, fc__bias=torch.zeros(10, dtype=torch.int8)), path),
        "tensor 'fc.bias': holds torch.int8, not real numbers",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_leave_the_network(case: str, network: nn.Module, other: State, tmp_path: Path) -> None:
    write, message = ERRORS[case]
    path = tmp_path / "weights.pt"
    write(other, path)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ModelError) as error:
        zoo.load_weights(network, path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert same(network, before)


def test_renamed_keys_are_counted_and_the_nearest_are_suggested(
    network: nn.Module, other: State, tmp_path: Path
) -> None:
    torch.save(renamed(other), tmp_path / "w.pt")
    with pytest.raises(ModelError) as error:
        zoo.load_weights(network, tmp_path / "w.pt")
    assert "42 missing (layer1.0.conv1.weight, layer1.0.bn1.weight, layer1.0.bn1.bias, …)" in str(error.value)
    assert f"{len(renamed(other).keys() - other.keys())} unexpected (stage1.0.conv1.weight, " in str(error.value)
    for key in ("conv1.weight", "bn1.weight", "bn1.bias"):
        assert f"stage1.0.{key}: did you mean 'layer1.0.{key}'?" in str(error.value)
    assert str(error.value).count("did you mean") == 3


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_damaged_safetensors(share: float, network: nn.Module, other: State, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(other, path)
    cut(path, share)
    with pytest.raises(ModelError, match="truncated or damaged"):
        zoo.load_weights(network, path)


def test_build_model_loads_and_evaluates(other: State, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(other, path)
    network = zoo.build_model(ModelRecipe(name="digits_resnet", weights=path))
    assert not network.training
    assert same(network, other)
    with pytest.raises(ModelError, match="'digits' is not in the zoo; did you mean 'digits_resnet'"):
        zoo.build_model(ModelRecipe(name="digits"))
    with pytest.raises(ModelError, match="no network is named; give a name of the zoo: cifar_resnet110, "):
        zoo.build_model(ModelRecipe())


PUBLISHED = [
    ("cifar_resnet20", {}, "resnet20-12fca82f.th"),
    ("cifar_resnet56", {}, "resnet56-4bfd9763.th"),
    ("cifar_resnet20", {"shortcut": "conv"}, "cifar_resnet20_convshortcut_apot_fp32.pt"),
    ("mobilenet_v2", {"padding": "tf_same"}, "mobilenetv2_tf_1.0_224_fp32.pt"),
    ("squeezenet1_1", {}, "squeezenet1_1_gluon_fp32.pt"),
]


@pytest.mark.parametrize(("name", "options", "file"), PUBLISHED)
def test_published_weights_load(name: str, options: dict[str, Any], file: str, shared_data: Path) -> None:
    recipe = ModelRecipe(name=name, options=options, weights=shared_data / "weights" / file)
    network = zoo.build_model(recipe)
    channels, height, width = zoo.input_shape(name)
    with torch.no_grad():
        logits = network(torch.zeros(1, channels, height, width))
    assert bool(torch.isfinite(logits).all())


def test_folded_mobilenet_batchnorm_is_the_identity(shared_data: Path) -> None:
    weights = shared_data / "weights" / "mobilenetv2_tf_1.0_224_fp32.pt"
    network = zoo.build_model(ModelRecipe(name="mobilenet_v2", weights=weights))
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        x = torch.randn(2, norm.num_features, 3, 3)
        torch.testing.assert_close(norm(x), x + norm.bias.view(1, -1, 1, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("special", "said"),
    [
        (torch.eye(3).to_sparse(), r"is sparse \(torch.sparse_coo\)"),
        (torch.empty(3, 3, device="meta"), r"is a tensor without values \(device meta\)"),
        (torch.eye(3) + 0j, "holds torch.complex64, not real numbers"),
    ],
)
def test_tensors_that_hold_no_plain_numbers_are_named(special: Tensor, said: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"weight": special, "bias": torch.zeros(3)}, path)
    with pytest.raises(ModelError, match=f"w.pt, tensor 'weight': {said}"):
        zoo.load_weights(nn.Linear(3, 3), path)
