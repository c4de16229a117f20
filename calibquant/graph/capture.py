"""Capture: any nn.Module, or a named part of one, becomes one GraphModule of canonical ops that computes the same."""

from __future__ import annotations

import copy
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, fx, nn

from calibquant.errors import CaptureError, ModelError, nearest
from calibquant.graph import rules  # noqa: F401  (fills the table of rules)
from calibquant.graph.lowering import WAY_OUT, Lowering

TOLERANCE = 1e-5  # of the largest output; DESIGN's bound for capture and folding


def capture(network: nn.Module, example: Tensor | tuple[Tensor, ...], submodule: str | None = None) -> fx.GraphModule:
    """The canonical graph of a network in evaluation mode.

    Symbolic tracing is tried first; where the network's code needs concrete shapes, torch.export is. Either trace is
    lowered to the canonical ops of `graph.ops` and compared with the network on two batch sizes. The network is not
    changed; its parameters are copied, as float32 on the CPU.

    Args:
        network: any module that takes tensors whose first dimension is the batch and returns one tensor.
        example: input(s) of shape (N, ...), N >= 1, on the CPU; values matter little, shapes and dtypes do.
        submodule: dotted name of the part to capture instead; it receives what the network feeds it.

    Returns:
        a GraphModule in eval mode without gradients, whose call targets are functions of `graph.ops`.

    Raises:
        CaptureError: an operation has no canonical form (the error names the line), or the outputs differ.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten())
        >>> [n.target.__name__ for n in capture(net, torch.zeros(1, 1, 8, 8)).graph.nodes if n.op == "call_function"]
        ['conv2d', 'relu', 'flatten']
    """
    inputs = example if isinstance(example, tuple) else (example,)
    batches = (tuple(_cycle(x, 2) for x in inputs), tuple(_cycle(x, 3) for x in inputs))
    network = copy.deepcopy(network).to("cpu", torch.float32).eval()
    if submodule is not None:
        part = find_submodule(network, submodule)
        batches = (_inputs_of(network, part, batches[0]), _inputs_of(network, part, batches[1]))
        network = part
    try:
        return _checked(Lowering(_symbolic(network), batches).run(), network, batches)
    except CaptureError as error:
        first = error
    try:
        return _checked(Lowering(_exported(network, batches[0]), batches).run(), network, batches)
    except CaptureError as second:
        # The trace by symbols names the user's lines best, unless it could not read them at all.
        raise (second if isinstance(first, _UntraceableError) else first) from second


class _UntraceableError(CaptureError):
    """Symbolic tracing could not follow the network's code."""


def find_submodule(network: nn.Module, name: str) -> nn.Module:
    """The part of a network with a dotted name.

    Raises:
        ModelError: there is none; names the nearest.
    """
    modules = dict(network.named_modules())
    if name not in modules or not name:
        known = [n for n in modules if n and n.count(".") <= name.count(".")]
        raise ModelError("model.submodule", f"the network has no part '{name}'", nearest(name, known))
    return modules[name]


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two outputs relative to the largest value of the first (at least 1)."""
    if a.shape != b.shape:
        return float("inf")
    difference = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    return difference / max(1.0, a.double().abs().max().item()) if difference == difference else float("inf")


def _checked(
    graph: fx.GraphModule, network: nn.Module, batches: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
) -> fx.GraphModule:
    for batch in batches:
        with torch.no_grad():
            want, got = network(*(x.clone() for x in batch)), graph(*(x.clone() for x in batch))
        error = relative_difference(want, got)
        if error > TOLERANCE:
            raise CaptureError(
                type(network).__name__,
                f"the captured graph differs from the network by {error:.1e} at batch size {len(batch[0])}",
                "its code may depend on the batch size or keep state between calls; " + WAY_OUT,
            )
    return graph


# --- the two ways to a raw trace --------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Traces into every module, so that all code becomes functions of tensors; BatchNorm's checks need real tensors."""

    record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.modules.batchnorm._BatchNorm)


def _symbolic(network: nn.Module) -> fx.GraphModule:
    try:
        tracer = _Tracer()
        graph = tracer.trace(network)
        return fx.GraphModule(tracer.root, graph)
    except Exception as error:
        where = _users_line(error) or type(network).__name__
        raise _UntraceableError(where, f"symbolic tracing stops here ({_short(error)})", WAY_OUT) from error


def _exported(network: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=1, max=65536)
    shapes = tuple({0: batch} for _ in inputs)
    try:
        with _quiet():
            program = torch.export.export(network, inputs, dynamic_shapes=shapes, strict=False)
            # Without decompositions this only turns in-place operations into functional ones.
            return program.run_decompositions({}).module(check_guards=False)
    except Exception as error:
        where = _users_line(error) or type(network).__name__
        raise CaptureError(
            where, f"neither tracing nor torch.export can follow it ({_short(error)})", WAY_OUT
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export prints its graphs when it fails; what a user needs of that stands in our error."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _users_line(error: BaseException) -> str | None:
    """The innermost line of the traceback that is neither torch's nor ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _internal(f.filename)]
    return f"{frames[-1].filename}, line {frames[-1].lineno}: `{frames[-1].line}`" if frames else None


def _internal(filename: str) -> bool:
    return "/torch/" in filename or "/calibquant/graph/" in filename or filename.startswith("<")


def _short(error: BaseException) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return first[:160]


# --- inputs -----------------------------------------------------------------------------------------------------------


def _cycle(x: Tensor, count: int) -> Tensor:
    rows = x[torch.arange(count) % len(x)].cpu().clone()
    return rows.float() if rows.is_floating_point() else rows


class _ReachedError(Exception):
    pass


def _inputs_of(network: nn.Module, part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a network feeds to one of its parts."""
    seen: list[tuple[Any, ...]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((*args, kwargs) if kwargs else args)
        raise _ReachedError

    handle = part.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            network(*inputs)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    if not seen:
        raise CaptureError("model.submodule", "the network never calls it", "name another part")
    if not all(isinstance(v, Tensor) for v in seen[0]):
        problem = "the network does not feed it tensors by position"
        raise CaptureError("model.submodule", problem, "name another part, or change the call in the network")
    return tuple(v.clone() for v in seen[0])
