"""Running a network over images: the same code for the float and the quantized network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibquant.data import Batch, ImageSet, UnreadableImageError, batches, check_images, check_labels
from calibquant.errors import DataError, ModelError
from calibquant.metrics import ScoreAccumulator, Scores, confusion_matrix
from calibquant.networks import check_network, short
from calibquant.parallel import every, images_at_once, share

MOST_AT_ONCE = 250  # images
_OF_MACHINES = ("memory", "primitive", "CUDA", "MPS")  # in what torch says where not the images are to blame


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network did on a set of images.

    Attributes:
        scores: the metrics.
        predictions: class of each image, int64, shape (N,); pass it as `reference` to evaluate another network.
        indices: which images of the set these are; unreadable ones that were skipped are missing.
        labels: of these images, int64, shape (N,), -1 where unknown.
        classes: how many the network tells apart.
        logits: float32, shape (N, classes), on the CPU; None unless they were to be kept.
    """

    scores: Scores
    predictions: npt.NDArray[np.int64]
    indices: tuple[int, ...]
    labels: npt.NDArray[np.int64]
    classes: int
    logits: Tensor | None = None

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """Images of each label (row) with each prediction (column), int64, shape (classes, classes)."""
        return confusion_matrix(self.labels, self.predictions, self.classes)


def evaluate(
    network: Callable[[Tensor], Tensor],
    images: ImageSet,
    batch_size: int | None = None,
    count: int | None = None,
    reference: npt.NDArray[np.int64] | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: str | torch.device = "cpu",
    keep_logits: bool = False,
) -> Evaluation:
    """Run a network over the images and score its predictions.

    Of several processes each runs it over its share; all get the result of the whole.

    Args:
        network: from images (N, C, H, W) to logits (N, classes). A Module must be in eval mode and on `device` already.
        images: the set; labels may be unknown.
        batch_size: images in one forward pass; None takes 250, of large images fewer.
        count: only the first `count` images; None or more than there are means all.
        reference: the predictions of another network on the same images, for the agreement.
        progress: called after each batch with the images done and the images in all.
        device: where the network is.
        keep_logits: keep the logits too.

    Raises:
        DataError: there are no images, one cannot be read, a label is no class of the network, or the reference has
            another length; images are of a size that the network does not take, or no ImageSet.
        ModelError: the network does not return finite logits of shape (N, classes).

    Example:
        >>> from calibquant.data import TensorImages
        >>> images = TensorImages(torch.rand(4, 3, 8, 8), labels=[0, 0, 1, 1])
        >>> evaluate(lambda x: x.mean(dim=(2, 3)), images, batch_size=2).predictions.shape
        (4,)
    """
    check_images(images, "images")
    if not callable(network):
        check_network(network)
    total = len(images) if count is None else min(count, len(images))
    if total < 1:
        raise DataError("evaluation", "there are no images to evaluate on", "give at least one image")
    mine = share(total)
    chosen = images.subset(mine)
    if batch_size is None:
        batch_size = images_at_once(_shape(chosen), MOST_AT_ONCE, device)
    accumulator, indices, kept = ScoreAccumulator(), list[int](), list[Tensor]()
    for batch in batches(chosen, batch_size):
        logits = _forward(network, batch, chosen, device)
        if not indices:
            check_labels(chosen, logits.shape[1])
        accumulator.update(logits, batch.labels)
        indices.extend(mine[i] for i in batch.indices)
        if keep_logits:
            kept.append(logits)
        if progress is not None:
            progress(batch.indices[-1] + 1, len(mine))
    if progress is not None and indices and indices[-1] < mine[-1]:  # the last images were skipped
        progress(len(mine), len(mine))
    accumulator, indices, kept = _merged(every((accumulator, indices, kept)))
    if reference is not None and len(reference) != len(indices):
        problem = f"holds {len(reference)} predictions for {len(indices)} images"
        raise DataError("reference", problem, "evaluate both networks on the same images")
    logits_kept = torch.cat(kept) if keep_logits else None
    return Evaluation(
        accumulator.result(reference),
        accumulator.predictions,
        tuple(indices),
        accumulator.labels,
        accumulator.num_classes or 0,
        logits_kept,
    )


def _merged(
    parts: list[tuple[ScoreAccumulator, list[int], list[Tensor]]],
) -> tuple[ScoreAccumulator, list[int], list[Tensor]]:
    """What all processes found, in the order of the images."""
    accumulator, indices, kept = parts[0]
    for scores, numbers, logits in parts[1:]:
        accumulator.merge(scores)
        indices += numbers
        kept += logits
    return accumulator, indices, kept


def _shape(images: ImageSet) -> tuple[int, ...]:
    """That of the first readable image, as a batch of one; where there is none, `batches` will say so."""
    for i in range(len(images)):
        with suppress(UnreadableImageError):
            return 1, *images.image(i).shape
    return (1,)


def _forward(network: Callable[[Tensor], Tensor], batch: Batch, images: ImageSet, device: str | torch.device) -> Tensor:
    """Checked logits of a batch: float32 on the CPU."""
    try:
        with torch.inference_mode():
            output = network(batch.images.to(device))
    except (RuntimeError, ValueError, IndexError) as error:
        if any(word in str(error) for word in _OF_MACHINES):
            raise
        size = " x ".join(map(str, batch.images.shape[1:]))
        problem = f"is {size}, which the network does not take ({short(error)})"
        mend = "give images of the size and channels that the network was made for (data.preprocess)"
        raise DataError(images.name(batch.indices[0]), problem, mend) from error
    n = len(batch.indices)
    mend = f"it must return floating point logits of shape ({n}, classes) for {n} images"
    if not isinstance(output, Tensor):
        raise ModelError("network output", f"is a {type(output).__name__}, not a tensor", mend)
    if output.ndim != 2 or output.shape[0] != n or output.shape[1] < 1 or not output.is_floating_point():
        what = f"is {str(output.dtype).removeprefix('torch.')} of shape {tuple(output.shape)}"
        raise ModelError("network output", what, mend)
    logits = output.to("cpu", torch.float32)
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        first = batch.indices[int((~finite).nonzero()[0])]
        raise ModelError(
            "network output", f"holds NaN or infinity for {images.name(first)}", "check the weights and the ranges"
        )
    return logits
