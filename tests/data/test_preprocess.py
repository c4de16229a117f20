"""Preprocessing against an independent computation, and every way an image can be refused."""

from __future__ import annotations

import io
import resource
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calibquant.data import batches, open_images
from calibquant.data.imageset import UnreadableImageError
from calibquant.data.preprocess import (
    center_crop,
    check_preprocess,
    decode,
    preprocess,
    preprocess_pixels,
    resize,
    resized_crop,
    to_tensor,
)
from calibquant.errors import DataError
from calibquant.recipe import DataRecipe, Preprocess

Save = Callable[..., Path]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Expected sizes are worked out by hand from torchvision's rule: the long side is int(size * long / short).
@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (480, 640, 256, (256, 341)),
        (640, 480, 256, (341, 256)),
        (333, 500, 256, (256, 384)),
        (300, 500, 256, (256, 426)),
        (100, 100, 32, (32, 32)),
        (7, 10, 5, (5, 7)),
        (10, 7, (4, 9), (4, 9)),
        (8, 8, 16, (16, 16)),
    ],
)
def test_resize_gives_torchvisions_size(
    height: int, width: int, size: int | tuple[int, int], expected: tuple[int, int]
) -> None:
    resized = resize(picture(height, width), size, "bilinear")
    assert (resized.height, resized.width) == expected


@pytest.mark.parametrize("size", [6, (6, 9)])
def test_resize_to_the_same_size_is_skipped(size: int | tuple[int, int]) -> None:
    image = picture(6, 9)
    assert resize(image, size, "bicubic") is image


def test_bilinear_enlarges_by_the_triangle_filter() -> None:
    # Doubling two columns 0 and 200: centres at 1/4 and 3/4 mix the neighbours 3:1, the borders repeat.
    image = Image.fromarray(np.array([[0, 200]], dtype=np.uint8))
    assert np.asarray(resize(image, (1, 4), "bilinear")).tolist() == [[0, 50, 150, 200]]


def test_bilinear_shrinks_with_antialiasing() -> None:
    # Halving spreads the triangle over four columns: weights 1, 3, 3, 1 of 8 (border columns 3, 3, 1 of 7).
    row = np.array([[0, 80, 160, 240]], dtype=np.uint8)
    expected = [(3 * 0 + 3 * 80 + 160) / 7, (80 + 3 * 160 + 3 * 240) / 7]
    got = np.asarray(resize(Image.fromarray(row), (1, 2), "bilinear"))[0]
    np.testing.assert_allclose(got, expected, atol=0.51)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_interpolation_is_the_named_pil_filter(interpolation: str) -> None:
    image = picture(9, 13)
    expected = image.resize((7, 5), getattr(Image.Resampling, interpolation.upper()))
    assert resize(image, (5, 7), interpolation).tobytes() == expected.tobytes()


# Offsets by hand: half of an odd difference rounds to even, (5 - 2) / 2 = 1.5 -> 2 and (7 - 2) / 2 = 2.5 -> 2.
@pytest.mark.parametrize(
    ("height", "width", "size", "top", "left"),
    [(5, 7, 2, 2, 2), (6, 9, (4, 4), 1, 2), (4, 4, 4, 0, 0), (5, 4, (2, 3), 2, 0), (256, 341, 224, 16, 58)],
)
def test_center_crop_takes_torchvisions_window(
    height: int, width: int, size: int | tuple[int, int], top: int, left: int
) -> None:
    image = picture(height, width)
    h, w = (size, size) if isinstance(size, int) else size
    expected = np.asarray(image)[top : top + h, left : left + w]
    np.testing.assert_array_equal(np.asarray(center_crop(image, size, "x")), expected)


@pytest.mark.parametrize("size", [7, (4, 20), (7, 2)])
def test_crop_larger_than_the_image_names_both_sizes(size: int | tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"cat\.jpg: the crop of \d+ x \d+ is larger than the image of 6 x 9; set data"):
        center_crop(picture(6, 9), size, "cat.jpg")


def test_whole_chain_equals_an_independent_computation() -> None:
    settings = Preprocess(resize=20, crop=(16, 12), interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    image = picture(30, 45)
    pixels = np.asarray(image.resize((30, 20), Image.Resampling.BICUBIC)).astype(np.float64)[2:18, 9:21]
    expected = ((pixels / 255 - settings.mean) / settings.std).transpose(2, 0, 1)
    got = preprocess(image, settings, "x")
    assert got.dtype == torch.float32
    assert got.shape == (3, 16, 12)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


def test_normalization_has_the_bits_of_torchvisions_arithmetic() -> None:
    settings = Preprocess()
    image = picture(5, 5)
    chw = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.as_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (settings.mean, settings.std))
    assert torch.equal(preprocess(image, settings, "x"), chw.clone().sub_(mean).div_(std))


def test_the_result_is_contiguous_and_its_source_may_be_read_only() -> None:
    pixels = np.zeros((3, 4, 5), dtype=np.uint8)
    pixels.flags.writeable = False  # as in a memory-mapped file
    got = preprocess_pixels(pixels, Preprocess(), "x")
    assert got.is_contiguous()
    assert preprocess(picture(6, 7), Preprocess(crop=4), "x").is_contiguous()


def test_grey_images_keep_one_channel() -> None:
    grey = Image.fromarray(np.array([[0, 255], [51, 102]], dtype=np.uint8))
    got = preprocess(grey, Preprocess(mean=(0.5,), std=(0.5,)), "x")
    torch.testing.assert_close(got, torch.tensor([[[-1.0, 1.0], [-0.6, -0.2]]]))


@pytest.mark.parametrize("settings", [Preprocess(), Preprocess(resize=32), Preprocess(crop=32)])
def test_fast_path_equals_the_way_through_pil(settings: Preprocess) -> None:
    image = picture(32, 32)
    pixels = np.asarray(image).transpose(2, 0, 1)
    assert torch.equal(preprocess_pixels(pixels, settings, "x"), preprocess(image, settings, "x"))


@pytest.mark.parametrize(
    ("name", "mode"),
    [("g.png", "L"), ("c.jpg", "CMYK"), ("p.png", "P"), ("a.png", "RGBA"), ("la.png", "LA"), ("b.png", "1")],
)
def test_other_colours_are_converted_or_refused(save_image: Save, name: str, mode: str) -> None:
    path = save_image(name, mode=mode)
    with Image.open(path) as image:
        assert image.mode == mode
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(path.read_bytes(), "convert", name)), expected)
    with pytest.raises(DataError, match=rf"{name}: is not a 3-channel RGB image \(PIL mode {mode}\); .*data.preproc"):
        decode(path.read_bytes(), "strict", name)


def test_cmyk_conversion_is_the_plain_formula(tmp_path: Path) -> None:
    path = tmp_path / "c.tif"
    Image.new("CMYK", (2, 2), (255, 0, 100, 0)).save(path)
    assert np.asarray(decode(path.read_bytes(), "convert", "c"))[0, 0].tolist() == [0, 255, 155]


def encoded(array: np.ndarray, form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, form)
    return file.getvalue()


# Pillow opens a grey PNG of 16 bits in mode I up to version 10 and in I;16 later.
@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (encoded(np.full((4, 4), 300, np.uint16), "png"), "I(;16)?"),
        (encoded(np.full((4, 4), 300, np.uint16), "tiff"), "I;16"),
        (encoded(np.full((4, 4), 300, np.int32), "tiff"), "I"),
        (encoded(np.full((4, 4), 300, np.float32), "tiff"), "F"),
        (b"P5 4 4 65535\n" + bytes(32), "I"),
    ],
)
@pytest.mark.parametrize("color", ["convert", "strict"])
def test_more_than_8_bits_are_refused(data: bytes, mode: str, color: str) -> None:
    with pytest.raises(DataError, match=rf"more than 8 bits a channel \(PIL mode {mode}\); convert it to 8 bits"):
        decode(data, color, "x")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"not an image at all", "is a truncated or corrupt image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is a truncated or corrupt image"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "is a truncated or corrupt image"),
    ],
)
def test_unreadable_images_are_named(content: bytes, problem: str) -> None:
    with pytest.raises(UnreadableImageError, match=f"bad.png: {problem}; .*data.on_error to skip"):
        decode(content, "convert", "bad.png")


@pytest.mark.parametrize("name", ["t.jpg", "t.png", "t.webp", "t.bmp"])
def test_truncated_files_are_refused(save_image: Save, name: str) -> None:
    path = save_image(name, 64, 64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImageError, match=f"{name}: is a truncated or corrupt image"):
        decode(path.read_bytes(), "convert", str(path))


@pytest.mark.parametrize(
    ("fields", "channels", "message"),
    [
        (
            {"mean": (0.5, 0.5, 0.5), "std": (1.0,)},
            1,
            r"data.preprocess.mean: has length 3 .* 1 channel; .*mean: \[0.5\]",
        ),
        ({"mean": (0.5,), "std": (1.0, 1.0, 1.0)}, 1, "data.preprocess.std: has length 3"),
        ({"mean": (0.5,)}, 3, r"data.preprocess.mean: has length 1 .* 3 channels; .*\[0.5, 0.5, 0.5\]"),
    ],
)
def test_settings_that_do_not_fit_name_their_field(fields: dict[str, object], channels: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_preprocess(Preprocess.model_validate(fields), channels)


def reference(image: Image.Image, settings: Preprocess) -> Image.Image:
    """Resize and crop one after the other, all pixels computed."""
    assert settings.resize is not None
    assert settings.crop is not None
    return center_crop(resize(image, settings.resize, settings.interpolation), settings.crop, "x")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("height", "width", "size", "crop"),
    [
        (1, 700, 64, 56),
        (700, 1, 64, 56),
        (3, 1000, 48, (40, 30)),
        (2, 331, 37, 37),
        (900, 40, 17, 9),
        (50, 60, (400, 30), (399, 29)),
        (211, 5, (33, 500), (7, 500)),
    ],
)
def test_the_crop_of_a_large_image_is_computed_without_the_rest(
    height: int, width: int, size: Any, crop: Any, interpolation: Any
) -> None:
    settings = Preprocess(resize=size, crop=crop, interpolation=interpolation)
    image = picture(height, width, seed=height)
    got, want = resized_crop(image, size, crop, interpolation, "x"), reference(image, settings)
    difference = np.abs(np.asarray(got).astype(int) - np.asarray(want))
    assert difference.max() <= {"nearest": 0, "bilinear": 1, "bicubic": 2, "lanczos": 2}[interpolation]
    assert (difference > 0).mean() <= 0.01


@pytest.mark.parametrize(("height", "width"), [(1, 30_000), (30_000, 1)])
def test_long_images_take_little_memory(height: int, width: int) -> None:
    image = Image.fromarray(np.arange(3 * 30_000, dtype=np.uint32).astype(np.uint8).reshape(height, width, 3))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))  # all pixels would take 7.5 GB
    try:
        got = preprocess(image, Preprocess(resize=256, crop=224), "x")
        with pytest.raises(UnreadableImageError, match=r"x: has \d+ x \d+ pixels, which data.preprocess.resize makes"):
            preprocess(image, Preprocess(resize=256), "x")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    # The crop spans 0.875 pixels around the middle; three neighbours to either side give the same pixels.
    near = np.asarray(image).reshape(-1, 3)[14_997:15_003]
    around = Image.fromarray(near[None] if height == 1 else near[:, None])
    torch.testing.assert_close(got, preprocess(around, Preprocess(resize=256, crop=224), "x"), atol=0, rtol=0)


def test_ordinary_images_are_resized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Preprocess(resize=256, crop=224)
    monkeypatch.setattr("calibquant.data.preprocess.resized_crop", None)  # an error if it were called
    assert torch.equal(
        preprocess(picture(60, 900), settings, "x"), to_tensor(reference(picture(60, 900), settings), settings)
    )


def test_the_crop_must_fit_into_large_images_too() -> None:
    with pytest.raises(DataError, match=r"x: the crop of 300 x 300 is larger than the image of 256 x 7680000"):
        preprocess(picture(1, 30_000), Preprocess(resize=256, crop=300), "x")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_lack_of_memory_obeys_on_error(
    tmp_path: Path, save_image: Save, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for name in ("a.png", "b.png"):
        save_image(f"val/{name}", height=9 if name == "a.png" else 6)

    def scarce(image: Image.Image, *_: object) -> torch.Tensor:
        if image.height == 9:
            raise error
        return torch.zeros(3, 6, 8)

    monkeypatch.setattr("calibquant.data.preprocess.to_tensor", scarce)
    recipe = DataRecipe(kind="folder", root=tmp_path)
    with pytest.raises(UnreadableImageError, match=r"val/a.png: does not fit into the memory that is free; make it"):
        list(batches(open_images(recipe, "evaluation"), 2))
    images = open_images(recipe.model_copy(update={"on_error": "skip"}), "evaluation")
    assert [batch.indices for batch in batches(images, 2)] == [(1,)]
    assert images.skipped == {"val/a.png"}


def declaring(png: bytes, side: int) -> bytes:
    """A PNG whose header says another size."""
    data = bytearray(png)
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_decompression_bombs_obey_on_error(tmp_path: Path, save_image: Save) -> None:
    save_image("val/b.png")
    for name in ("val/a.png", "val/c.png"):
        (tmp_path / name).write_bytes(declaring((tmp_path / "val/b.png").read_bytes(), 20_000))
    recipe = DataRecipe(kind="folder", root=tmp_path)
    with pytest.raises(
        UnreadableImageError, match=r"val/a.png: has more pixels than Pillow opens; make it smaller, or"
    ):
        list(batches(open_images(recipe, "evaluation"), 2))
    images = open_images(recipe.model_copy(update={"on_error": "skip"}), "evaluation")
    assert [batch.indices for batch in batches(images, 4)] == [(1,)]
    assert images.skipped == {"val/a.png", "val/c.png"}


def test_a_bomb_is_named_where_warnings_are_errors(save_image: Save) -> None:
    data = declaring(save_image("b.png").read_bytes(), 10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImageError, match=r"b.png: has more pixels than Pillow opens"):
            decode(data, "convert", "b.png")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.eps"
    picture(4, 4).save(path)
    with pytest.raises(UnreadableImageError, match=r"a.jpg: is a PostScript file; convert it to PNG, or set"):
        decode(path.read_bytes(), "convert", "a.jpg")
