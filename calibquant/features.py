"""Features: what flows through a network for all calibration images at once, advanced piece by piece.

Each op runs once over the images, so collecting the inputs of all units costs one pass through the network, not one a
unit. Only what later ops still read is kept: in memory up to a limit and in mapped files beyond it, as float32 or
bfloat16.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from calibquant.errors import RunFolderError
from calibquant.parallel import images_at_once

Piece = Callable[[Sequence[str], Sequence[str]], nn.Module]


class FeatureStore:
    """Where features are kept: tensors in memory up to a limit, and files mapped into memory beyond it.

    Several `Features` may share a store; the limit is over all of them.

    Args:
        dtype: what floating-point values are rounded to, float32 or bfloat16.
        limit: bytes in memory; None sets no limit.
        folder: where the files lie; None is the system's folder of temporary files, which may itself be in memory. The
            files have no name there, so nothing of them is left however the process ends.

    Example:
        >>> store = FeatureStore(limit=4096)
        >>> small, large = store.allocate((8, 16)), store.allocate((8, 1000))
        >>> store.in_memory
        512
        >>> del small
        >>> store.in_memory
        0
    """

    def __init__(
        self, dtype: torch.dtype = torch.float32, limit: float | None = None, folder: Path | None = None
    ) -> None:
        self.dtype, self.limit, self.folder = dtype, math.inf if limit is None else limit, folder
        self.in_memory = 0  # bytes of the tensors in memory that are still used

    def allocate(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialized tensor on the CPU for values of `dtype`: of the store's dtype if these are floating-point.

        Raises:
            RunFolderError: the tensor exceeds the limit, and the disk is full or the folder cannot be written.
        """
        dtype = self.dtype if dtype.is_floating_point else dtype
        size = math.prod(shape) * dtype.itemsize
        if self.in_memory + size > self.limit:
            return _mapped(shape, dtype, size, self.folder)
        tensor = torch.empty(tuple(shape), dtype=dtype)
        self.in_memory += size
        weakref.finalize(tensor.untyped_storage(), self._release, size)  # its storage lives as long as any slice
        return tensor

    def _release(self, size: int) -> None:
        self.in_memory -= size


class Features:
    """The live values of one network over a set of images.

    Args:
        graph: the canonical graph that says what reads what.
        piece: gives a module that computes some nodes of it, as `graph.subgraph` or `QuantModel.part` do.
        images: float32, (N, C, H, W): the values of the graph's input.
        most: images in one forward pass, at most: of large images fewer.
        device: where pieces run, in float32; values are kept on the CPU.
        store: what keeps the values that are computed (`images` stays as it is given); by default float32 in memory.

    Raises:
        ValueError: the network has not exactly one input.
    """

    def __init__(
        self,
        graph: fx.Graph,
        piece: Piece,
        images: Tensor,
        most: int,
        device: torch.device | str = "cpu",
        store: FeatureStore | None = None,
    ) -> None:
        self.graph, self.piece, self.device = graph, piece, device
        self.batch_size = images_at_once(images.shape, most, device)
        self.store = store or FeatureStore()
        self.order = [n for n in graph.nodes if n.op != "get_attr"]
        self.position = {n.name: i for i, n in enumerate(self.order)}
        inputs = [n for n in self.order if n.op == "placeholder"]
        if len(inputs) != 1:
            raise ValueError("features need a network with one input")
        self.live: dict[str, Tensor] = {inputs[0].name: images}
        self.done = self.position[inputs[0].name] + 1

    def advance(self, until: str) -> None:
        """Compute everything that comes before the node `until`, and drop what is not read from there on.

        Raises:
            ValueError: `until` comes before the node reached already; what it needs may be gone.
            RunFolderError: the store's disk is full or its folder cannot be written.
        """
        stop = self.position[until]
        if stop < self.done:
            raise ValueError(f"features are at {self.order[self.done].name} already and cannot go back to {until}")
        nodes = [n.name for n in self.order[self.done : stop]]
        later = [n for n in self.order[:stop] if any(self.position[u.name] >= stop for u in n.users)]
        fresh = [n.name for n in later if n.name in nodes]
        if fresh:
            values = self.run(nodes, fresh)
            self.live |= dict(zip(fresh, values, strict=True))
        self.done = stop
        self.live = {n.name: self.live[n.name] for n in later}

    def run(self, nodes: Sequence[str], outputs: Sequence[str]) -> list[Tensor]:
        """What some nodes compute from the live values, for all images: one tensor (N, ...) for each output.

        Raises:
            RunFolderError: the store's disk is full or its folder cannot be written.
        """
        results: list[Tensor] = []
        count, start = len(next(iter(self.live.values()))), 0
        for values in self.stream(nodes, outputs):
            if not results:
                results = [self.store.allocate((count, *v.shape[1:]), v.dtype) for v in values]
            for result, value in zip(results, values, strict=True):
                result[start : start + self.batch_size] = value.cpu()
            start += self.batch_size
        return results

    def stream(self, nodes: Sequence[str], outputs: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
        """What `run` gives, batch by batch on the device, and nothing of it is kept."""
        module = self.piece(nodes, outputs)
        entries = [n.name for n in _inputs(module)]
        count = len(next(iter(self.live.values())))
        for start in range(0, count, self.batch_size):
            part = slice(start, start + self.batch_size)
            with torch.no_grad():
                values = module(*(take(self.live[name], part, self.device) for name in entries))
            yield values if isinstance(values, tuple) else (values,)


def take(values: Tensor, rows: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
    """Some images' values as they are computed with: on a device, and in float32 if they are floating-point.

    Args:
        values: (N, ...), as a store keeps them.
        rows: a slice of the N, or int64 numbers on the CPU.
    """
    part = values[rows] if isinstance(rows, slice) else values.index_select(0, rows)  # three times as fast as [rows]
    return part.to(device, torch.float32 if part.is_floating_point() else part.dtype)


def _mapped(shape: Sequence[int], dtype: torch.dtype, size: int, folder: Path | None) -> Tensor:
    """A tensor of `size` bytes in a file without a name, which lives as long as the tensor's memory."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # so that a full disk is an error here, not a SIGBUS at a later write
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(tuple(shape))
    except OSError as error:
        raise RunFolderError(
            folder or "folder of temporary files",
            f"features cannot be kept there ({error.strerror})",
            "free space there, or raise reconstruct.cache_limit",
        ) from error


def _inputs(module: nn.Module) -> list[fx.Node]:
    owner: Any = getattr(module, "teacher", module)
    return [n for n in owner.graph.nodes if n.op == "placeholder"]
