"""Batches: images decoded ahead by a few threads or processes, delivered in the order asked for."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from calibquant.data.imageset import ImageSet, UnreadableImageError, check_indices
from calibquant.data.workers import Loaded, Part, load, load_by_processes
from calibquant.errors import DataError
from calibquant.parallel import decoding_threads

MOST_THREADS = 4
PREFETCH = 2  # batches decoded while the network works on another
MOST_VALUES = 1 << 27  # numbers in the images of a batch: 64 images of 3 x 836 x 836
MOST_AHEAD = 1 << 28  # bytes of these; of larger images fewer batches are decoded ahead
WORTH_PROCESSES = 256  # fewer images are decoded before processes have started

logger = logging.getLogger("calibquant")


@dataclass(frozen=True, eq=False)
class Batch:
    """Images that pass through a network at once.

    Attributes:
        images: float32, shape (N, C, H, W).
        labels: int64, shape (N,), -1 where unknown.
        indices: where the images stand in their set.
    """

    images: Tensor
    labels: Tensor
    indices: tuple[int, ...]


def batches(images: ImageSet, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
    """The images of a set in batches, in order; the last batch may be smaller.

    With `on_error: skip` unreadable images are left out of their batch and logged once. With `workers` images are
    decoded in processes if they are many; the batches are the same, bit by bit.

    Args:
        images: the set.
        batch_size: images a batch, at least 1.
        indices: which images, in which order; None for all.

    Raises:
        DataError: at once for an invalid batch size or index; while iterating, for an image that cannot be read, holds
            NaN or infinity, or differs in size from others of its batch, and when every image was skipped.

    Example:
        >>> from calibquant.data import TensorImages
        >>> [batch.indices for batch in batches(TensorImages(torch.zeros(5, 3, 8, 8)), 2)]
        [(0, 1), (2, 3), (4,)]
    """
    if batch_size < 1:
        raise DataError("batch_size", f"{batch_size} is not a number of images", "use 1 or more")
    chosen = check_indices(range(len(images)) if indices is None else indices, len(images))
    return _deliver(images, [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)])


def images_within(batch_size: int, shape: Sequence[int]) -> int:
    """How many images pass at once: `batch_size`, of large images fewer, and at least one.

    Args:
        batch_size: as asked for.
        shape: of images, (N, C, H, W).

    Example:
        >>> images_within(64, (1, 3, 640, 640)), images_within(64, (1, 3, 2000, 2000))
        (64, 11)
    """
    return max(1, min(batch_size, MOST_VALUES // math.prod(shape[1:])))


def _deliver(images: ImageSet, chunks: list[Part]) -> Iterator[Batch]:
    apart = images.workers > 0 and sum(map(len, chunks)) >= WORTH_PROCESSES
    delivered = False
    with closing((load_by_processes if apart else _load_by_threads)(images, chunks)) as arriving:
        for chunk in chunks:
            batch = _collect(images, chunk, next(arriving))  # kept by no name, so that a batch is not held twice
            if batch is not None:
                delivered = True
                yield batch
    if chunks and not delivered:
        first = images.name(chunks[0][0])
        raise DataError(first, "this image and all others are unreadable", "correct data.root or replace the files")


def _load_by_threads(images: ImageSet, chunks: Sequence[Part]) -> Generator[Loaded]:
    """The images of each chunk in order, decoded up to PREFETCH chunks ahead as far as these are small."""
    threads = min(MOST_THREADS, decoding_threads())
    pool = ThreadPoolExecutor(threads, thread_name_prefix="calibquant-data")
    pending: deque[list[Future[Loaded]]] = deque()
    ahead, waiting = 0, deque(chunks)
    try:
        while waiting or pending:
            while waiting and len(pending) <= ahead:
                pending.append(_submit(pool, threads, images, waiting.popleft()))
            loaded = [image for future in pending.popleft() for image in future.result()]
            size = sum(image.nbytes for image in loaded if isinstance(image, Tensor))
            ahead = min(PREFETCH, MOST_AHEAD // max(size, 1))
            while waiting and len(pending) < ahead:
                pending.append(_submit(pool, threads, images, waiting.popleft()))
            handed = [loaded]
            del loaded
            yield handed.pop()  # held by the reader alone
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ThreadPoolExecutor, threads: int, images: ImageSet, chunk: Part) -> list[Future[Loaded]]:
    """Share a batch among the threads, in slices: a task for each small image would cost more than its decoding."""
    share = -(-len(chunk) // threads)
    return [pool.submit(load, images, chunk[i : i + share]) for i in range(0, len(chunk), share)]


def _collect(images: ImageSet, chunk: Part, loaded: Loaded) -> Batch | None:
    """One batch, or none when each of its images was skipped."""
    kept: list[tuple[int, Tensor]] = []
    for i, image in zip(chunk, loaded, strict=True):
        if not isinstance(image, UnreadableImageError):
            kept.append((i, image))
        else:
            _report(images, images.name(i), image)
    if not kept:
        return None
    indices = tuple(i for i, _ in kept)
    stacked = _stack(images, indices, [image for _, image in kept])
    known = (images.label(i) for i in indices)
    labels = torch.tensor([-1 if label is None else label for label in known], dtype=torch.int64)
    return Batch(stacked, labels, indices)


def _report(images: ImageSet, name: str, error: UnreadableImageError) -> None:
    if name not in images.skipped:
        images.skipped.add(name)
        logger.warning("image skipped: %s: %s", error.where, error.problem)


def _stack(images: ImageSet, indices: tuple[int, ...], tensors: list[Tensor]) -> Tensor:
    for i, tensor in zip(indices, tensors, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32 or tensor.dim() != 3:
            kind = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
            problem = f"is {type(tensor).__name__}, {kind}, not a float32 tensor of shape (C, H, W)"
            raise DataError(images.name(i), problem, "correct the method `image` of the set")
        if tensor.shape != tensors[0].shape:
            sizes = [" x ".join(map(str, t.shape[1:])) for t in (tensor, tensors[0])]
            problem = f"is {sizes[0]} but {images.name(indices[0])} of the same batch is {sizes[1]}"
            raise DataError(images.name(i), problem, "set data.preprocess.resize and crop")
    stacked = torch.stack(tensors)
    if not torch.isfinite(stacked.sum()):  # NaN and infinity reach the sum, which is a quick look; it may overflow too
        wrong = next((i for i, t in zip(indices, tensors, strict=True) if not torch.isfinite(t).all()), None)
        if wrong is not None:
            raise DataError(images.name(wrong), "holds NaN or infinity", "repair or remove the image")
    return stacked
