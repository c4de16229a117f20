"""The recipe's section of what is quantized to what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from calibquant.recipe.section import Positive, Section, conflict

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
GridKind = Literal["uniform", "power-of-two", "apot", "codebook", "nuq", "ternary", "binary"]
ActivationGridKind = Literal["uniform", "power-of-two", "apot", "codebook"]
_ACTIVATION_RANGES = {"power-of-two": (2, 3), "apot": (2, 5), "codebook": (2, 7)}  # of bits
_RANGES = {  # of bits
    "power-of-two": (2, 4), "apot": (2, 6), "codebook": (1, 7), "nuq": (8, 8), "ternary": (2, 2), "binary": (1, 7),
}  # fmt: skip
Observer = Literal[
    "minmax", "moving-average", "percentile", "mse", "mse-batch", "mse-shrink", "kl",
    "aciq", "aciq-laplace", "aciq-gauss", "ifmr", "hfmg",
]  # fmt: skip
Granularity = Literal["per_tensor", "per_channel"]
Allocation = Literal["none", "banner", "optimal"]
Placement = Literal["integer", "academic"]
Boundary = Literal["brecq", "qdrop", "captq", "none"]


def has_bits(grid: GridKind, bits: int) -> bool:
    """Whether there is a grid of that kind with so many bits.

    Example:
        >>> [has_bits("apot", 4), has_bits("apot", 8), has_bits("uniform", 1)]
        [True, False, False]
    """
    least, most = _RANGES.get(grid, (2, 16))
    return least <= bits <= most


class WeightRecipe(Section):
    """The weights' grid and how its range is found."""

    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16] = Field(default=4, description="1 with the grids codebook and binary")
    grid: GridKind = Field(
        default="uniform",
        description="codebook: levels that fit the weight best; nuq: few of the levels of 8 bits; binary: 2^bits odd "
        "numbers, ±1 for one bit; the boundary's and named weights stay uniform",
    )
    levels: int | None = Field(
        default=None, ge=2, le=128, description="codebook: how many, none: 2^bits; nuq: how many of 256, none: 32"
    )
    codebook: Literal["per_tensor", "per_channel"] = Field(default="per_tensor", description="what shares levels")
    clustering: Literal["plain", "second-order"] = Field(
        default="plain",
        description="codebook and nuq: levels for the least error of the weights, or of what layers make of the "
        "calibration images with them, to second order",
    )
    reach: Literal["auto", "full"] = Field(
        default="auto",
        description="auto: the deployed network is exact on every processor, so 8-bit weights get 7 bits where kernels "
        "of x86 without VNNI would saturate; full: 8 bits everywhere, exact on x86 with VNNI and on Arm only",
    )
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

    @property
    def code_bits(self) -> int:
        """Bits in which a code is stored; of learned levels as many as their number takes, whatever `bits` says.

        Example:
            >>> WeightRecipe(grid="codebook", bits=2, levels=128).code_bits, WeightRecipe(grid="nuq", bits=8).code_bits
            (7, 5)
        """
        return max(1, (self.level_count - 1).bit_length()) if self.grid in ("codebook", "nuq") else self.bits

    @property
    def level_count(self) -> int:
        """Levels of a grid that is not uniform."""
        if self.levels is not None:
            return self.levels
        fixed = {"nuq": 32, "ternary": 3, "binary": 2**self.bits, "codebook": 2**self.bits}
        return fixed.get(self.grid, 2**self.bits - 1)

    @model_validator(mode="after")
    def _grid_fits(self) -> WeightRecipe:
        where = "quant.weights"
        if self.clustering != "plain" and self.grid not in ("codebook", "nuq"):
            raise conflict(f"{where}.clustering", f"{self.grid} finds no levels", "use the grid codebook or nuq")
        if self.grid == "uniform":
            if self.bits == 1:
                mend = "use the grid codebook or binary"
                raise conflict(f"{where}.bits", "a uniform grid of 1 bit holds no sign", mend)
            if self.levels is not None:
                raise conflict(f"{where}.levels", "a uniform grid has 2^bits levels", "use the grid codebook or nuq")
            return self
        if not has_bits(self.grid, self.bits):
            least, most = _RANGES[self.grid]
            span = f"{least}" if least == most else f"{least} to {most}"
            raise conflict(f"{where}.bits", f"{self.grid} has no grid of {self.bits} bits", f"use {span}")
        if self.levels is not None and self.grid not in ("codebook", "nuq"):
            raise conflict(f"{where}.levels", f"{self.grid} gives its levels itself", "leave levels out")
        if self.allocation != "none":
            raise conflict(f"{where}.allocation", f"shares bits of uniform grids, not of {self.grid}", "use none")
        if self.codebook == "per_channel" and self.granularity != "per_channel":
            mend = "set quant.weights.granularity=per_channel"
            raise conflict(f"{where}.codebook", "gives each channel its levels", mend)
        return self


class ActivationRecipe(Section):
    """The activations' grid and how its range is found."""

    bits: Bits = 4
    grid: ActivationGridKind = Field(
        default="uniform",
        description="codebook: levels that fit the values best; others as for weights; what the boundary rule, the "
        "integer placement or a name gives other bits stays uniform",
    )
    symmetric: bool = False
    granularity: Granularity = Field(default="per_tensor", description="per_channel exists in simulation only")
    allocation: Allocation = Field(default="none", description="0 to 8 bits for each channel, `bits` on average")
    observer: Observer = "mse"
    percentile: float = Field(default=99.99, gt=50, le=100, description="of the values kept, two-sided, in percent")
    dynamic: bool = Field(default=False, description="min-max range of every batch at run time, nothing stored")

    @model_validator(mode="after")
    def _grid_fits(self) -> ActivationRecipe:
        if self.grid == "uniform":
            return self
        where = "quant.activations"
        least, most = _ACTIVATION_RANGES[self.grid]
        if not least <= self.bits <= most:
            problem = f"{self.grid} has no grid of {self.bits} bits for activations"
            raise conflict(f"{where}.bits", problem, f"use {least} to {most}")
        fixed = {"symmetric": False, "granularity": "per_tensor", "observer": "mse", "dynamic": False}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                problem = f"does not go with the grid {self.grid}, whose levels are found on one histogram"
                raise conflict(f"{where}.{name}", problem, f"use {str(value).lower()}")
        return self


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
        if self.mixed is not None and self.weights.grid != "uniform":
            raise conflict("quant.mixed", f"chooses bits of uniform grids, not of {self.weights.grid}", "leave it out")
        if self.mixed is not None and self.mixed.tensors == "both" and self.activations.grid != "uniform":
            problem = f"chooses bits of uniform activations, not of {self.activations.grid}"
            raise conflict("quant.mixed.tensors", problem, "use weights")
        for name, part in (("weights", self.weights), ("activations", self.activations)):
            where = f"quant.{name}.allocation"
            if part.allocation != "none" and part.granularity != "per_channel":
                raise conflict(where, "shares bits among channels", f"set quant.{name}.granularity=per_channel")
            if part.allocation != "none" and part.bits > 8:
                raise conflict(where, "gives a channel 8 bits at most", f"set quant.{name}.bits to 8 or fewer")
        own = self.activations
        if own.granularity == "per_channel" and own.dynamic:
            raise conflict("quant.activations.dynamic", "takes one range for a tensor", "set granularity=per_tensor")
        if own.allocation != "none" and own.observer in ("mse-batch", "mse-shrink"):
            problem = f"{own.observer} searches each batch for one number of bits"
            raise conflict("quant.activations.allocation", problem, "use the observer mse")
        return self


def _joined(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _joined(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
