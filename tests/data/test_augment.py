"""Random changes of images: against loops over single pixels, and against the distributions that are promised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, kstest
from torch import Tensor

from calibquant.data import Augmented, ImageSet, TensorImages, batches, open_images
from calibquant.data.augment import augment, black_of, crop_box, epoch_draws
from calibquant.data.preprocess import preprocess, resize
from calibquant.errors import DataError
from calibquant.recipe import AugmentRecipe, DataRecipe, Preprocess

DARK = Preprocess(mean=(0.0,), std=(1.0,))
GREY = Preprocess(mean=(0.5,), std=(0.25,))
COLOR = Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), crop=16)


class Pictures(ImageSet):
    """Random pictures of the given (height, width), decoded but not in files."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        random = np.random.default_rng(5)
        self.pictures = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, i: int) -> Tensor:
        return preprocess(self.pictures[i], COLOR, self.name(i))

    def decoded(self, i: int) -> Image.Image:
        return self.pictures[i]

    def label(self, i: int) -> int:
        return i % 3

    def name(self, i: int) -> str:
        return f"picture {i}"

    def sha256(self, i: int) -> str:
        return f"{i:064d}"


def by_hand(image: Tensor, draws: Tensor, settings: AugmentRecipe, black: Tensor) -> Tensor:
    """One image, pixel by pixel; a draw d of 31 bits chooses floor(n d / 2³¹) among n."""
    channels, height, width = image.shape
    top, left, flip, row, column = (int(d) for d in draws)
    dy, dx = (int(d * (2 * settings.pad + 1) / 2**31) - settings.pad for d in (top, left))
    first_row = int(row * height / 2**31) - settings.cutout // 2
    first_column = int(column * width / 2**31) - settings.cutout // 2
    out = torch.empty_like(image)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                source_x = width - 1 - x if settings.flip and flip < 2**30 else x
                sy, sx = y + dy, source_x + dx
                inside = 0 <= sy < height and 0 <= sx < width
                value = float(image[c, sy, sx]) if inside else float(black[c])
                hole = 0 <= y - first_row < settings.cutout and 0 <= x - first_column < settings.cutout
                out[c, y, x] = 0.0 if hole else value
    return out


@pytest.mark.parametrize(
    "settings",
    [
        AugmentRecipe(),
        AugmentRecipe(pad=2),
        AugmentRecipe(flip=True),
        AugmentRecipe(cutout=3),
        AugmentRecipe(cutout=4),
        AugmentRecipe(pad=4, flip=True, cutout=5),
    ],
)
@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 8, 8)])
def test_a_batch_is_what_loops_over_its_pixels_give(settings: AugmentRecipe, shape: tuple[int, int, int]) -> None:
    images = torch.randn(12, *shape)
    draws, look = epoch_draws(12, seed=3, epoch=1), COLOR if shape[0] == 3 else GREY
    got, black = augment(images, draws, settings, look), preprocess_black(look)
    want = torch.stack([by_hand(image, row, settings, black) for image, row in zip(images, draws, strict=True)])
    assert torch.equal(got, want)


def preprocess_black(look: Preprocess) -> Tensor:
    """The first pixel of a black image after preprocessing."""
    return preprocess(Image.new("RGB" if len(look.mean) == 3 else "L", (16, 16)), look, "black")[:, 0, 0]


def test_black_is_what_preprocessing_makes_of_a_black_pixel() -> None:
    assert torch.equal(black_of(COLOR, 3), preprocess_black(COLOR))
    assert torch.equal(black_of(GREY, 1), preprocess_black(GREY))
    assert black_of(GREY, 1).tolist() == [-2.0]
    with pytest.raises(DataError, match=r"data\.preprocess\.mean: has length 3 but these are grey images"):
        black_of(COLOR, 1)


def test_offsets_flips_and_holes_are_spread_evenly() -> None:
    """An image of a ramp shows where each of 20,000 crops was taken, and whether it was mirrored."""
    n, pad, side = 20_000, 2, 8
    ramp = torch.arange(1.0, side * side + 1).view(1, 1, side, side).expand(n, -1, -1, -1)
    draws = epoch_draws(n, seed=1, epoch=0)
    cropped = augment(ramp, draws, AugmentRecipe(pad=pad), DARK)
    center = cropped[:, 0, side // 2, side // 2].long()
    places = torch.bincount(center, minlength=side * side + 1)
    assert (places > 0).sum() == (2 * pad + 1) ** 2
    assert chisquare(places[places > 0].numpy()).pvalue > 1e-3
    flipped = augment(ramp, draws, AugmentRecipe(flip=True), DARK)[:, 0, 0, 0] == side
    assert abs(int(flipped.sum()) - n / 2) < 4 * (n / 4) ** 0.5
    holes = (augment(ramp, draws, AugmentRecipe(cutout=1), DARK) == 0).sum(dim=(0, 1)).flatten()
    assert chisquare(holes.numpy()).pvalue > 1e-3
    dependent = torch.corrcoef(torch.stack([center.float(), flipped.float()]))[0, 1]
    assert abs(float(dependent)) < 4 / n**0.5


def test_random_boxes_have_uniform_areas_and_log_uniform_ratios() -> None:
    settings, random = AugmentRecipe(scale=(0.1, 0.4), ratio=(0.5, 2.0)), np.random.default_rng(2)
    boxes = np.array([crop_box(2000, 2000, settings, random) for _ in range(3000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / 4e6, np.log(width / height)
    assert kstest(area, "uniform", args=(0.1, 0.3)).pvalue > 1e-3
    assert kstest(ratio, "uniform", args=(np.log(0.5), np.log(4))).pvalue > 1e-3
    for first, room in ((boxes[:, 0], 2000 - width), (boxes[:, 1], 2000 - height)):
        assert kstest((first + 0.5) / (room + 1), "uniform").pvalue > 1e-3
    assert boxes.min() >= 0
    assert boxes.max() <= 2000


def test_where_no_box_fits_the_largest_allowed_one_is_taken_from_the_center() -> None:
    wide = AugmentRecipe(scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
    assert crop_box(400, 100, wide, np.random.default_rng(0)) == (133, 0, 266, 100)
    assert crop_box(100, 400, wide, np.random.default_rng(0)) == (0, 133, 100, 266)


def test_a_box_of_the_whole_image_is_a_resize() -> None:
    settings = AugmentRecipe(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    pictures = Pictures([(24, 24)] * 3)
    whole = Preprocess(resize=(16, 16), mean=COLOR.mean, std=COLOR.std)
    for i in range(3):
        image = Augmented(pictures, settings, COLOR, seed=1, epoch=0).image(i)
        assert torch.equal(image, preprocess(resize(pictures.decoded(i), 16, "bilinear"), whole, "x"))


@pytest.mark.parametrize("settings", [AugmentRecipe(pad=2, flip=True, cutout=3), AugmentRecipe(scale=(0.2, 1.0))])
def test_an_image_depends_on_seed_epoch_and_index_alone(settings: AugmentRecipe) -> None:
    pictures = Pictures([(20, 24), (30, 17), (16, 16), (40, 40), (20, 20), (25, 20)])
    first = Augmented(pictures, settings, COLOR, seed=7, epoch=2)
    forward = torch.cat([batch.images for batch in batches(first, 2)])
    backward = torch.cat([batch.images for batch in batches(first, 4, [5, 4, 3, 2, 1, 0])])
    assert torch.equal(forward, backward.flip(0))
    again = Augmented(pictures, settings, COLOR, seed=7, epoch=2)
    assert torch.equal(forward, torch.stack([again.image(i) for i in range(6)]))
    for seed, epoch in ((8, 2), (7, 3)):
        other = Augmented(pictures, settings, COLOR, seed=seed, epoch=epoch)
        assert not torch.equal(forward, torch.stack([other.image(i) for i in range(6)]))


def test_names_labels_and_hashes_stay() -> None:
    pictures = Pictures([(20, 24)] * 4)
    changed = Augmented(pictures, AugmentRecipe(flip=True), COLOR, seed=1, epoch=0)
    for i in range(4):
        assert changed.name(i) == pictures.name(i)
        assert changed.sha256(i) == pictures.sha256(i)
        assert changed.label(i) == pictures.label(i)


def test_the_batch_form_is_the_form_for_single_images() -> None:
    images = TensorImages(torch.randn(9, 3, 6, 6))
    settings = AugmentRecipe(pad=1, flip=True, cutout=2)
    single = Augmented(images, settings, COLOR, seed=4, epoch=5)
    whole = augment(torch.stack([images.image(i) for i in range(9)]), epoch_draws(9, 4, 5), settings, COLOR)
    assert torch.equal(torch.stack([single.image(i) for i in range(9)]), whole)


def test_random_resized_crops_need_a_size_and_pictures() -> None:
    settings = AugmentRecipe(scale=(0.5, 1.0))
    with pytest.raises(DataError, match=r"data\.augment\.scale: random-resized crops need their size; set data\.pre"):
        Augmented(Pictures([(20, 20)]), settings, Preprocess(), 0, 0)
    tensors = Augmented(TensorImages(torch.zeros(2, 3, 8, 8)), settings, COLOR, 0, 0)
    with pytest.raises(DataError, match=r"tensor#1: is preprocessed already, .*; leave data\.augment\.scale out"):
        tensors.image(1)


def test_processes_augment_as_threads_do(tmp_path: Path) -> None:
    """What is sent to a process is the augmented set, not the one beneath it."""
    for i in range(300):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:03d}.png")
    settings = Preprocess()
    results = []
    for workers in (0, 1):
        recipe = DataRecipe(kind="folder", root=tmp_path, evaluation=".", workers=workers, preprocess=settings)
        changed = Augmented(open_images(recipe, "evaluation"), AugmentRecipe(pad=2, flip=True), settings, 7, 0)
        results.append(torch.cat([batch.images for batch in batches(changed.subset(range(280)), 70)]))
    plain = torch.cat([batch.images for batch in batches(open_images(recipe, "evaluation"), 280)])[:280]
    assert torch.equal(*results)
    assert not torch.equal(results[0], plain)
