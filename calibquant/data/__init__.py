"""Images for calibration and evaluation: opening sets, preprocessing, batches, manifests."""

from calibquant.data.augment import Augmented
from calibquant.data.imageset import ImageSet, Subset, TensorImages, UnreadableImageError, check_images, check_labels
from calibquant.data.loading import Batch, batches
from calibquant.data.manifest import (
    Manifest,
    ManifestRow,
    check_calibration_set,
    find_images,
    make_manifest,
    manifest_csv,
    read_manifest,
)
from calibquant.data.opening import open_images

__all__ = [
    "Augmented",
    "Batch",
    "ImageSet",
    "Manifest",
    "ManifestRow",
    "Subset",
    "TensorImages",
    "UnreadableImageError",
    "batches",
    "check_calibration_set",
    "check_images",
    "check_labels",
    "find_images",
    "make_manifest",
    "manifest_csv",
    "open_images",
    "read_manifest",
]
