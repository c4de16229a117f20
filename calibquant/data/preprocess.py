"""From an encoded image to the network's input: decode, resize, center crop, scale to [0, 1], normalize.

Geometry and arithmetic are torchvision's (`Resize`, `CenterCrop`, `ToTensor`, `Normalize` on PIL images), so that
networks trained there see the input they know. Like there, an EXIF orientation is not applied.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from calibquant.data.imageset import UnreadableImageError
from calibquant.errors import DataError
from calibquant.recipe import Preprocess

Size = int | tuple[int, int]
LARGE = 1 << 24  # pixels after resizing; of more, only those that the crop keeps are computed
MOST_PIXELS = 178_956_970  # that Pillow opens, and that resizing makes

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_REACH = {"bilinear": 1, "bicubic": 2, "lanczos": 3}  # of a filter to either side, in pixels of the coarser image


def check_preprocess(settings: Preprocess, channels: int, field: str = "data.preprocess") -> None:
    """Check the settings that only the data can judge: the lengths of mean and std.

    Args:
        settings: the recipe's preprocessing.
        channels: 3 for colour images, 1 for grey ones.
        field: where the recipe has it.

    Raises:
        DataError: names the field of the recipe.
    """
    for name in ("mean", "std"):
        values = getattr(settings, name)
        if len(values) != channels:
            what = "grey images with 1 channel" if channels == 1 else f"images with {channels} channels"
            one = f"give one value for each channel, e.g. {name}: [{', '.join(['0.5'] * channels)}]"
            raise DataError(f"{field}.{name}", f"has length {len(values)} but these are {what}", one)


def decode(data: bytes, color: str, name: str) -> Image.Image:
    """An encoded image as 8-bit RGB.

    Grey images of 16 or 32 bits are refused, since PIL would saturate them; of 16-bit colour PIL keeps the high bytes.

    Args:
        data: the content of an image file.
        color: "convert" brings grey, palette, CMYK and transparent images to RGB as PIL does; "strict" refuses them.
        name: names the image in errors.

    Raises:
        UnreadableImageError: it is empty, truncated or corrupt.
        DataError: the image has more than 8 bits a channel, or is not RGB under "strict".
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "EPS":  # Pillow would run Ghostscript on it
                raise UnreadableImageError(
                    name, "is a PostScript file", "convert it to PNG, or set data.on_error to skip"
                )
            image.load()
    except (MemoryError, UnreadableImageError):
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise whatever their parsing stumbles over
        large = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
        problem = "has more pixels than Pillow opens" if large else "is a truncated or corrupt image"
        mend = f"{'make it smaller' if large else 'replace or remove it'}, or set data.on_error to skip"
        raise UnreadableImageError(name, problem if data else "is empty", mend) from None
    if image.mode.startswith(("I", "F")):
        problem = f"has more than 8 bits a channel (PIL mode {image.mode})"
        raise DataError(name, problem, "convert it to 8 bits")
    if image.mode == "RGB":
        return image
    if color == "strict":
        mend = "convert the file to RGB, or set data.preprocess.color to convert"
        raise DataError(name, f"is not a 3-channel RGB image (PIL mode {image.mode})", mend)
    try:
        return image.convert("RGB")
    except ValueError:
        raise DataError(name, f"cannot become RGB (PIL mode {image.mode})", "convert the file to RGB") from None


@contextmanager
def within_memory(name: str) -> Iterator[None]:
    """Name the image if memory does not suffice for it.

    Raises:
        UnreadableImageError: memory cannot be had.
    """
    try:
        yield
        return
    except MemoryError:
        pass
    except RuntimeError as error:  # of PyTorch
        if "allocate memory" not in str(error):
            raise
    mend = "make it smaller, or set data.on_error to skip"
    raise UnreadableImageError(name, "does not fit into the memory that is free", mend)


def resize(image: Image.Image, size: Size, interpolation: str) -> Image.Image:
    """Resize to (height, width), or the shorter side to `size` keeping the aspect.

    The longer side becomes int(size * longer / shorter). An image that has the size already is returned as it is.
    """
    new = resized_size(image, size)
    return image if new == image.size else image.resize(new, _FILTERS[interpolation])


def resized_size(image: Image.Image, size: Size) -> tuple[int, int]:
    """The (width, height) that `resize` gives an image."""
    width, height = image.size
    if not isinstance(size, int):
        return size[1], size[0]
    other = int(size * max(width, height) / min(width, height))
    return (size, other) if width <= height else (other, size)


def center_crop(image: Image.Image, size: Size, name: str) -> Image.Image:
    """The central (height, width) of an image, or a central square of side `size`.

    Offsets are int(round((H - h) / 2)), with Python's rounding of halves to even.

    Raises:
        DataError: the crop is larger than the image.
    """
    return image.crop(_central(image.size, size, name))


def _central(whole: tuple[int, int], size: Size, name: str) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of the central crop of an image of (width, height)."""
    height, width = (size, size) if isinstance(size, int) else size
    if height > whole[1] or width > whole[0]:
        sizes = f"the crop of {height} x {width} is larger than the image of {whole[1]} x {whole[0]}"
        raise DataError(name, sizes, "set data.preprocess.resize to at least the crop, or a smaller crop")
    top, left = round((whole[1] - height) / 2.0), round((whole[0] - width) / 2.0)
    return left, top, left + width, top + height


def resized_crop(image: Image.Image, size: Size, crop: Size, interpolation: str, name: str) -> Image.Image:
    """The central crop of a resized image, without the pixels around it: 1 x 30,000 pixels become 256 x 7,680,000 else.

    Nearest neighbours are the same; of the other filters a few pixels of a thousand differ by one, seldom two, since
    Pillow takes the place of a part in single precision.

    Raises:
        DataError: the crop is larger than the resized image.
    """
    whole = resized_size(image, size)
    left, top, right, bottom = _central(whole, crop, name)
    if interpolation == "nearest":
        rows, columns = _nearest(image.height, whole[1])[top:bottom], _nearest(image.width, whole[0])[left:right]
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        return Image.fromarray(np.asarray(image.crop(box))[rows - box[1]][:, columns - box[0]])
    x, across = _source(image.width, whole[0], left, right, _REACH[interpolation])
    y, down = _source(image.height, whole[1], top, bottom, _REACH[interpolation])
    part = image.crop((x[0], y[0], x[1], y[1]))
    return part.resize((right - left, bottom - top), _FILTERS[interpolation], (across[0], down[0], across[1], down[1]))


def _nearest(old: int, new: int) -> npt.NDArray[np.int32]:
    """Which of `old` pixels in a row Pillow takes for each of `new`."""
    row = Image.fromarray(np.arange(old, dtype=np.int32)[None])
    return np.asarray(row.resize((new, 1), Image.Resampling.NEAREST))[0]


def _source(old: int, new: int, first: int, last: int, reach: int) -> tuple[tuple[int, int], tuple[float, float]]:
    """Of `old` pixels in a row those that pixels first … last - 1 of `new` need, and where in them these lie."""
    scale = old / new
    low, high, margin = first * scale, last * scale, math.ceil(reach * max(scale, 1)) + 1
    start, stop = max(0, math.floor(low) - margin), min(old, math.ceil(high) + margin)
    return (start, stop), (low - start, min(high - start, stop - start))


def normalize(pixels: npt.NDArray[np.uint8], settings: Preprocess) -> Tensor:
    """Scale bytes of shape (C, H, W) to [0, 1] and apply (x - mean) / std: float32, the same shape, contiguous."""
    # Transposed as bytes, not as floats: a third of the time, and later copies are straight.
    values = torch.from_numpy(pixels.astype(np.uint8, order="C")).float().div_(255)
    mean = torch.tensor(settings.mean, dtype=torch.float32)[:, None, None]
    std = torch.tensor(settings.std, dtype=torch.float32)[:, None, None]
    return values.sub_(mean).div_(std)


def preprocess(image: Image.Image, settings: Preprocess, name: str) -> Tensor:
    """All steps after decoding.

    Args:
        image: mode RGB, or L for grey images.
        settings: the recipe's `data.preprocess`.
        name: names the image in errors.

    Returns:
        float32, shape (3, H, W), or (1, H, W) for grey images.

    Raises:
        DataError: the crop is larger than the resized image.
        UnreadableImageError: resizing would give more pixels than MOST_PIXELS, and there is no crop.

    Example:
        >>> settings = Preprocess(resize=256, crop=224)
        >>> preprocess(Image.new("RGB", (640, 480)), settings, "black").shape
        torch.Size([3, 224, 224])
    """
    if settings.resize is not None:
        width, height = resized_size(image, settings.resize)
        if settings.crop is not None and width * height > LARGE:
            image = resized_crop(image, settings.resize, settings.crop, settings.interpolation, name)
            return to_tensor(image, settings)
        if width * height > MOST_PIXELS:
            problem = (
                f"has {image.height} x {image.width} pixels, which data.preprocess.resize makes {height} x {width}"
            )
            raise UnreadableImageError(name, problem, "set data.preprocess.crop, or data.on_error to skip")
        image = resize(image, settings.resize, settings.interpolation)
    if settings.crop is not None:
        image = center_crop(image, settings.crop, name)
    return to_tensor(image, settings)


def to_tensor(image: Image.Image, settings: Preprocess) -> Tensor:
    """The last steps alone: an image of mode RGB or L, scaled to [0, 1] and normalized, float32 (C, H, W)."""
    pixels = np.asarray(image, dtype=np.uint8)
    return normalize(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), settings)


def preprocess_pixels(pixels: npt.NDArray[np.uint8], settings: Preprocess, name: str) -> Tensor:
    """`preprocess` for bytes of shape (C, H, W), C = 1 or 3, without the way through PIL where no step needs it."""
    if settings.resize is None and settings.crop is None:
        return normalize(pixels, settings)
    return preprocess(to_image(pixels), settings, name)


def to_image(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """Bytes of shape (C, H, W), C = 1 or 3, as an image of mode L or RGB."""
    whole = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(whole))
