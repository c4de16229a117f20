"""Weights in files: loading them without running code, and saving them.

Nothing here unpickles: .safetensors files hold no code, every other file goes through torch's restricted reader.
"""

from __future__ import annotations

import difflib
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibquant.errors import ModelError
from calibquant.recipe import ModelRecipe
from calibquant.zoo.naming import naming_of
from calibquant.zoo.registry import build, names

# Of several, the first is taken: weights as they were trained come before their running means.
WRAPPERS = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network",
    "state_dict_ema", "model_ema", "ema_state", "ema",
)  # fmt: skip
PREFIXES = ("module.", "_orig_mod.")
_NAMED = 3  # keys of a mismatch that an error names
_PLAIN = "save the float network's own tensors, e.g. tensor.to_dense() or tensor.dequantize()"
_SAVE_STATE = "save network.state_dict() with torch.save, or as .safetensors, and give that file"


def build_model(recipe: ModelRecipe, tell: Callable[[str], None] = lambda _: None) -> nn.Module:
    """The whole network a recipe names, with its weights if it gives a file, in eval mode.

    Args:
        recipe: which network.
        tell: hears how the file of weights was read, if that is not plain.

    Raises:
        ModelError: the name is missing, or it, an option or the file of weights is not valid.

    Example:
        >>> build_model(ModelRecipe(name="digits_resnet")).training
        False
    """
    if recipe.name is None:
        raise ModelError("model.name", "no network is named", "give a name of the zoo: " + ", ".join(names()))
    network = build(recipe.name, **recipe.options)
    if recipe.weights is not None:
        remark = load_weights(network, recipe.weights)
        if remark:
            tell(remark)
    return network.eval()


def load_weights(network: nn.Module, path: str | Path) -> str:
    """Load a state_dict into `network`, all of it or, on an error, nothing.

    A dictionary around the state_dict (one of `WRAPPERS`) and a prefix common to all keys (`module.`, `_orig_mod.`) are
    taken off, and key names of other authors (see `naming`) are translated for a network of the zoo;
    `num_batches_tracked` may be missing.

    Args:
        network: receives the weights; its keys and shapes must be those of the file.
        path: .safetensors, or what torch.save wrote.

    Returns:
        what is worth knowing about how the file was read, in words; "" where it is plain.

    Raises:
        ModelError: the file is missing, damaged, not weights, holds code, or does not fit the network.
    """
    path = Path(path)
    targets = network.state_dict()
    found, wrapper, others = _state_dict(_read(path), path)
    loaded = _strip_prefixes(found, targets)
    remarks = [f"of its weights '{wrapper}' are taken; it also holds {', '.join(others)}"] if others else []
    ours, reversed_input = {key: key for key in loaded}, None
    if ours.keys() - targets.keys() and (other := naming_of(network, loaded, wrapper)):
        naming, ours = other
        reversed_input = naming.reversed_input
        remarks.append(f"its key names are {naming.authors}'s")
    _check_keys(list(ours.values()), targets, path)
    ready = {ours[key]: _checked(key, value, targets[ours[key]], path) for key, value in loaded.items()}
    if reversed_input is not None:
        ready[reversed_input] = ready[reversed_input].flip(1)
        remarks.append("the input channels are turned from blue, green, red to red, green, blue")
    with torch.no_grad():
        for key, value in ready.items():
            targets[key].copy_(value)
    return f"{path}: {'; '.join(remarks)}" if remarks else ""


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Write the network's state_dict as safetensors; the file appears complete or not at all.

    Raises:
        ModelError: the name does not end with .safetensors, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ModelError(path, "weights are written as safetensors", "end the name with .safetensors")
    # Cloned, since safetensors refuses tensors that share memory, as tied weights do.
    state = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(state, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise ModelError(path, f"cannot be written ({error})", "give a path in a writable folder") from None


def _read(path: Path) -> object:
    """The object a file holds; only tensors, numbers, strings and containers of them can come out."""
    if not path.is_file():
        raise ModelError(path, "there is no such file", "give the path of a file of weights")
    # The readers raise nearly every kind of exception on damaged bytes.
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from None
    except OSError as error:
        if error.strerror:
            raise ModelError(path, f"cannot be read ({error.strerror})", "check the file's permissions") from None
        raise _damaged(path) from None
    except Exception as error:
        if "TorchScript" in str(error):
            raise ModelError(path, "is a TorchScript program, not weights", _SAVE_STATE) from None
        raise _damaged(path) from None


def _damaged(path: Path) -> ModelError:
    return ModelError(path, "is not a file of weights, or is truncated or damaged", "download or save it again")


def _refusal(path: Path, reason: str) -> ModelError:
    """Why torch's restricted reader did not accept a pickle."""
    named = re.search(r"GLOBAL ([\w.]+)", reason)
    with path.open("rb") as file:
        start = file.read(2)
    is_pickle = start[:1] == pickle.PROTO
    if named is None or not (is_pickle or start == b"PK"):  # else some text that happens to read as a pickle
        return ModelError(path, "is a plain pickle, which can run code", _SAVE_STATE) if is_pickle else _damaged(path)
    needed = [named[1]]
    with suppress(Exception):  # torch lists them for its zip format only, and damaged bytes raise nearly anything
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(path) or needed
    if any(name.startswith("torch.nn.modules.") for name in needed):
        return ModelError(path, "is a whole pickled network, whose loading runs code", _SAVE_STATE)
    return ModelError(path, f"is a pickle that would run code ({named[1]}); it was not loaded", _SAVE_STATE)


def _state_dict(held: object, path: Path) -> tuple[dict[str, Tensor], str | None, list[str]]:
    """The state_dict in what a file holds, the wrapper it was taken from, and other wrappers there."""
    wrapper, others = None, list[str]()
    if isinstance(held, Mapping):
        wrappers = [key for key in WRAPPERS if isinstance(held.get(key), Mapping)]
        if wrappers:
            wrapper, *others = wrappers
            held = held[wrapper]
    if not isinstance(held, Mapping):
        raise ModelError(path, f"holds a {type(held).__name__}, not a state_dict", _SAVE_STATE)
    if not held:
        raise ModelError(path, "holds an empty state_dict", _SAVE_STATE)
    for key, value in held.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(f"{path}, entry '{key}'", f"is a {type(value).__name__}, not a tensor", _SAVE_STATE)
        kind = _special_kind(value)
        if kind:
            raise ModelError(f"{path}, tensor '{key}'", f"is {kind}, not plain numbers", _PLAIN)
    return dict(held), wrapper, others


def _special_kind(value: Tensor) -> str:
    """How a tensor differs from one that holds its values plainly, in words; "" where it does not."""
    if value.is_meta:
        return "a tensor without values (device meta)"
    if value.is_quantized:
        return f"quantized ({value.dtype})"
    if value.is_nested:
        return "nested"
    return "" if value.layout is torch.strided else f"sparse ({value.layout})"


def _strip_prefixes(loaded: dict[str, Tensor], targets: Mapping[str, Any]) -> dict[str, Tensor]:
    """`loaded` without the prefixes that wrappers of the network added to every key."""
    for prefix in (*PREFIXES, *PREFIXES):
        everywhere = all(key.startswith(prefix) for key in loaded)
        if everywhere and not any(key.startswith(prefix) for key in targets):
            loaded = {key.removeprefix(prefix): value for key, value in loaded.items()}
    return loaded


def _check_keys(loaded: Sequence[str], targets: Mapping[str, Tensor], path: Path) -> None:
    missing = [key for key in targets if key not in loaded and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in loaded if key not in targets]
    if not missing and not unexpected:
        return
    parts = [_some(word, keys) for word, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    close = {key: difflib.get_close_matches(key, missing, n=1) for key in unexpected[:_NAMED]}
    hints = [f"{key}: did you mean '{near[0]}'?" for key, near in close.items() if near]
    mend = "check model.name and model.options, e.g. num_classes" + (f" ({' '.join(hints)})" if hints else "")
    raise ModelError(path, "does not fit the network: " + ", ".join(parts), mend)


def _some(word: str, keys: Sequence[str]) -> str:
    return f"{len(keys)} {word} ({', '.join(keys[:_NAMED])}{', …' if len(keys) > _NAMED else ''})"


def _checked(key: str, value: Tensor, target: Tensor, path: Path) -> Tensor:
    """`value` as it will be copied into `target`."""
    where = f"{path}, tensor '{key}'"
    if value.shape != target.shape:
        problem = f"has shape {tuple(value.shape)}, but the network's is {tuple(target.shape)}"
        raise ModelError(where, problem, "check model.name and model.options, e.g. num_classes")
    if target.is_floating_point() and not value.is_floating_point():
        raise ModelError(where, f"holds {value.dtype}, not real numbers", "give the weights of the float network")
    value = value.to(target.dtype)
    if target.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ModelError(where, "holds NaN or infinite values", "give weights of a training that did not diverge")
    return value
