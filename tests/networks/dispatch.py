"""Counting the compute operations that really run, at the dispatcher: independent of every tracer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COUNTED = ("convolution", "matmul", "add", "pool")

_KINDS = {
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"), "convolution"),
    **dict.fromkeys(("linear", "mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "matmul"), "matmul"),
    **dict.fromkeys(("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"), "pool"),
    **dict.fromkeys(("mean", "sum", "amax", "max"), "pool"),
}


def count_compute(network: nn.Module, example: Tensor) -> dict[str, int]:
    """How often each kind of compute operation runs on activations in one forward pass, in eval mode.

    Operations on weights alone are not counted, those that mix weights and activations are.

    - convolution: every convolution, also transposed ones.
    - matmul: Linear layers and products of matrices.
    - add: additions and subtractions of two tensors; not of numbers or 0-dimensional tensors, and not of a vector of
      weights, since that is how torch adds the bias of a Linear when its input is not contiguous.
    - pool: maximum and average pools, adaptive ones, and means, sums and maxima over dimensions.
    """
    counter = _Counter(example)
    training = network.training
    network.eval()
    try:
        with torch.no_grad(), counter:
            network(example)
    finally:
        network.train(training)
    return {kind: counter.counts[kind] for kind in COUNTED}


class _Counter(TorchDispatchMode):
    """Follows which memory holds values derived from the example, through views and in-place operations."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        # Tensors are kept, so that no address of an activation is given to something else.
        self.activations = {_address(example): example}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(_address(tensor) in self.activations for tensor in _tensors((args, kwargs))):
            self.activations |= {_address(tensor): tensor for tensor in _tensors(result)}
            kind = self._kind(func, args)
            if kind:
                self.counts[kind] += 1
        return result

    def _kind(self, func: Any, args: tuple[Any, ...]) -> str | None:
        name = func.overloadpacket.__name__
        if name in ("add", "add_", "sub", "sub_", "rsub"):
            return "add" if all(self._is_operand(arg) for arg in args[:2]) else None
        return _KINDS.get(name)

    def _is_operand(self, arg: object) -> bool:
        if not isinstance(arg, Tensor) or arg.dim() == 0:
            return False
        return arg.dim() > 1 or _address(arg) in self.activations


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
