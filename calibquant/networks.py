"""A user's network as the rest of the package takes it: without wrappers, checked, and copied.

Nothing here changes the network that it is given.
"""

from __future__ import annotations

import copy
import gc
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from calibquant.errors import ModelError

LIMIT = 1e19
"""Largest magnitude of a weight or an activation: in float32 squares of larger ones are infinite."""

_AROUND = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_WEIGHT_HOOKS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
_ATOMS = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, str, bytes, int, float)


def bare(network: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel, AveragedModel and what torch.compile returns.

    Example:
        >>> bare(nn.DataParallel(nn.Sequential(nn.ReLU())))
        Sequential(
          (0): ReLU()
        )
    """
    while (name := _wrapped(network)) is not None:
        network = network.get_submodule(name)
    return network


def _wrapped(module: nn.Module) -> str | None:
    """Name of the module that a wrapper holds; None for what is no wrapper."""
    if "_orig_mod" in module._modules:  # of torch.compile, whose class is slow to import
        return "_orig_mod"
    return "module" if isinstance(module, _AROUND) else None


def check_network(network: object) -> None:
    """Check that a network that a user passed is an nn.Module.

    Raises:
        ModelError: it is something else; says what to pass.
    """
    if isinstance(network, nn.Module):
        return
    kind = type(network).__name__
    if isinstance(network, Mapping):
        wrong = (
            f"is of type {kind}, not an nn.Module",
            "build the network, load the weights with load_state_dict and pass it",
        )
    elif isinstance(network, type):
        wrong = f"is the class {network.__name__}, not a network", f"pass an instance, e.g. {network.__name__}()"
    elif isinstance(network, (str, PurePath)):
        wrong = f"is the {kind} '{network}'", "leave network out, and set model.name and model.weights in the recipe"
    elif callable(network):
        wrong = f"is of type {kind}, not an nn.Module", "pass an nn.Module whose forward calls it"
    else:
        wrong = f"is of type {kind}, not an nn.Module", "pass an nn.Module"
    raise ModelError("network", *wrong)


def float_copy(network: nn.Module) -> nn.Module:
    """A copy of a network as float32 on the CPU in evaluation mode, which computes the same from plain weights.

    Wrappers are taken off, around the network and inside it. Weights that a hook or a parametrization computes before
    each call (pruning, weight_norm, spectral_norm) become plain parameters.

    Raises:
        ModelError: it is no nn.Module, a tensor has no values or is of a kind that is not supported, or it cannot be
            copied.
    """
    copied = owned_copy(network).eval()
    with torch.no_grad():
        for module in copied.modules():
            _bake(module)
    return copied.to("cpu", torch.float32)


def owned_copy(network: nn.Module) -> nn.Module:
    """A copy of a network as float32 on the CPU that trains as the network does; wrappers are taken off.

    Tensors with a history of gradients, such as cached features, and those made under `torch.inference_mode` become
    ordinary ones.

    Raises:
        ModelError: as `float_copy`.
    """
    check_network(network)
    network = bare(network)
    check_kinds(network)
    memo: dict[int, Any] = {}
    with torch.inference_mode(False):
        for tensor in _reachable(network):
            if _needs_help(tensor):
                memo[id(tensor)] = _owned(tensor)
        try:
            for module in reversed(list(network.modules())):  # inner wrappers first
                if _wrapped(module) is not None:
                    memo[id(module)] = copy.deepcopy(bare(module), memo)
            return copy.deepcopy(network, memo).to("cpu", torch.float32)
        except Exception as error:  # whatever the user's attributes raise
            problem = f"cannot be copied ({short(error)})"
            mend = "delete it from the module before the network is given, or give its class a __deepcopy__"
            raise ModelError(_culprit(network, memo), problem, mend) from error


def check_kinds(network: nn.Module) -> None:
    """Check that every parameter and buffer has values that can be computed with.

    Raises:
        ModelError: one is lazy, meta, sparse, quantized or complex; or the network is a TorchScript program.
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise ModelError("network", "is a TorchScript program", "give the nn.Module that it was made of")
    for what, name, tensor in _tensors(network):
        if (wrong := _unusable(tensor)) is not None:
            raise ModelError(f"network, {what} '{name}'", *wrong)


def check_values(network: nn.Module) -> None:
    """Check that parameters and BatchNorm's statistics are finite and within LIMIT; other buffers may hold infinity.

    Raises:
        ModelError: names the tensor that holds another value.
    """
    for what, name, tensor in _tensors(network):
        statistic = name.rpartition(".")[2] if what == "buffer" else None
        if tensor.is_floating_point() and statistic in (None, "running_mean", "running_var"):
            if (wrong := beyond(tensor)) is not None:
                mend = "give a network whose training did not diverge"
                raise ModelError(f"network, {what} '{name}'", f"holds {wrong}", mend)
            if statistic == "running_var" and bool((tensor < 0).any()):
                problem = f"holds {float(tensor.min()):.3g}, which is no variance"
                raise ModelError(f"network, buffer '{name}'", problem, "load the weights and statistics of a training")


def beyond(values: Tensor, masks: bool = False) -> str | None:
    """Which values are not finite or beyond LIMIT, in words that follow "holds"; None where there are none.

    Args:
        values: floating point, any shape and device.
        masks: whether minus infinity is right, as it is in the mask of a softmax.

    Example:
        >>> beyond(torch.tensor([1.0, -3e20])), beyond(torch.tensor([2.0]))
        ('values up to -3e+20, where 1e+19 is the largest magnitude that can be quantized', None)
    """
    if not values.numel():
        return None
    low, high = (float(v) for v in torch.aminmax(values.detach()))
    if masks and low == -torch.inf:
        return None if high <= LIMIT else beyond(values.clamp(min=-LIMIT))
    if low != low or max(-low, high) == torch.inf:
        return "NaN or infinite values"
    if max(-low, high) <= LIMIT:
        return None
    most = high if high >= -low else low
    return f"values up to {most:.3g}, where {LIMIT:.0e} is the largest magnitude that can be quantized"


def output_words(output: object) -> tuple[str, str]:
    """What a network returned in place of one tensor, and how to get a tensor of it, as an error says them.

    Example:
        >>> output_words({"features": torch.zeros(1, 8, 4, 4), "logits": torch.zeros(1, 10)})
        ("a dictionary with 'features', 'logits'", "network(x)['logits']")
    """
    if is_dataclass(output) and not isinstance(output, type):
        values = {field.name: getattr(output, field.name) for field in fields(output)}
        return f"a dataclass {type(output).__name__} with {', '.join(values)}", f"network(x).{_logits(values)}"
    if isinstance(output, Mapping):
        keys = ", ".join(repr(key) for key in output)
        return f"a dictionary with {keys}", f"network(x)[{_logits(output)!r}]"
    if isinstance(output, (list, tuple)):
        return f"a {type(output).__name__} of {len(output)}", f"network(x)[{_logits(dict(enumerate(output)))}]"
    return ("None" if output is None else f"a {type(output).__name__}"), "its tensor"


def _logits(values: Mapping[Any, object]) -> Any:
    """The key of the first matrix, which logits are; else of the first tensor, else the first."""
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    matrices = [key for key, value in tensors.items() if value.dim() == 2]
    return next(iter([*matrices, *tensors, *values]), 0)


def short(error: BaseException) -> str:
    """The first line of what an error says, or its kind.

    Example:
        >>> short(ValueError("no such size\\nand more"))
        'no such size'
    """
    said = str(error).strip()
    return said.splitlines()[0][:160] if said else type(error).__name__


# --- tensors ----------------------------------------------------------------------------------------------------------


def _tensors(network: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    yield from (("parameter", name, tensor) for name, tensor in network.named_parameters())
    yield from (("buffer", name, tensor) for name, tensor in network.named_buffers())


def _unusable(tensor: Tensor) -> tuple[str, str] | None:
    """Why nothing can be computed with a tensor, and the mend; None where it can."""
    if is_lazy(tensor):
        once = "run it once on images of the right shape before you pass it, e.g. network(images[:1])"
        return "has no shape yet, since its layer is lazy", once
    if tensor.is_meta:
        return (
            "is on the meta device, where tensors have no values",
            "build the network on the CPU, or load its weights",
        )
    if tensor.layout != torch.strided:
        return f"is stored as {str(tensor.layout).removeprefix('torch.')}", "make it dense with to_dense()"
    if tensor.is_quantized:
        return "is quantized already", "give the float network"
    if tensor.is_complex():
        return "holds complex numbers", "give a network of real numbers"
    return None


def _needs_help(tensor: Tensor) -> bool:
    """Whether neither deepcopy nor Module.to makes an ordinary float32 tensor on the CPU of it."""
    if not (type(tensor) is Tensor or isinstance(tensor, nn.Parameter)) or _unusable(tensor) is not None:
        return False
    other = tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32)
    return other or not tensor.is_leaf or tensor.is_inference()


def _owned(tensor: Tensor) -> Tensor:
    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
    value = tensor.detach().to("cpu", kind, copy=True)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _reachable(root: object) -> Iterator[Tensor]:
    """Every tensor that deepcopy can meet: in modules, containers, bound methods of hooks and other objects."""
    found, left = set[int](), [root]
    while left:
        value = left.pop()
        if id(value) in found or isinstance(value, _ATOMS):
            continue
        found.add(id(value))
        if isinstance(value, Tensor):
            yield value
        else:
            left.extend(gc.get_referents(value))


def _bake(module: nn.Module) -> None:
    """Make plain parameters of weights that hooks or parametrizations compute; for copies only."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, _WEIGHT_HOOKS):
            hook.remove(module)
            del module._forward_pre_hooks[key]
    if parametrize.is_parametrized(module):
        # Not remove_parametrizations, which changes the class, and this is the class of the user's module too.
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))


def _culprit(network: nn.Module, memo: dict[int, Any]) -> str:
    """Which attribute of which module cannot be copied."""
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if name not in ("_modules", "_parameters", "_buffers"):
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    return f"network, attribute '{f'{path}.{name}' if path else name}'"
    return "network"
