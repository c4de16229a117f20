"""What BatchNorm says about a network's values: their mean in each channel, without images.

A BatchNorm's output has in training the mean beta and the standard deviation |gamma| in each channel, and is taken as
normally distributed. From there means follow the graph as far as that is exact for normal values. Source: Nagel, van
Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
section 4.2.1 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from calibquant.graph import ops
from calibquant.graph.channels import channel_axis, ends_in_channels, splits_channels
from calibquant.graph.limits import limits_of
from calibquant.graph.nodes import kind_of, op_of, operands_of, weight_of
from calibquant.graph.ops import Kind
from calibquant.numerics.moments import clipped_normal_mean, function_of_normal_mean

_NORMAL = "normal"  # the key of a node's meta under which folding leaves a BatchNorm's statistics


@dataclass(frozen=True)
class Normal:
    """The distribution of a call's output in each channel.

    Args:
        mean, std: float32, (C,).
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Expected:
    """What is known of a node's values.

    Args:
        mean: of each channel, float64 (C,).
        std: float64 (C,) where the values are taken as normal; None where only the mean is known.
        last: the channels are the last axis, not axis 1; after `flatten` each may have several features there.
    """

    mean: Tensor
    std: Tensor | None = None
    last: bool = False


def normal_after(var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Normal:
    """The distribution of a BatchNorm's output: mean beta, std |gamma| * sqrt(var / (var + eps)); all (C,)."""
    return Normal(beta, gamma.abs() * torch.sqrt(var / (var + eps)))


def set_normal(node: fx.Node, normal: Normal) -> None:
    """Keep the distribution of a node's output with the node; copies of the graph have it too."""
    node.meta[_NORMAL] = normal


def normal_of(node: fx.Node) -> Normal | None:
    """The distribution of a product's output as the BatchNorm folded into it says; None where none was folded."""
    found: Normal | None = node.meta.get(_NORMAL)
    return found


def expected_values(graph: fx.GraphModule) -> dict[str, Expected]:
    """The channel means of a canonical graph's values that follow from its BatchNorms, by node name.

    Known are: the output of a product into which a BatchNorm was folded (normal), and of one that was not folded;
    limits (ReLU, ReLU6) of normal values in closed form and other element-wise functions of them by numerical
    integration; sums and differences, concatenations of channels, average pools and moves that keep channels; products
    without BatchNorm of inputs whose means are known. What is padded with zeros is not reckoned with. Nothing else is.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in graph.named_buffers()}
    known: dict[str, Expected] = {}
    for node in graph.graph.nodes:
        found = _expected(node, known, tensors) if node.op == "call_function" else None
        if found is not None:
            known[node.name] = found
    return known


def expected_product(node: fx.Node, weight: Tensor, x: Expected) -> Tensor | None:
    """The mean over positions of a product without its bias: over input channels and taps, the sum of weight * mean.

    Args:
        node: a convolution or linear.
        weight: in the place of its weight, (O, I / groups, ...) or (O, features).
        x: what is known of its input.

    Returns:
        float64, (O,); None where it does not follow: a transposed convolution, or channels that do not fit.
    """
    op = op_of(node)
    if op is None or op.weight_axis != 0 or x.last != (op.kind is Kind.MATMUL):
        return None
    groups = int(node.kwargs.get("groups", 1))  # type: ignore[arg-type]
    if op.kind is Kind.MATMUL:
        if weight.shape[1] % len(x.mean):
            return None
        return weight.double() @ x.mean.repeat_interleave(weight.shape[1] // len(x.mean))
    if weight.shape[1] * groups != len(x.mean):
        return None
    taps = weight.double().flatten(2).sum(2).reshape(groups, -1, weight.shape[1])
    return torch.einsum("goi,gi->go", taps, x.mean.reshape(groups, -1)).flatten()


def _expected(node: fx.Node, known: dict[str, Expected], tensors: dict[str, Tensor]) -> Expected | None:
    op, normal = op_of(node), normal_of(node)
    assert op is not None
    if normal is not None:
        return Expected(normal.mean.double().cpu(), normal.std.double().cpu(), channel_axis(node) == -1)
    if op.run is ops.batch_norm:
        return _unfolded(node, tensors)
    inputs = [known[n.name] for n in operands_of(node) if n.name in known]
    if not inputs or len(inputs) != len(operands_of(node)):
        return None
    if op.kind is Kind.CONCAT:
        return _concatenated(inputs) if node.kwargs["dim"] == 1 else None
    if op.kind is Kind.ADD:
        return _summed(node, inputs)
    if op.weight is not None:
        return _product(node, inputs[0], tensors)
    if not splits_channels(node) or (inputs[0].last and op.kind is not Kind.ACTIVATION):
        return None
    if op.kind is Kind.ACTIVATION:
        return _function(node, inputs[0], tensors)
    if not op.keeps_mean or node.kwargs.get("divisor") is not None:
        return None
    return Expected(inputs[0].mean, None, ends_in_channels(node))


def _unfolded(node: fx.Node, tensors: dict[str, Tensor]) -> Expected:
    _, var, gamma, beta = (tensors[str(a.target)] if isinstance(a, fx.Node) else None for a in node.args[1:])
    assert var is not None
    gamma, beta = torch.ones_like(var) if gamma is None else gamma, torch.zeros_like(var) if beta is None else beta
    normal = normal_after(var, gamma, beta, float(node.kwargs["eps"]))  # type: ignore[arg-type]
    return Expected(normal.mean.double(), normal.std.double())


def _concatenated(inputs: list[Expected]) -> Expected | None:
    if any(x.last for x in inputs):
        return None
    stds = [x.std for x in inputs if x.std is not None]
    return Expected(torch.cat([x.mean for x in inputs]), torch.cat(stds) if len(stds) == len(inputs) else None)


def _summed(node: fx.Node, inputs: list[Expected]) -> Expected | None:
    """A sum of two values; one with a constant is not followed, nor one of different axes."""
    if len(inputs) != 2 or len({(len(x.mean), x.last) for x in inputs}) > 1:
        return None
    run = op_of(node).run  # type: ignore[union-attr]
    return Expected(run(inputs[0].mean, inputs[1].mean), None, inputs[0].last)


def _product(node: fx.Node, x: Expected, tensors: dict[str, Tensor]) -> Expected | None:
    op, weight = op_of(node), weight_of(node)
    if weight is None or op is None or op.bias is None:
        return None
    mean, bias = expected_product(node, tensors[str(weight.target)], x), node.args[op.bias]
    if mean is None or (isinstance(bias, fx.Node) and bias.op != "get_attr"):
        return None
    return Expected(mean + tensors[str(bias.target)] if isinstance(bias, fx.Node) else mean, None, x.last)


def _function(node: fx.Node, x: Expected, tensors: dict[str, Tensor]) -> Expected | None:
    """An element-wise function of normal values; its result is not normal any more."""
    if x.std is None:
        return None
    limits = limits_of(node)
    if limits is not None:
        return replace(x, mean=clipped_normal_mean(x.mean, x.std, *limits), std=None)
    parameters = [tensors[str(a.target)].double() for a in node.args[1:] if isinstance(a, fx.Node)]
    run = partial(_apply, node, parameters)
    return replace(x, mean=function_of_normal_mean(run, x.mean, x.std), std=None)


def _apply(node: fx.Node, parameters: list[Tensor], values: Tensor) -> Tensor:
    return op_of(node).run(values, *parameters, **node.kwargs)  # type: ignore[union-attr]


def unknown_reason(node: fx.Node) -> str:
    """Why nothing follows about a value that `expected_values` does not hold, in words."""
    if node.op == "placeholder":
        return "its input is the network's"
    what = node.target.__name__ if kind_of(node) is not None else node.op  # type: ignore[union-attr]
    return f"the mean of its input ({what}) does not follow from BatchNorm statistics"
