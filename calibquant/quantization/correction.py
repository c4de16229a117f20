"""Corrections of what rounding weights to nearest shifts: their mean and variance, and the mean of a layer's output.

What they find stands beside the float network: in a weight's scale and in `QuantModel.bias_deltas`. The empirical
correction of biases, which needs the features of all images, is `reconstruction.correct_biases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from calibquant.errors import QuantizationError
from calibquant.graph.channels import channel_axis
from calibquant.graph.expectations import Expected, expected_product, expected_values, unknown_reason
from calibquant.graph.nodes import activations_of, op_of, weight_of
from calibquant.graph.watching import Watched
from calibquant.numerics.affine import QTensor
from calibquant.numerics.grid import PerChannel
from calibquant.quantization.model import QuantModel, parameter_tensors

Sums = dict[tuple[int, ...], tuple[Tensor, int]]  # by the inputs' shape: their sum over images, and how many


@dataclass(frozen=True)
class Correction:
    """What a correction did to the bias of one call.

    Args:
        node: its name.
        largest: the largest change of a channel's bias; 0 where it was left alone.
        reason: why it was left alone; empty otherwise.
    """

    node: str
    largest: float
    reason: str = ""


def corrected_weight(weight: Tensor, q: QTensor, axis: int, variance: bool) -> tuple[QTensor, Tensor]:
    """A quantized weight whose variance is put back, and what its mean still lacks.

    xi_c = ||W_c - E W_c|| / ||Wq_c - E Wq_c|| for each output channel c multiplies the scale; the codes stay. With one
    scale for all channels it is one xi, of the norms over all channels. mu_c = E W_c - xi_c E Wq_c. Source: Banner,
    Nahshan, Hoffer and Soudry, "Post training 4-bit quantization of convolutional networks for rapid-deployment",
    NeurIPS 2019, section 5; docs/methods.md says what differs.

    Args:
        weight: float, the parameter.
        q: its quantized form.
        axis: of its output channels.
        variance: whether the variance is corrected; else xi = 1.

    Returns:
        the quantized weight, and mu, float64 (C,), C being the weight's size along `axis`.
    """
    rows = weight.detach().double().movedim(axis, 0).flatten(1)
    if variance:
        quantized = q.dequantize().double().movedim(axis, 0).flatten(1)
        want, got = ((x - x.mean(1, keepdim=True)).square().sum(1) for x in (rows, quantized))
        if not isinstance(q.granularity, PerChannel):
            want, got = want.sum(), got.sum()
        xi = torch.where((got > 0) & (want > 0), (want / got.clamp(min=1e-300)).sqrt(), 1.0)
        q = replace(q, scale=(q.scale.double() * xi).float())
    return q, rows.mean(1) - q.dequantize().double().movedim(axis, 0).flatten(1).mean(1)


def correct_weights(
    model: QuantModel,
    method: Literal["mean", "mean-variance"],
    batches: Iterable[Tensor],
    mount: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> list[Correction]:
    """Put the mean, or mean and variance, of every quantized weight back.

    A mean does not lie on the integer grid, so it goes into the bias: mu_c times the sum of the inputs in a window, as
    it is on average over the images and positions in the float network, padding included.

    Args:
        model: its weights are rounded to nearest; scales and `bias_deltas` receive the result. A product without a bias
            keeps its mean error; `graph.with_biases` gives every product one.
        method: what is put back.
        batches: images, (N, C, H, W) float32.
        mount: puts the network where images reach it.

    Raises:
        QuantizationError: there are no images.
    """
    tensors, shifts = parameter_tensors(model.teacher), dict[str, Tensor]()
    for node in _products(model):
        name, axis = str(weight_of(node).target), op_of(node).weight_axis  # type: ignore[union-attr]
        if name not in shifts:  # a weight may be used by several calls
            quantizer = model.weight_quantizers[name]
            value, shifts[name] = corrected_weight(tensors[name], quantizer.get(), axis, method == "mean-variance")
            quantizer.set(value)
    products = [n for n in model.teacher.graph.nodes if n.name in model.bias_deltas]
    sums = _input_sums(model, {activations_of(n)[0].name for n in products}, batches, mount)
    return [_shift_bias(model, node, shifts, sums, tensors) for node in products] + _without_bias(model)


def correct_biases_analytically(model: QuantModel) -> list[Correction]:
    """Correct the mean of every product's output for its weight's rounding, without images.

    bias_c -= sum over input channels i and taps of (Wq - W)_ci * E[x_i], E[x_i] being known from BatchNorm; see
    `graph.expectations`. It replaces what other corrections of the weight's rounding left in `bias_deltas`.

    Returns:
        one entry for each product, with a reason where E[x] is not known.
    """
    tensors = parameter_tensors(model.teacher)
    known = expected_values(model.teacher)
    found = []
    for node in model.teacher.graph.nodes:
        if node.name not in model.bias_deltas:
            continue
        source, name = activations_of(node)[0], str(weight_of(node).target)  # type: ignore[union-attr]
        error = model.weight_quantizers[name].get().dequantize().double() - tensors[name].double()
        shift = _expected_shift(node, error.cpu(), known.get(source.name))
        if shift is None:
            found.append(Correction(node.name, 0.0, unknown_reason(source)))
            continue
        delta = model.bias_deltas[node.name]
        delta.delta = -shift.float().to(tensors[name].device)
        found.append(Correction(node.name, float(shift.abs().max())))
    return found + _without_bias(model)


def _expected_shift(node: fx.Node, error: Tensor, x: Expected | None) -> Tensor | None:
    return None if x is None else expected_product(node, error, x)


def _products(model: QuantModel) -> list[fx.Node]:
    """The calls of products whose weight is quantized and which may have a bias."""
    nodes = [n for n in model.teacher.graph.nodes if (op := op_of(n)) is not None and op.bias is not None]
    return [n for n in nodes if (w := weight_of(n)) is not None and str(w.target) in model.weight_quantizers]


def _without_bias(model: QuantModel) -> list[Correction]:
    """Entries of the products that have a quantized weight and no bias."""
    return [Correction(n.name, 0.0, "it has no bias") for n in _products(model) if n.name not in model.bias_deltas]


def _shift_bias(
    model: QuantModel, node: fx.Node, shifts: dict[str, Tensor], sums: dict[str, Sums], tensors: dict[str, Tensor]
) -> Correction:
    """Add mu_c * E[sum of the inputs in the window]: a product is linear, so its mean is that of the mean input."""
    op, name = op_of(node), str(weight_of(node).target)  # type: ignore[union-attr]
    assert op is not None
    weight = tensors[name]
    shape = [1] * weight.dim()
    shape[op.weight_axis] = -1
    spread = shifts[name].reshape(shape).expand(weight.shape).contiguous()
    total, positions = torch.zeros((), dtype=torch.float64), 0
    for value, count in sums[activations_of(node)[0].name].values():
        rows = op.run(value.to(spread.device), spread, None, **node.kwargs).movedim(channel_axis(node), 0).flatten(1)
        total, positions = total.to(rows.device) + rows.sum(1), positions + count * rows.shape[1]
    delta = total / positions
    model.bias_deltas[node.name].add(delta.to(weight.device))
    return Correction(node.name, float(delta.abs().max()))


def _input_sums(
    model: QuantModel, names: set[str], batches: Iterable[Tensor], mount: Callable[[nn.Module], nn.Module]
) -> dict[str, Sums]:
    """Sums of some nodes' values over images, in the float network: float64, (1, ...)."""
    sums: dict[str, Sums] = {name: {} for name in names}

    def visit(name: str, value: Tensor) -> None:
        shape, total = tuple(value.shape[1:]), value.double().sum(0, keepdim=True).cpu()
        old, count = sums[name].get(shape, (torch.zeros_like(total), 0))
        sums[name][shape] = (old + total, count + len(value))

    network, images = mount(Watched(model.teacher, names, visit)), 0
    with torch.inference_mode():
        for batch in batches:
            network(batch)
            images += len(batch)
    if not images:
        raise QuantizationError("correction", "got no images", "give at least two calibration images")
    return sums
