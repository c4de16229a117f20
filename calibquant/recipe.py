"""The recipe: everything a run depends on, as pydantic models of one YAML file. Every default is in this file.

    recipe = load_recipe("recipe.yaml", ["quant.weights.bits=2", "seed=7"])

A recipe may begin with `preset: NAME`; the file's own fields and then the overrides win over the preset's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from calibquant.errors import RecipeError, nearest

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
Pixels = Annotated[int, Field(ge=1)]
REGULARIZER = 0.01  # weight of the rounding regularizer for networks of which no other is published
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
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

    name: str | None = Field(default=None, description="a network of the zoo, e.g. cifar_resnet20")
    options: dict[str, Any] = Field(default={}, description="arguments of the zoo's builder, e.g. {padding: tf_same}")
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


class DataRecipe(Section):
    """Where images come from. `calibration` and `evaluation` name the two sets inside `root`."""

    kind: Literal["cifar10", "digits", "folder", "csv"] | None = None
    root: Path | None = Field(default=None, description="folder of the data set; digits needs none")
    calibration: str | None = Field(
        default=None, description="cifar10, digits: a split (train); folder: a subfolder (train); csv: a file"
    )
    evaluation: str | None = Field(default=None, description="the same for evaluation (test, val, a file)")
    preprocess: Preprocess = Preprocess()
    calibration_preprocess: Preprocess | None = Field(
        default=None, description="of the calibration images, where it differs from `preprocess`"
    )
    on_error: Literal["fail", "skip"] = Field(default="fail", description="what an unreadable image does")


class CalibrationRecipe(Section):
    """How many images calibrate, which, and how they pass through the float network."""

    count: int = Field(default=1024, ge=1, description="calibration images")
    range_count: int | None = Field(
        default=None, ge=1, description="of these, how many set the activation ranges; none means all"
    )
    order: Literal["random", "first"] = Field(default="random", description="a seeded draw, or the first `count`")
    batch_size: int = Field(default=64, ge=1, description="images in one forward pass while observing")


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


def _conflict(field: str, problem: str, mend: str) -> PydanticCustomError:
    """What is wrong with two fields together; becomes a RecipeError at `field`."""
    return PydanticCustomError("conflict", "{problem}; {mend}", {"field": field, "problem": problem, "mend": mend})


def _joined(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _joined(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
    skip_first: bool = Field(default=False, description="leave the network's first unit at nearest rounding")
    never_worse: bool = Field(default=True, description="keep a unit's result only if it helps on images held out")
    cache: Literal["float32", "bfloat16"] = Field(default="float32", description="how features between units are kept")
    cache_limit: float = Field(
        default=4.0, ge=0, description="gigabytes of features in memory; beyond it they are mapped from disk"
    )


class EvaluationRecipe(Section):
    """How the float and the quantized network are measured."""

    count: int | None = Field(default=None, ge=1, description="evaluate only the first `count` images")
    batch_size: int = Field(default=250, ge=1)


class ExportRecipe(Section):
    """The ONNX files that a run leaves."""

    onnx: bool = Field(default=True, description="write float.onnx, fake_quant.onnx and, where possible, deploy.onnx")
    storage: Literal["packed", "int8"] = Field(
        default="packed", description="of low-bit weights in deploy.onnx; int8 for ONNX Runtime before 1.24"
    )
    images: int = Field(default=16, ge=1, description="calibration images on which the files are compared")


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
    seed: int = Field(default=1005, ge=0)
    threads: int | None = Field(default=None, ge=1, description="CPU threads; none leaves torch's default")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N or mps")
    runs: Path = Field(default=Path("runs"), description="folder that receives the run folder")

    @model_validator(mode="after")
    def _learnable(self) -> Recipe:
        if self.quant.activations.granularity == "per_channel" and self.reconstruct.method in ("brecq", "qdrop"):
            problem = f"{self.reconstruct.method} learns one scale for an activation"
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


# QDrop's released code, which CaPTQ's follows; see docs/methods.md, "Presets".
_QDROP_CODE: dict[str, Any] = {
    "calibration": {"count": 1024, "range_count": 256, "batch_size": 256, "order": "first"},
    "quant": {
        "placement": "academic",
        "boundary": "qdrop",
        "weights": {"symmetric": False, "granularity": "per_channel", "observer": "mse"},
        "activations": {"symmetric": False, "observer": "mse-batch"},
    },
    "reconstruct": {"method": "qdrop", "iterations": 20_000, "sampling": "with_replacement", "never_worse": False},
}
# BRECQ's released code.
_BRECQ_CODE: dict[str, Any] = {
    "calibration": {"count": 1024, "range_count": 64, "batch_size": 64, "order": "first"},
    "quant": {
        "placement": "academic",
        "boundary": "brecq",
        "weights": {"symmetric": False, "granularity": "per_channel", "observer": "mse-shrink"},
        "activations": {"symmetric": False, "observer": "mse-shrink"},
    },
    "reconstruct": {
        "method": "brecq",
        "iterations": 20_000,
        "sampling": "within_batch",
        "scale_iterations": 5_000,
        "scale_lr": 4e-4,
        "scale_inputs": "float",
        "skip_first": True,
        "never_worse": False,
    },
}


def _analytic(*parts: dict[str, Any]) -> dict[str, Any]:
    """A preset without reconstruction whose `quant` has the fields of all parts; the later win."""
    return {"quant": reduce(_merge, parts), "reconstruct": {"method": "none"}}


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# The parts of Banner et al.'s method, each alone on top of min-max ranges, and all together.
_MINMAX: dict[str, Any] = {"weights": {"observer": "minmax"}, "activations": {"observer": "minmax"}}
_CLIPPING = {"activations": {"observer": "aciq-laplace"}}
_ALLOCATION = {
    "weights": {"allocation": "banner"},
    "activations": {"granularity": "per_channel", "allocation": "banner"},
}
_CORRECTION = {"weights": {"correction": "mean-variance"}}

# Presets of a method set what makes the method; those named *-reference follow its released code in everything.
PRESETS: dict[str, dict[str, Any]] = {
    "nearest": {"reconstruct": {"method": "none"}},
    "gram": {"quant": {"weights": {"rounding": "gram"}}, "reconstruct": {"method": "none"}},
    "banner-base": _analytic(_MINMAX),
    "banner-clipping": _analytic(_MINMAX, _CLIPPING),
    "banner-allocation": _analytic(_MINMAX, _ALLOCATION),
    "banner-correction": _analytic(_MINMAX, _CORRECTION),
    "banner-all": _analytic(_MINMAX, _CLIPPING, _ALLOCATION, _CORRECTION),
    # What CalibQuant does without a gradient, deployable as integers.
    "analytic": _analytic(
        {"weights": {"observer": "mse"}, "activations": {"observer": "mse"}},
        {"equalize": True, "bias_correction": "empirical"},
    ),
    "adaround": {"reconstruct": {"method": "adaround"}},
    "brecq": {"reconstruct": {"method": "brecq", "scale_lr": 4e-4}},
    "qdrop": {"reconstruct": {"method": "qdrop"}},
    "captq": {"quant": {"boundary": "captq"}, "reconstruct": {"method": "qdrop"}},
    "adaround-reference": {**_BRECQ_CODE, "reconstruct": {**_BRECQ_CODE["reconstruct"], "method": "adaround"}},
    "brecq-reference": _BRECQ_CODE,
    "qdrop-reference": _QDROP_CODE,
    "captq-reference": {**_QDROP_CODE, "quant": {**_QDROP_CODE["quant"], "boundary": "captq"}},
    # What most 8-bit toolkits do: symmetric per-channel weights, min-max activations, everything integer.
    "int8": {
        "quant": {
            "placement": "integer",
            "boundary": "none",
            "weights": {"bits": 8, "symmetric": True, "observer": "minmax"},
            "activations": {"bits": 8, "observer": "minmax"},
        },
    },
}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply dotted overrides.

    Args:
        path: YAML file. Relative paths inside it are taken from the working directory.
        overrides: strings such as "quant.weights.bits=2"; the value is read as YAML.

    Raises:
        RecipeError: the file is missing, no valid YAML, or a field is unknown or invalid.

    Example:
        >>> recipe = load_recipe("configs/demo.yaml", ["quant.weights.bits=2"])  # doctest: +SKIP
        >>> recipe.quant.weights.bits  # doctest: +SKIP
        2
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(path, f"cannot be read ({reason})", "give the path of a recipe file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}", "is not valid YAML", "correct the indentation or quoting there") from None
    if not isinstance(tree, dict):
        raise RecipeError(path, "is not a recipe", "it must hold fields such as model: and data:")
    return make_recipe(tree, overrides, source=str(path))


def make_recipe(tree: dict[str, Any], overrides: list[str] | None = None, source: str = "recipe") -> Recipe:
    """A recipe from a nested dictionary, its preset and dotted overrides; `source` names it in errors.

    Raises:
        RecipeError: a field is unknown or invalid.
    """
    for override in overrides or []:
        tree = _override(tree, override)
    preset = tree.get("preset")
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise RecipeError(f"{source}, preset", f"'{preset}' is unknown", nearest(str(preset), PRESETS))
        tree = _merge(PRESETS[preset], tree)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _first_problem(error, source) from None


def _override(tree: dict[str, Any], text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"override '{text}'", "is not key=value", "write for example quant.weights.bits=2")
    try:
        leaf: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise RecipeError(f"override '{text}'", "its value is not valid YAML", "quote the value") from None
    for part in reversed(key.strip().split(".")):
        leaf = {part: leaf}
    return _merge(tree, leaf)


def _first_problem(error: ValidationError, source: str) -> RecipeError:
    """One line for the first problem; unknown keys first, since they often cause the others, then the deepest."""
    problem = min(error.errors(), key=lambda p: (p["type"] != "extra_forbidden", -len(p["loc"])))
    if problem["type"] == "conflict":
        context = problem["ctx"]
        return RecipeError(f"{source}, {context['field']}", context["problem"], context["mend"])
    path, section = _field(problem["loc"])
    where = f"{source}, {'.'.join(path)}" if path else source
    if problem["type"] == "extra_forbidden":
        return RecipeError(where, "this key is unknown", nearest(path[-1], section.model_fields))
    if problem["type"] == "missing":
        return RecipeError(where, "this field is required", "add it to the recipe")
    got = repr(problem["input"])
    if problem["type"] == "model_type":
        return RecipeError(where, f"holds {got[:60]} in place of fields", "give fields, or leave the key out")
    text = problem["msg"].removeprefix("Value error, ")
    return RecipeError(where, f"{text[0].lower()}{text[1:]}", f"got {got[:60]}")


def _field(location: tuple[int | str, ...]) -> tuple[list[str], type[Section]]:
    """The dotted path of a field and its section; what pydantic adds for the branches of a union is left out."""
    path: list[str] = []
    section: type[Section] = Recipe
    inner: type[Section] | None = Recipe
    for part in location:
        if inner is not None:
            section, inner = inner, _section(inner, str(part))
            path.append(str(part))
        elif isinstance(part, int):
            path.append(str(part))
    return path, section


def _section(outer: type[Section], name: str) -> type[Section] | None:
    """The section that a field holds, or None for a plain value or an unknown field."""
    annotation = outer.model_fields[name].annotation if name in outer.model_fields else None
    candidates = (annotation, *get_args(annotation))
    return next((a for a in candidates if isinstance(a, type) and issubclass(a, Section)), None)
