"""An ONNX file as a network: what evaluates a torch module evaluates it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from calibquant.errors import ModelError

MOST_AT_ONCE = 65_536  # images; a file that asks for more is damaged


class Runnable(Protocol):
    """An opened ONNX file."""

    @property
    def inputs(self) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
        """Name and shape of each input; a symbolic size is None."""

    def run(self, *images: npt.NDArray[Any]) -> Sequence[npt.NDArray[Any]]:
        """The outputs for one array an input."""


class OnnxNetwork(nn.Module):
    """Runs images through an opened ONNX file.

    Args:
        session: the file. One of a fixed batch size is given that many images at a time, the last ones filled up.

    Example:
        >>> class Twice:
        ...     inputs = (("x", (2, 3)),)
        ...     def run(self, x):
        ...         return [2 * x]
        >>> OnnxNetwork(Twice())(torch.ones(3, 3)).shape
        torch.Size([3, 3])
    """

    def __init__(self, session: Runnable) -> None:
        super().__init__()
        self.session = session
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        """The file's first output for inputs of shape (N, ...), on the CPU.

        Raises:
            ModelError: the file takes other inputs.
        """
        arrays = [x.detach().cpu().numpy() for x in inputs]
        shape = self.session.inputs[0][1]
        size = shape[0] if shape else None
        if size is None:
            return torch.from_numpy(self.session.run(*arrays)[0])
        if not 1 <= size <= MOST_AT_ONCE:
            name = getattr(self.session, "name", "the ONNX file")
            raise ModelError(name, f"takes {size:,} images at a time", "give a file that calibquant export wrote")
        count = len(arrays[0])
        parts = [self._run([_filled(a[i : i + size], size) for a in arrays]) for i in range(0, count, size)]
        return torch.from_numpy(np.concatenate(parts)[:count])

    def _run(self, arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return self.session.run(*arrays)[0]


def _filled(images: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """`size` images; the last one is repeated."""
    return np.concatenate([images, np.repeat(images[-1:], size - len(images), axis=0)])
