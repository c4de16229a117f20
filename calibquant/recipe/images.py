"""The recipe's sections of networks and images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from calibquant.errors import DataError, nearest
from calibquant.recipe.section import Positive, Section, conflict

MOST_WORKERS = 1024
STRATEGIES = (
    "random", "first", "class-balanced", "captq", "captq-variance", "captq-entropy", "captq-flatness", "rough", "hard",
    "easy", "k-center", "facility", "herding", "moments", "moments-weighted", "tail", "best-of-random",
)  # fmt: skip
Pixels = Annotated[int, Field(ge=1)]


class ModelRecipe(Section):
    """Which network, and its trained weights."""

    name: str | None = Field(
        default=None, description="a network of the zoo, e.g. cifar_resnet20; timm:NAME; torchvision:NAME; FILE.py:NAME"
    )
    options: dict[str, Any] = Field(default={}, description="arguments of its builder, e.g. {padding: tf_same}")
    weights: Path | None = Field(default=None, description="state_dict file; none keeps the random initialization")
    submodule: str | None = Field(default=None, description="dotted name of the part to quantize, e.g. backbone")
    # Of `name` and `options` those that a run folder's recipe gives, with its path; what the user gives is not there.
    _strangers: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def strangers(self) -> dict[str, str]:
        """Which of `name` and `options` a run folder gives, not the user, and the recipe there by its path."""
        return self._strangers

    def given_by(self, strangers: dict[str, str]) -> ModelRecipe:
        """The same section with other `strangers`."""
        own = self.model_copy()
        own._strangers = strangers
        return own


class Preprocess(Section):
    """From a decoded image to the network's input, in this order: resize, center crop, [0, 1], normalize."""

    resize: Pixels | tuple[Pixels, Pixels] | None = Field(default=None, description="shorter side, or (height, width)")
    crop: Pixels | tuple[Pixels, Pixels] | None = Field(
        default=None, description="center crop: side, or (height, width)"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    color: Literal["convert", "strict"] = Field(
        default="convert", description="grey and CMYK files: converted to RGB, or an error"
    )
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)


class AugmentRecipe(Section):
    """Random changes of training images, in this order; each is off unless it is asked for."""

    scale: tuple[Positive, Positive] | None = Field(
        default=None,
        description="random-resized crop: share of the image's area, least and most; to the size preprocess.crop, in "
        "place of resize and center crop",
    )
    ratio: tuple[Positive, Positive] = Field(default=(3 / 4, 4 / 3), description="width / height of that crop")
    pad: int = Field(default=0, ge=0, description="black pixels around the image, of which a random crop is taken")
    flip: bool = Field(default=False, description="half of the images are mirrored left to right")
    cutout: int = Field(default=0, ge=0, description="side of a square around a random pixel that is set to the mean")

    @model_validator(mode="after")
    def _ordered(self) -> AugmentRecipe:
        for name, pair, most in (("scale", self.scale or (1, 1), 1.0), ("ratio", self.ratio, float("inf"))):
            if not pair[0] <= pair[1] <= most:
                problem = f"[{pair[0]}, {pair[1]}] is no range" + (" of shares up to 1" if name == "scale" else "")
                raise conflict(f"data.augment.{name}", problem, "give the smaller number first")
        return self


class DataRecipe(Section):
    """Where images come from. `calibration` and `evaluation` name the two sets inside `root`."""

    kind: Literal["cifar10", "digits", "folder", "csv", "shards"] | None = None
    root: Path | None = Field(default=None, description="folder of the data set; digits needs none")
    calibration: str | None = Field(
        default=None,
        description="cifar10, digits: a split (train); folder: a subfolder (train); csv: a file; shards: tar files, "
        "e.g. train-{000..146}.tar",
    )
    evaluation: str | None = Field(default=None, description="the same for evaluation (test, val, a file)")
    classes: str | None = Field(
        default=None, description="file that names the network's classes in order; folder: also gives the labels"
    )
    preprocess: Preprocess = Preprocess()
    calibration_preprocess: Preprocess | None = Field(
        default=None, description="of the calibration images, where it differs from `preprocess`"
    )
    augment: AugmentRecipe | None = Field(
        default=None, description="random changes of the images that train; see also calibration.augment"
    )
    on_error: Literal["fail", "skip"] = Field(default="fail", description="what an unreadable image does")
    workers: int = Field(
        default=0, ge=0, le=MOST_WORKERS, description="processes that decode; 0: threads of the run itself"
    )


class CalibrationRecipe(Section):
    """Which images calibrate, and how they pass through the float network."""

    count: int = Field(default=1024, ge=1, description="calibration images")
    range_count: int | None = Field(
        default=None, ge=1, description="of these, how many set the activation ranges; none means all"
    )
    strategy: str = Field(
        default="random",
        description="which images: random, first, class-balanced, herding, … (calibquant select --help), or several "
        "with shares, e.g. herding=0.75,tail=0.25",
    )
    pool: int | None = Field(default=None, ge=2, description="choose among so many, drawn at random; none: among all")
    manifest: Path | None = Field(
        default=None, description="CSV of calibquant select or of a run: these images, hashes checked; count is unused"
    )
    batch_size: int = Field(default=64, ge=1, description="images in one forward pass while observing")
    augment: bool = Field(default=False, description="change each calibration image once, as data.augment says")

    @field_validator("strategy")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            parse_strategy(value)
        except DataError as error:
            raise conflict(error.where, error.problem, error.mend) from None
        return value


def parse_strategy(text: str) -> list[tuple[str, float]]:
    """Names of strategies and their shares: "herding=0.75,tail=0.25"; a name alone has the share 1.

    Raises:
        DataError: a name is unknown, or a share is no positive number.

    Example:
        >>> parse_strategy("herding=0.75,tail=0.25")
        [('herding', 0.75), ('tail', 0.25)]
    """
    parts = []
    for part in text.split(","):
        name, _, share = (piece.strip() for piece in part.partition("="))
        if name not in STRATEGIES:
            raise DataError("calibration.strategy", f"there is no strategy '{name}'", nearest(name, STRATEGIES))
        try:
            number = float(share or 1)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            problem = f"'{share}' is no share of {name}"
            raise DataError("calibration.strategy", problem, "write such as herding=0.75,tail=0.25")
        parts.append((name, number))
    return parts
