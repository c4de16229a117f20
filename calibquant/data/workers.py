"""Decoding images in processes of their own, by PyTorch's DataLoader.

Worth it where several cores decode for a fast device: threads share one interpreter. The processes start afresh (by
forkserver or spawn), so that nothing of the run's threads is copied into them; a script needs its
`if __name__ == "__main__":`. They end with their reader, with the run and with Ctrl-C.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from calibquant.data.imageset import ImageSet, Subset, UnreadableImageError
from calibquant.errors import CalibQuantError, DataError

PART = 16  # images that a process decodes and sends at once

Part = tuple[int, ...]
Loaded = list[Tensor | UnreadableImageError]


def load(images: ImageSet, part: Part) -> Loaded:
    """Images one after the other; with `on_error: skip` the error in the place of an unreadable one.

    Raises:
        DataError: an image cannot be read or does not fit the preprocessing.
    """
    loaded: Loaded = []
    for i in part:
        try:
            loaded.append(images.image(i))
        except UnreadableImageError as error:
            if images.on_error == "fail":
                raise
            loaded.append(error)
    return loaded


def load_by_processes(images: ImageSet, chunks: Sequence[Part]) -> Generator[Loaded]:
    """The images of each chunk in order, decoded in `images.workers` processes about one chunk ahead.

    Raises:
        DataError: as `load`, or a process was ended from outside.
    """
    base, parts, counts = images, list[Part](), list[int]()
    for chunk in chunks:
        divided = [chunk[i : i + PART] for i in range(0, len(chunk), PART)]
        parts += divided
        counts.append(len(divided))
    while type(base) is Subset:  # the set itself is sent once to each process, not the choice; Augmented changes it
        parts, base = [tuple(base.indices[i] for i in part) for part in parts], base.base
    ahead = 1 + -(-max(counts) // images.workers)
    loader = DataLoader(
        _Parts(base),
        batch_size=None,
        sampler=parts,
        num_workers=images.workers,
        prefetch_factor=ahead,
        collate_fn=_as_it_is,
        worker_init_fn=_enlist,
        multiprocessing_context=_context(),
        generator=torch.Generator(),  # its own, or the loader would draw a seed from the run's
    )
    received = _received(iter(loader))
    for count in counts:
        yield [image for _ in range(count) for image in next(received)]


def _received(arriving: Iterator[_Sent | CalibQuantError]) -> Iterator[Loaded]:
    """What the processes sent, in order; errors are raised here."""
    try:
        while True:
            sent, died = None, ""
            try:
                sent = next(arriving, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                died = " ".join(str(error).split()).rstrip(".")
            if died:  # raised here, since that error's traceback would keep the other processes
                mend = "look for lack of memory, guard a script's start with if __name__ == '__main__', or use 0"
                raise DataError("data.workers", f"a process was ended from outside ({died})", mend)
            if sent is None:
                return
            if isinstance(sent, CalibQuantError):
                raise sent
            yield sent.unpacked()
    finally:
        del arriving  # ends the processes, even where a traceback keeps this frame


def _context() -> Any:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once for all processes
    return context


@dataclass(frozen=True)
class _Sent:
    """A part's images on their way: NumPy arrays pass through a pipe and need no shared memory, which can be scarce."""

    arrays: npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]
    errors: dict[int, UnreadableImageError]

    def unpacked(self) -> Loaded:
        """The images with the errors in their places."""
        images = iter(self.arrays)
        total = len(self.arrays) + len(self.errors)
        return [self.errors[k] if k in self.errors else torch.from_numpy(next(images)) for k in range(total)]


class _Parts(Dataset[Any]):
    """The images of a set by parts, as the loader asks for them."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    def __getitem__(self, part: Part) -> _Sent | CalibQuantError:
        try:
            loaded = load(self._images, part)
        except CalibQuantError as error:
            return error
        arrays = [image.numpy() for image in loaded if isinstance(image, Tensor)]
        errors = {k: error for k, error in enumerate(loaded) if isinstance(error, UnreadableImageError)}
        same = len({array.shape for array in arrays}) == 1
        return _Sent(np.stack(arrays) if same else arrays, errors)


def _as_it_is(value: Any) -> Any:
    return value


def _enlist(_: int) -> None:
    """A process hears no Ctrl-C, which its reader does, and ends with its reader however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
