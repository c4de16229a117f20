"""The sections of a recipe as pydantic models. Every default stands here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, field_validator, model_validator
from pydantic_core import PydanticCustomError

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
Pixels = Annotated[int, Field(ge=1)]
REGULARIZER = 0.01  # weight of the rounding regularizer for networks of which no other is published
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, BeforeValidator(lambda value: _seconds(value)), Field(gt=0, allow_inf_nan=False)]
Observer = Literal[
    "minmax", "moving-average", "percentile", "mse", "mse-batch", "mse-shrink", "kl",
    "aciq", "aciq-laplace", "aciq-gauss", "ifmr", "hfmg",
]  # fmt: skip
Granularity = Literal["per_tensor", "per_channel"]
Allocation = Literal["none", "banner", "optimal"]
Placement = Literal["integer", "academic"]
Boundary = Literal["brecq", "qdrop", "captq", "none"]
Sampling = Literal["without_replacement", "with_replacement", "within_batch"]


class Section(BaseModel):
    """A part of the recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelRecipe(Section):
    """Which network, and its trained weights."""

    name: str | None = Field(
        default=None, description="a network of the zoo, e.g. cifar_resnet20; timm:NAME; torchvision:NAME; FILE.py:NAME"
    )
    options: dict[str, Any] = Field(default={}, description="arguments of its builder, e.g. {padding: tf_same}")
    weights: Path | None = Field(default=None, description="state_dict file; none keeps the random initialization")
    submodule: str | None = Field(default=None, description="dotted name of the part to quantize, e.g. backbone")


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
    mean: tuple[FiniteFloat, ...] = (0.485, 0.456, 0.406)
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
                raise _conflict(f"data.augment.{name}", problem, "give the smaller number first")
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
    workers: int = Field(default=0, ge=0, description="processes that decode; 0: threads of the run itself")


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


class WeightRecipe(Section):
    """The weights' grid and how its range is found."""

    bits: Bits = 4
    symmetric: bool = False
    granularity: Granularity = "per_channel"
    allocation: Allocation = Field(default="none", description="0 to 8 bits for each channel, `bits` on average")
    observer: Literal["minmax", "percentile", "mse", "mse-shrink", "arq"] = "mse"
    percentile: float = Field(default=99.99, gt=50, le=100, description="of the values kept, two-sided, in percent")
    correction: Literal["none", "mean", "mean-variance"] = Field(
        default="none", description="put back what rounding shifts of each output channel's weights"
    )
    rounding: Literal["nearest", "gram"] = Field(
        default="nearest", description="gram: in closed form, so that layers keep their output on calibration images"
    )


class ActivationRecipe(Section):
    """The activations' grid and how its range is found."""

    bits: Bits = 4
    symmetric: bool = False
    granularity: Granularity = Field(default="per_tensor", description="per_channel exists in simulation only")
    allocation: Allocation = Field(default="none", description="0 to 8 bits for each channel, `bits` on average")
    observer: Observer = "mse"
    percentile: float = Field(default=99.99, gt=50, le=100, description="of the values kept, two-sided, in percent")
    dynamic: bool = Field(default=False, description="min-max range of every batch at run time, nothing stored")


class MixedRecipe(Section):
    """Bits of single weights (and activations), chosen under a budget; give either `limit` or `max_drop`."""

    budget: Literal["average_bits", "weight_bytes", "bops"] = Field(
        default="average_bits",
        description="average_bits: of the weights to choose for, by size; weight_bytes: packed codes of all weights; "
        "bops: products * weight bits * activation bits of an image",
    )
    limit: Positive | None = Field(default=None, description="of the budget")
    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="takes the least budget whose agreement with the float network is at least 1 - this"
    )
    choices: Annotated[tuple[Bits, ...], Field(min_length=2)] = (2, 3, 4, 8)
    tensors: Literal["weights", "both"] = Field(default="weights", description="both: activations too; needs bops")
    sensitivity: Literal["logits", "interactions", "gradient", "loss", "fisher", "agreement"] = Field(
        default="logits",
        description="harm of quantizing single tensors: change of the logits, also with interactions; KL; another "
        "class; gradient and fisher estimate the first and the KL from one backward pass",
    )
    images: int = Field(default=64, ge=1, description="calibration images on which it is")

    @model_validator(mode="after")
    def _fits(self) -> MixedRecipe:
        if (self.limit is None) == (self.max_drop is None):
            raise ValueError("give limit or max_drop, one of the two")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("name each of the choices once")
        if self.tensors == "both" and (self.budget != "bops" or self.sensitivity in ("gradient", "fisher")):
            raise ValueError("tensors: both needs budget: bops, and a sensitivity other than gradient and fisher")
        return self


class QuantRecipe(Section):
    """What is quantized to what."""

    weights: WeightRecipe = WeightRecipe()
    activations: ActivationRecipe = ActivationRecipe()
    placement: Placement = "integer"
    boundary: Boundary = "qdrop"
    boundary_bits: Bits = Field(default=8, description="bits of what the boundary rule keeps wider")
    residual_bits: Bits = Field(default=8, description="bits of what only the integer placement quantizes")
    bits: dict[str, Bits] = Field(default={}, description="bits of single weights or activations, by tensor name")
    mixed: MixedRecipe | None = Field(default=None, description="choose bits of single tensors under a budget")
    equalize: bool = Field(default=False, description="equalize the weight ranges of neighbouring layers first")
    bias_correction: Literal["none", "analytic", "empirical"] = Field(
        default="none",
        description="put the mean of each layer's output back: analytic from BatchNorm statistics, empirical from the "
        "calibration images",
    )

    @field_validator("bits", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """Nested keys are joined: an override `quant.bits.layer1.0.weight=8` names the tensor layer1.0.weight."""
        return dict(_joined(value)) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _allocatable(self) -> QuantRecipe:
        for name, part in (("weights", self.weights), ("activations", self.activations)):
            where = f"quant.{name}.allocation"
            if part.allocation != "none" and part.granularity != "per_channel":
                raise _conflict(where, "shares bits among channels", f"set quant.{name}.granularity=per_channel")
            if part.allocation != "none" and part.bits > 8:
                raise _conflict(where, "gives a channel 8 bits at most", f"set quant.{name}.bits to 8 or fewer")
        own = self.activations
        if own.granularity == "per_channel" and own.dynamic:
            raise _conflict("quant.activations.dynamic", "takes one range for a tensor", "set granularity=per_tensor")
        if own.allocation != "none" and own.observer in ("mse-batch", "mse-shrink"):
            problem = f"{own.observer} searches each batch for one number of bits"
            raise _conflict("quant.activations.allocation", problem, "use the observer mse")
        return self


def _seconds(value: Any) -> Any:
    """90s, 20m and 1.5h as seconds; what is no such text stays for pydantic to judge."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([smh])\s*", value) if isinstance(value, str) else None
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else value


def _conflict(field: str, problem: str, mend: str) -> PydanticCustomError:
    """What is wrong with two fields together; becomes a RecipeError at `field`."""
    return PydanticCustomError("conflict", "{problem}; {mend}", {"field": field, "problem": problem, "mend": mend})


def _joined(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _joined(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class NetworkRecipe(Section):
    """How the whole network is learned at once, after its units."""

    iterations: int = Field(default=0, ge=0, description="optimization steps; 0: none")
    batch_size: int = Field(default=64, ge=1, description="images a step")
    rounding_lr: float = Field(default=3e-2, gt=0, description="Adam's learning rate of the rounding variables")
    weight_scale_lr: float = Field(default=1e-2, ge=0, description="of the weights' scales, relative to them")
    scale_lr: float = Field(default=1e-2, gt=0, description="of the activation scales, relative to them")
    bias_lr: float = Field(default=1e-2, ge=0, description="of the biases, in standard deviations of the output")
    rise: float = Field(default=0.1, ge=0, lt=1, description="share of the steps in which the rates rise")
    features: float = Field(
        default=1.0, ge=0, description="weight of the relative error of the units' outputs beside the logits' KL"
    )
    temperature: Positive = Field(default=2.0, description="by which logits are divided before the KL")
    augment: bool = Field(default=True, description="warp, recolor and patch the images at random, afresh in each step")


class ReconstructRecipe(Section):
    """How roundings and scales are learned, unit by unit; `method: none` keeps nearest rounding."""

    method: Literal["none", "adaround", "brecq", "qdrop"] = Field(
        default="none",
        description="adaround: roundings, by layers; brecq: roundings, then activation scales, by blocks; "
        "qdrop: both together, by blocks, with drop",
    )
    loss: Literal["mse", "fisher"] = Field(
        default="mse", description="of the roundings' features; fisher weights it by the gradient of the network's KL"
    )
    iterations: int = Field(default=2000, ge=1, description="optimization steps a unit")
    time: Seconds | None = Field(
        default=None, description="as many iterations as fit: seconds, or such as 90s, 20m, 1.5h"
    )
    batch_size: int = Field(default=32, ge=1, description="images a step")
    sampling: Sampling = Field(
        default="without_replacement",
        description="epochs over a permutation; with_replacement: independent draws; within_batch: a draw for each "
        "step that repeats no image in it",
    )
    rounding_lr: float = Field(default=1e-3, gt=0, description="Adam's learning rate of the rounding variables")
    regularizer: float | None = Field(
        default=None,
        ge=0,
        description="weight of the rounding regularizer, a sum over weights; none: the network's own",
    )
    warm_up: float = Field(default=0.2, ge=0, lt=1, description="share of the steps before the regularizer sets in")
    beta: tuple[float, float] = Field(default=(20.0, 2.0), description="the regularizer's exponent, from and to")
    scale_lr: float = Field(default=4e-5, gt=0, description="of the activation scales; falls to 0 by a cosine")
    relative_scales: bool = Field(default=False, description="scale_lr counts in shares of each scale")
    weight_scale_lr: float = Field(
        default=0.0, ge=0, description="of the weights' scales, relative to them (Genie); 0 keeps them"
    )
    bias_lr: float = Field(
        default=0.0, ge=0, description="of the biases, in standard deviations of the output; 0 keeps them"
    )
    zero_point_lr: float = Field(
        default=0.0, ge=0, description="of the activation zero points, in steps of the grid (LSQ+); 0 keeps them"
    )
    drop: float = Field(default=0.5, ge=0, lt=1, description="qdrop: share of values left unquantized while learning")
    scale_iterations: int | None = Field(
        default=None, ge=1, description="brecq: steps of its second phase; none: a quarter of `iterations`"
    )
    scale_power: float = Field(default=2.4, ge=1, description="brecq: exponent of the second phase's loss")
    scale_inputs: Literal["quantized", "float"] = Field(
        default="quantized", description="brecq: what enters a unit in the second phase"
    )
    network: NetworkRecipe = NetworkRecipe()
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32", description="of the ops while learning; auto: bfloat16 where the processor has it"
    )
    skip_first: bool = Field(default=False, description="leave the network's first unit at nearest rounding")
    never_worse: bool = Field(default=True, description="keep a unit's result only if it helps on images held out")
    cache: Literal["float32", "bfloat16"] = Field(default="float32", description="how features between units are kept")
    cache_limit: float = Field(
        default=4.0, ge=0, description="gigabytes of features in memory; beyond it they are mapped from disk"
    )


class EvaluationRecipe(Section):
    """How the float and the quantized network are measured."""

    count: int | None = Field(default=None, ge=1, description="evaluate only the first `count` images")
    batch_size: int | None = Field(
        default=None, ge=1, description="images in one forward pass; none: 250, of large images fewer"
    )


class ExportRecipe(Section):
    """The ONNX files that a run leaves."""

    onnx: bool = Field(default=True, description="write float.onnx, fake_quant.onnx and, where possible, deploy.onnx")
    storage: Literal["packed", "int8"] = Field(
        default="packed", description="of low-bit weights in deploy.onnx; int8 for ONNX Runtime before 1.24"
    )
    images: int = Field(default=16, ge=1, description="calibration images on which the files are compared")


class TrainRecipe(Section):
    """Float training of the network on the images `data.calibration`."""

    epochs: int = Field(default=200, ge=1, description="passes over the images")
    batch_size: int = Field(default=128, ge=2, description="images a step; a last smaller batch is left out")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = Field(default=0.1, description="the schedule's peak")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd: momentum; adamw: its first beta")
    nesterov: bool = Field(default=True, description="sgd: Nesterov's form of momentum")
    weight_decay: float = Field(
        default=5e-4,
        ge=0,
        allow_inf_nan=False,
        description="of convolutions and linear layers, not of norms and biases",
    )
    schedule: Literal["cosine", "one-cycle"] = Field(
        default="cosine",
        description="cosine: a linear rise, then down to 0; one-cycle: from 1/25 of lr up and down to 1/250,000, both "
        "by cosines",
    )
    warm_up: float | None = Field(
        default=None, ge=0, description="epochs of the rise; none: 5 % of all epochs, 30 % under one-cycle"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="alpha of the mixing share; 0 mixes not")
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of an average of the weights, which is kept then")
    clip: Positive | None = Field(default=None, description="largest norm of the gradient")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="of the layers while training")
    holdout: float = Field(
        default=0.0, ge=0, le=0.5, description="share of the training images that choose the best epoch; 0: the last"
    )
    evaluate_every: int = Field(default=1, ge=1, description="epochs between looks at the images held out")

    @model_validator(mode="after")
    def _fits(self) -> TrainRecipe:
        if self.warm_up is not None and self.warm_up >= self.epochs:
            raise _conflict("train.warm_up", f"{self.warm_up:g} epochs of {self.epochs}", "leave epochs for the fall")
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise _conflict("train.nesterov", "needs momentum", "set train.nesterov=false, or momentum above 0")
        return self


class Recipe(Section):
    """Everything a run depends on."""

    version: Literal[1] = 1
    preset: str | None = None
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()
    quant: QuantRecipe = QuantRecipe()
    reconstruct: ReconstructRecipe = ReconstructRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    export: ExportRecipe = ExportRecipe()
    train: TrainRecipe | None = Field(default=None, description="calibquant train needs it")
    seed: int = Field(default=1005, ge=0)
    threads: int | None = Field(default=None, ge=1, description="CPU threads; none leaves torch's default")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N or mps")
    runs: Path = Field(default=Path("runs"), description="folder that receives the run folder")

    @model_validator(mode="after")
    def _augmentable(self) -> Recipe:
        if self.calibration.augment and self.data.augment is None:
            problem = "changes images as data.augment says, which is not given"
            raise _conflict("calibration.augment", problem, "give data.augment, or set calibration.augment=false")
        return self

    @model_validator(mode="after")
    def _learnable(self) -> Recipe:
        settings = self.reconstruct
        whole = settings.method != "none" and settings.network.iterations
        if self.quant.activations.granularity == "per_channel" and (settings.method in ("brecq", "qdrop") or whole):
            what = settings.method if settings.method != "adaround" else "reconstruct.network"
            problem = f"{what} learns one scale for an activation"
            raise _conflict("reconstruct.method", problem, "use adaround, or quant.activations.granularity=per_tensor")
        return self

    @property
    def setting(self) -> str:
        """Bits in the field's short form, such as W4A4; WmixA8 where each weight has bits of its own."""
        mixed = self.quant.mixed
        weights = "mix" if mixed else self.quant.weights.bits
        return f"W{weights}A{'mix' if mixed and mixed.tensors == 'both' else self.quant.activations.bits}"

    def to_yaml(self) -> str:
        """The effective recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
