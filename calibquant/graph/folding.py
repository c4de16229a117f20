"""BatchNorm folding.

w' = w * (gamma / std),  b' = gamma * b / std + (beta - gamma * mean / std),  std = sqrt(var + eps)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from calibquant.graph import ops
from calibquant.graph.expectations import normal_after, set_normal
from calibquant.graph.lowering import build
from calibquant.graph.nodes import kind_of, op_of, weight_of
from calibquant.graph.ops import Kind


def fold_batch_norm(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a canonical graph with every BatchNorm folded into the convolution or linear before it, where possible.

    A BatchNorm stays where something else reads the convolution's output, or where the convolution's weight is used by
    another call that is not followed by the same BatchNorm. Computed in float32 in the order of the formula above, as
    the field's reference code does: at 2 bits a weight that differs in its last digit can change a decision.
    A folded call remembers what its BatchNorm says about its output; see `graph.expectations.normal_of`.

    Example:
        >>> from torch import nn
        >>> from calibquant.graph.capture import capture
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> graph = fold_batch_norm(capture(net, torch.zeros(1, 1, 8, 8)))
        >>> [n.target.__name__ for n in graph.graph.nodes if n.op == "call_function"]
        ['conv2d']
    """
    tensors = dict(graph.named_buffers())
    folded = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    folded.output(folded.graph_copy(graph.graph, copies))
    for parameter in [n for n in folded.nodes if n.op == "get_attr"]:
        calls = list(parameter.users)
        norms = [_norm_after(call, parameter) for call in calls]
        if not norms or any(n is None for n in norms):
            continue
        if len({(n.args[1:], n.kwargs["eps"]) for n in norms}) > 1 or len({c.args[2] for c in calls}) > 1:  # type: ignore[union-attr]
            continue
        _fold(folded, tensors, parameter, calls, [n for n in norms if n is not None])
    folded.eliminate_dead_code()
    return build({str(n.target): tensors[str(n.target)] for n in folded.nodes if n.op == "get_attr"}, folded)


def with_biases(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a canonical graph in which every product of a parameter has a bias, zero where it had none.

    Corrections need a bias to stand in. Calls that share a weight share the bias.
    """
    tensors = dict(graph.named_buffers())
    edited = fx.Graph()
    edited.output(edited.graph_copy(graph.graph, {}))
    for parameter in [n for n in edited.nodes if n.op == "get_attr"]:
        calls = [n for n in parameter.users if weight_of(n) is parameter and _lacks_bias(n)]
        if not calls:
            continue
        name, op = str(parameter.target), op_of(calls[0])
        groups = int(calls[0].kwargs.get("groups", 1)) if op.weight_axis else 1  # type: ignore[union-attr]
        bias_name = _beside(name, "added_bias")
        tensors[bias_name] = tensors[name].new_zeros(tensors[name].shape[op.weight_axis] * groups)  # type: ignore[union-attr]
        with edited.inserting_after(parameter):
            bias = edited.create_node("get_attr", bias_name, (), {}, name=bias_name.replace(".", "_"))
        for call in calls:
            call.update_arg(op_of(call).bias, bias)  # type: ignore[union-attr]
    return build({str(n.target): tensors[str(n.target)] for n in edited.nodes if n.op == "get_attr"}, edited)


def _beside(weight: str, bias: str) -> str:
    """conv1.weight -> conv1.<bias>; up, a parameter of its own, -> up_<bias>."""
    stem = weight.removesuffix("weight")
    return f"{weight}_{bias}" if stem == weight else f"{stem.rstrip('.')}.{bias}".lstrip(".")


def _lacks_bias(call: fx.Node) -> bool:
    op = op_of(call)
    return op is not None and op.bias is not None and call.args[op.bias] is None


def _norm_after(call: fx.Node, parameter: fx.Node) -> fx.Node | None:
    """The BatchNorm that alone reads a call's output, if the call takes `parameter` as its weight."""
    if weight_of(call) is not parameter or kind_of(call) not in (Kind.CONVOLUTION, Kind.MATMUL) or len(call.users) != 1:
        return None
    if kind_of(call) is Kind.MATMUL and len(call.meta.get("shape", ())) != 2:
        return None  # BatchNorm normalizes axis 1, and only of a matrix is that a linear's output channel
    norm = next(iter(call.users))
    return norm if norm.target is ops.batch_norm and norm.args[0] is call else None


def _fold(
    graph: fx.Graph, tensors: dict[str, Tensor], parameter: fx.Node, calls: list[fx.Node], norms: list[fx.Node]
) -> None:
    mean, var, gamma, beta = (tensors[str(a.target)] if isinstance(a, fx.Node) else None for a in norms[0].args[1:])
    assert mean is not None
    assert var is not None
    gamma, beta = torch.ones_like(mean) if gamma is None else gamma, torch.zeros_like(mean) if beta is None else beta
    std = torch.sqrt(var + float(norms[0].kwargs["eps"]))  # type: ignore[arg-type]
    name, old_bias = str(parameter.target), calls[0].args[2]
    normal = normal_after(var, gamma, beta, float(norms[0].kwargs["eps"]))  # type: ignore[arg-type]
    bias = beta - gamma * mean / std
    if isinstance(old_bias, fx.Node):
        bias = gamma * tensors[str(old_bias.target)] / std + bias

    op = op_of(calls[0])
    assert op is not None
    tensors[name] = _scaled(tensors[name], gamma / std, op.weight_axis, int(calls[0].kwargs.get("groups", 1)))  # type: ignore[arg-type]
    bias_name = _beside(name, "folded_bias")
    tensors[bias_name] = bias
    with graph.inserting_after(parameter):
        bias_node = graph.create_node("get_attr", bias_name, (), {}, name=bias_name.replace(".", "_"))
    for call, norm in zip(calls, norms, strict=True):
        call.args = (*call.args[:2], bias_node)
        set_normal(call, normal)
        norm.replace_all_uses_with(call)
        graph.erase_node(norm)


def _scaled(weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
    """A weight times one factor per output channel; transposed convolutions hold (in, out / groups, ...)."""
    if axis == 0:
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)
