"""Weights in files: loading them without running code, and saving them.

Nothing here unpickles: .safetensors files hold no code, every other file goes through torch's restricted reader.
"""

from __future__ import annotations

import difflib
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibquant.errors import ModelError
from calibquant.networks import bare, check_kinds
from calibquant.recipe import ModelRecipe
from calibquant.zoo.external import check_trusted
from calibquant.zoo.naming import Naming, naming_of
from calibquant.zoo.registry import build, names

# Of several, the first is taken: weights as they were trained come before their running means.
WRAPPERS = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network",
    "state_dict_ema", "model_ema", "ema_state", "ema",
)  # fmt: skip
WRAPPED = ("module", "_orig_mod")  # parts of keys that DataParallel, AveragedModel and torch.compile add
COUNTERS = ("n_averaged", "total_ops", "total_params")  # entries that AveragedModel and thop add
State = Mapping[str, Tensor]
Translation = tuple[Naming, dict[str, str]]
_NAMED = 3  # keys of a mismatch that an error names
_PLAIN = "save the float network's own tensors, e.g. tensor.to_dense() or tensor.dequantize()"
_SAVE_STATE = "save network.state_dict() with torch.save, or as .safetensors, and give that file"


def build_model(recipe: ModelRecipe, tell: Callable[[str], None] = lambda _: None) -> nn.Module:
    """The whole network a recipe names, with its weights if it gives a file, in eval mode.

    Args:
        recipe: which network.
        tell: hears how the file of weights was read, if that is not plain.

    Raises:
        ModelError: the name is missing, or it, an option or the file of weights is not valid, or a run folder names
            code.

    Example:
        >>> build_model(ModelRecipe(name="digits_resnet")).training
        False
    """
    if recipe.name is None:
        raise ModelError("model.name", "no network is named", "give a name of the zoo: " + ", ".join(names()))
    check_trusted(recipe.name, recipe.options, recipe.strangers)
    network = bare(build(recipe.name, **recipe.options))
    check_kinds(network)
    if recipe.weights is not None:
        remark = load_weights(network, recipe.weights)
        if remark:
            tell(remark)
    return network.eval()


def load_weights(network: nn.Module, path: str | Path) -> str:
    """Load a state_dict into `network`, all of it or, on an error, nothing.

    A dictionary around the state_dict (one of `WRAPPERS`), what wrappers of a network add to its keys (`WRAPPED`), a
    prefix common to all keys (`model.`, `net.`, `backbone.`, …) and counters of other tools (`COUNTERS`) are taken off,
    and key names of other authors (see `naming`) are translated for a network of the zoo; `num_batches_tracked` may be
    missing.

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
    remarks = [f"of its weights '{wrapper}' are taken; it also holds {', '.join(others)}"] if others else []
    loaded, counters = _without_counters(found, targets)
    if counters:
        remarks.append(f"its entries {', '.join(counters)} are no weights and are left out")
    loaded, prefix, other = _named_alike(loaded, targets, partial(naming_of, network, wrapper=wrapper))
    if prefix:
        remarks.append(f"the prefix '{prefix}' of its keys is taken off")
    ours, reversed_input = {key: key for key in loaded}, None
    if other:
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


def _without_counters(loaded: State, targets: State) -> tuple[State, list[str]]:
    """`loaded` without entries of `COUNTERS`, unless the network has such entries itself, and which there were."""
    own = {key.rpartition(".")[2] for key in targets}
    counted = {key: key.rpartition(".")[2] for key in loaded}
    extra = {key: name for key, name in counted.items() if name in COUNTERS and name not in own}
    return {key: value for key, value in loaded.items() if key not in extra}, sorted(set(extra.values()))


def _special_kind(value: Tensor) -> str:
    """How a tensor differs from one that holds its values plainly, in words; "" where it does not."""
    if value.is_meta:
        return "a tensor without values (device meta)"
    if value.is_quantized:
        return f"quantized ({value.dtype})"
    if value.is_nested:
        return "nested"
    return "" if value.layout is torch.strided else f"sparse ({value.layout})"


def _named_alike(
    loaded: State, targets: State, naming: Callable[[State], Translation | None]
) -> tuple[State, str, Translation | None]:
    """`loaded` with keys that fit the network, if taking off parts of wrappers and a common prefix makes them fit.

    Args:
        loaded: tensors by the file's keys.
        targets: tensors by the network's.
        naming: finds the other authors whose names some keys are.

    Returns:
        the tensors by what is left of their keys; the common prefix, without parts of wrappers; the other authors'
        naming. Where nothing fits, the keys lose only the parts of wrappers that all of them begin with.
    """
    for start in (loaded, _unwrapped(loaded)):
        state, prefix = start, ""
        while True:
            fits = not any(_mismatch(state, targets))
            other = None if fits else naming(state)
            if fits or other is not None:
                return state, prefix, other
            head = _common_head(state)
            if head is None:
                break
            state = {key.removeprefix(head): value for key, value in state.items()}
            prefix += "" if head[:-1] in WRAPPED else head
    while (head := _common_head(loaded)) is not None and head[:-1] in WRAPPED:
        loaded = {key.removeprefix(head): value for key, value in loaded.items()}
    return loaded, "", None


def _unwrapped(loaded: State) -> State:
    """`loaded` without the parts of `WRAPPED` anywhere in its keys, unless two of them would become one."""
    shorter = {".".join(part for part in key.split(".") if part not in WRAPPED): v for key, v in loaded.items()}
    return shorter if len(shorter) == len(loaded) else dict(loaded)


def _common_head(keys: Iterable[str]) -> str | None:
    """The first part of all keys with its point; None where they begin differently."""
    heads = {key.partition(".")[0] + "." for key in keys}
    return heads.pop() if len(heads) == 1 and all("." in key for key in keys) else None


def _mismatch(keys: Iterable[str], targets: State) -> tuple[list[str], list[str]]:
    """Keys of the network that are missing among `keys`, but for BatchNorm's counters, and those it has not."""
    given = dict.fromkeys(keys)
    missing = [key for key in targets if key not in given and not key.endswith("num_batches_tracked")]
    return missing, [key for key in given if key not in targets]


def _check_keys(loaded: Sequence[str], targets: State, path: Path) -> None:
    missing, unexpected = _mismatch(loaded, targets)
    if not missing and not unexpected:
        return
    parts = [_some(word, keys) for word, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    raise ModelError(path, "does not fit the network: " + ", ".join(parts), _way_to_fit(missing, unexpected))


def _way_to_fit(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What to do about keys that do not fit."""
    if missing:
        heads = [key.removesuffix(missing[0]) for key in unexpected if key.endswith(f".{missing[0]}")]
        whole = next((head for head in heads if all(head + key in unexpected for key in missing)), None)
        if whole is not None:
            return f"save only the entries that begin with '{whole}', which are the network's, and give that file"
    close = {key: difflib.get_close_matches(key, missing, n=1) for key in unexpected[:_NAMED]}
    hints = [f"{key}: did you mean '{near[0]}'?" for key, near in close.items() if near]
    return "check model.name and model.options, e.g. num_classes" + (f" ({' '.join(hints)})" if hints else "")


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
