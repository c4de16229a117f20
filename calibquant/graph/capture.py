"""Capture: any nn.Module, or a named part of one, becomes one GraphModule of canonical ops that computes the same."""

from __future__ import annotations

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
from calibquant.networks import float_copy, output_words, short

TOLERANCE = 1e-5  # of the largest output; DESIGN's bound for capture and folding


@torch.inference_mode(False)
def capture(network: nn.Module, example: Tensor | tuple[Tensor, ...], submodule: str | None = None) -> fx.GraphModule:
    """The canonical graph of a network in evaluation mode.

    Symbolic tracing is tried first; where the network's code needs concrete shapes, torch.export is. Either trace is
    lowered to the canonical ops of `graph.ops` and compared with the network on two batch sizes. The network is not
    changed; its parameters are copied, as float32 on the CPU. Wrappers (DataParallel, torch.compile, …) are taken off.

    Args:
        network: any module that takes tensors whose first dimension is the batch and returns one tensor.
        example: input(s) of shape (N, ...), N >= 1, on the CPU; values matter little, shapes and dtypes do.
        submodule: dotted name of the part to capture instead; it receives what the network feeds it.

    Returns:
        a GraphModule in eval mode without gradients, whose call targets are functions of `graph.ops`.

    Raises:
        ModelError: the network or the example is of another type, or a tensor of the network has no usable values.
        CaptureError: the network does not take the example or returns more than one tensor, an operation has no
            canonical form (the error names the line), or the outputs differ.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten())
        >>> [n.target.__name__ for n in capture(net, torch.zeros(1, 1, 8, 8)).graph.nodes if n.op == "call_function"]
        ['conv2d', 'relu', 'flatten']
    """
    inputs = example if isinstance(example, tuple) else (example,)
    network = float_copy(network)
    batches = (tuple(_cycle(x, 2) for x in inputs), tuple(_cycle(x, 3) for x in inputs))
    where = "the network's output"
    if submodule is not None:
        part, where = find_submodule(network, submodule), f"the output of '{submodule}'"
        batches = (_inputs_of(network, part, batches[0]), _inputs_of(network, part, batches[1]))
        network = part
    _check_output(_run(network, batches[0]), where)
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


def _run(network: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What a network returns.

    Raises:
        CaptureError: it does not take these inputs; names their shapes and the line.
    """
    try:
        with torch.no_grad():
            return network(*(x.clone() for x in inputs))
    except Exception as error:  # the user's code can raise anything
        shapes = " and ".join(" x ".join(map(str, x.shape[1:])) for x in inputs)
        where = _users_line(error) or type(network).__name__
        mend = "give images of the size and channels that the network takes (data.preprocess), or correct that line"
        raise CaptureError(where, f"fails on images of {shapes} ({short(error)})", mend) from error


def _check_output(output: object, where: str) -> None:
    if not isinstance(output, Tensor):
        what, tensor = output_words(output)
        mend = f"wrap the network in a module that returns {tensor}, or name the part to quantize with model.submodule"
        raise CaptureError(where, f"is {what}, not one tensor", mend)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two outputs relative to the largest value of the first (at least 1).

    Values that are not finite must be the same in both.
    """
    if a.shape != b.shape:
        return float("inf")
    finite = torch.isfinite(a)
    if not finite.all():
        same = torch.equal(finite, torch.isfinite(b)) and torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num())
        return relative_difference(a[finite], b[finite]) if same else float("inf")
    if not a.numel():
        return 0.0
    difference = (a.double() - b.double()).abs().max().item()
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
        raise _UntraceableError(where, f"symbolic tracing stops here ({short(error)})", WAY_OUT) from error


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
            where, f"neither tracing nor torch.export can follow it ({short(error)})", WAY_OUT
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


# --- inputs -----------------------------------------------------------------------------------------------------------


def _cycle(x: Tensor, count: int) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() < 1 or len(x) < 1:
        what = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        raise ModelError("example", what, "give a tensor of images, (N, C, H, W) with N from 1, or a tuple of tensors")
    rows = x[torch.arange(count) % len(x)].cpu().clone()
    return rows.float() if rows.is_floating_point() else rows


class _ReachedError(BaseException):
    """Ends a network's run at the part that is looked for; no Exception, which the network's code may catch."""


def _inputs_of(network: nn.Module, part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a network feeds to one of its parts."""
    seen: list[tuple[Any, ...]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((*args, kwargs) if kwargs else args)
        raise _ReachedError

    handle = part.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        _run(network, inputs)
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
