"""What an image's pixels tell without a network: how smooth, how bright, how varied it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 64  # of the intensity histogram; small images have too few pixels for 256
PIXEL_VALUES = ("entropy", "flatness", "variation", "variance", "brightness", "contrast")


def pixel_values(images: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Statistics of the intensity (the mean over the channels) of each image.

    `entropy`: of the histogram in bits, 0 to 6; `flatness`: geometric over arithmetic mean of its smoothed
    probabilities, 1 for a flat histogram (as the spectral flatness of Gray and Markel, 1974); `variation`: mean
    absolute difference of neighbouring pixels (anisotropic total variation a pixel); `variance`: mean variance within
    3 x 3 pixels; `brightness` and `contrast`: mean and standard deviation.

    Args:
        images: float, (N, C, H, W), H and W at least 3.
        low, high: bounds of the histogram; intensities beyond count in its end bins.

    Returns:
        float32 (N,) each, on the images' device.

    Example:
        >>> found = pixel_values(torch.zeros(1, 3, 8, 8), -1.0, 1.0)
        >>> float(found["entropy"]), float(found["variation"])
        (0.0, 0.0)
    """
    grey = images.float().mean(1)
    share = _histogram(grey, low, high)
    count = grey[0].numel()
    smoothed = (share * count + 1) / (count + BINS)
    down, right = grey.diff(dim=1).abs(), grey.diff(dim=2).abs()
    inner = F.avg_pool2d(torch.stack([grey, grey.square()], 1), 3, stride=1)
    return {
        "entropy": torch.special.entr(share).sum(1) / torch.log(torch.tensor(2.0)),
        "flatness": smoothed.log().mean(1).exp() * BINS,
        "variation": (down.sum((1, 2)) + right.sum((1, 2))) / (down[0].numel() + right[0].numel()),
        "variance": (inner[:, 1] - inner[:, 0].square()).clamp(min=0).mean((1, 2)),
        "brightness": grey.mean((1, 2)),
        "contrast": grey.flatten(1).std(1, correction=0),
    }


def _histogram(grey: Tensor, low: float, high: float) -> Tensor:
    """Share of each image's pixels in each bin, float32 (N, BINS)."""
    width = (high - low) / BINS or 1.0
    bins = ((grey - low) / width).floor().long().clamp(0, BINS - 1).flatten(1)
    counts = torch.zeros(len(grey), BINS, device=grey.device).scatter_add_(1, bins, torch.ones_like(bins.float()))
    return counts / bins.shape[1]
