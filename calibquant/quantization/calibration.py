"""Calibration: ranges for every quantizer of a QuantModel, from the float network and a set of images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from calibquant import parallel
from calibquant.errors import DataError, QuantizationError
from calibquant.graph.limits import UNLIMITED, before_limits
from calibquant.graph.watching import Watched
from calibquant.networks import beyond
from calibquant.numerics.affine import affine_from_range, quantize_tensor
from calibquant.quantization.allocation import allocate_weight
from calibquant.quantization.channels import ChannelObserver
from calibquant.quantization.leveling import leveled_weight
from calibquant.quantization.model import QuantModel, parameter_tensors
from calibquant.quantization.observers import DENSITIES, ActivationObserver, LevelObserver, make_observer, weight_range
from calibquant.recipe import ActivationRecipe, QuantRecipe


def calibrate_weights(
    model: QuantModel,
    recipe: QuantRecipe,
    progress: Callable[[int, int], None] | None = None,
    energies: Mapping[str, Tensor] | None = None,
) -> None:
    """Find each weight's range, and the bits of its channels where they share them, and round it to nearest.

    Args:
        model: its weight quantizers receive codes, scales and zero points.
        recipe: the observer.
        progress: called with (done, total).
        energies: by weight, where the recipe clusters by them; see `energies.weight_energies`.

    Raises:
        QuantizationError: a weight is not finite.
    """
    if energies is None and recipe.weights.clustering != "plain":
        raise ValueError(f"{recipe.weights.clustering} clustering needs the weights' energies")
    tensors = parameter_tensors(model.teacher)
    for done, (name, quantizer) in enumerate(model.weight_quantizers.items(), start=1):
        weight, plan = tensors[name], quantizer.plan
        if not torch.isfinite(weight).all():
            raise QuantizationError(name, "holds NaN or Inf", "check the weights file")
        if plan.levels is not None:
            quantizer.set(leveled_weight(weight, plan, plan.levels, (energies or {}).get(name)))
        elif plan.allocation == "none":
            low, high = weight_range(weight, recipe.weights, plan)
            scale, zero_point = affine_from_range(low, high, plan.grid, plan.symmetric)
            quantizer.set(quantize_tensor(weight, scale, zero_point, plan.grid, plan.granularity))
        else:
            quantizer.set(allocate_weight(weight, recipe.weights, plan, model.plan.placement))
        if progress:
            progress(done, len(model.weight_quantizers))


def calibrate_activations(
    model: QuantModel,
    recipe: ActivationRecipe,
    batches: Iterable[Tensor],
    mount: Callable[[nn.Module], nn.Module] = lambda network: network,
    quantized_weights: bool = False,
) -> None:
    """Find each activation's range on the float network, or on the one whose weights alone are quantized.

    Of several processes each observes every so-many-th batch, and the observers are merged.

    Observers that fit a density see what enters a function that only limits values (ReLU), all others what it returns.

    Args:
        model: its activation quantizers receive scales and zero points.
        recipe: the observer.
        batches: images, (N, C, H, W) float32, already preprocessed.
        mount: puts the network where images reach it; a part of a larger network is mounted in that.
        quantized_weights: observe the network with its weights as quantized.

    Raises:
        QuantizationError: there are no images.
        DataError: an activation is not finite.
    """
    observers = _observers(model, recipe)
    if not observers:
        return  # every range is taken at run time
    network = model.simulation if quantized_weights else model.teacher
    watching: dict[str, list[ActivationObserver]] = defaultdict(list)
    for source, observer in observers.values():
        watching[source].append(observer)
    watched = Watched(network, watching.keys(), lambda name, value: _update(watching[name], name, value))
    with torch.inference_mode(), model.float_mode():
        model.enable(weights=True, activations=False)
        show(mount(watched), batches)
    for name, observer in _merged({name: observer for name, (_, observer) in observers.items()}).items():
        quantizer = model.activation_quantizers[name]
        if isinstance(observer, ChannelObserver) and quantizer.plan.allocation != "none":
            quantizer.set_range(*observer.allocated())
        elif isinstance(observer, LevelObserver):
            low, high, levels = observer.leveled()
            quantizer.set_range(low, high, levels=levels)
        else:
            quantizer.set_range(*observer.range())


def show(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Pass images through a network; of several processes each passes every so-many-th batch.

    Raises:
        QuantizationError: there are none.
    """
    images = 0
    for number, batch in enumerate(batches):
        if number % parallel.world() == parallel.rank():
            network(batch)
        images += len(batch)
    if not images:
        raise QuantizationError("calibration", "got no images", "give at least two calibration images")


def _observers(model: QuantModel, recipe: ActivationRecipe) -> dict[str, tuple[str, ActivationObserver]]:
    """By quantizer with a stored range: the node whose values its observer sees, and the observer."""
    found: dict[str, tuple[str, ActivationObserver]] = {}
    for node in model.teacher.graph.nodes:
        quantizer = model.activation_quantizers.get(node.name)
        if quantizer is not None and not quantizer.dynamic:
            source, limits = before_limits(node) if recipe.observer in DENSITIES else (node, UNLIMITED)
            make = ChannelObserver if quantizer.per_channel else make_observer
            found[node.name] = source.name, make(recipe, quantizer.plan, limits)
    return found


def _merged(observers: dict[str, ActivationObserver]) -> dict[str, ActivationObserver]:
    """By quantizer what all processes have seen."""
    first, *others = parallel.every(observers)
    for other in others:
        for name, observer in first.items():
            observer.merge(other[name])
    return first


def _update(observers: Sequence[ActivationObserver], name: str, value: Tensor) -> None:
    wrong = beyond(value)
    if wrong is not None:
        raise DataError(f"activations of {name}", f"hold {wrong}", "check the images and the weights")
    for observer in observers:
        try:
            observer.update(value)
        except DataError as error:
            raise DataError(f"activations of {name}", error.problem, error.mend) from None
