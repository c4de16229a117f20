"""The recipe's sections of what is learned: reconstruction, float and quantization-aware training."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from calibquant.recipe.section import Positive, Section, conflict

REGULARIZER = 0.01  # weight of the rounding regularizer for networks of which no other is published
Seconds = Annotated[float, BeforeValidator(lambda value: _seconds(value)), Field(gt=0)]
Sampling = Literal["without_replacement", "with_replacement", "within_batch"]


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
    beta: tuple[Positive, Positive] = Field(default=(20.0, 2.0), description="the regularizer's exponent, from and to")
    scale_lr: float = Field(default=4e-5, gt=0, description="of the activation scales; falls to 0 by a cosine")
    relative_scales: bool = Field(default=False, description="scale_lr counts in shares of each scale")
    weight_scale_lr: float = Field(
        default=0.0, ge=0, description="of the weights' scales, relative to them (Genie); 0 keeps them"
    )
    bias_lr: float = Field(
        default=0.0, ge=0, description="of the biases, in standard deviations of the output; 0 keeps them"
    )
    views: int = Field(
        default=1,
        ge=1,
        le=64,
        description="versions of each image from which units learn: as it is, and mirrored or not and shifted",
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


class TrainRecipe(Section):
    """Float training of the network on the images `data.calibration`."""

    _name: ClassVar[str] = "train"
    epochs: int = Field(default=200, ge=1, description="passes over the images")
    iterations: int | None = Field(default=None, ge=1, description="steps in all, in place of epochs")
    batch_size: int = Field(default=128, ge=2, description="images a step; a last smaller batch is left out")
    accumulate: int = Field(
        default=1, ge=1, description="parts in which a step's images pass, one after another: less memory"
    )
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = Field(default=0.1, description="the schedule's peak")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd: momentum; adamw: its first beta")
    nesterov: bool = Field(default=True, description="sgd: Nesterov's form of momentum")
    weight_decay: float = Field(
        default=5e-4,
        ge=0,
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
    mixup: float = Field(default=0.0, ge=0, description="alpha of the mixing share; 0 mixes not")
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of an average of the weights, which is kept then")
    clip: Positive | None = Field(default=None, description="largest norm of the gradient")
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32", description="of the layers while training; auto: bfloat16 where the processor has it"
    )
    holdout: float = Field(
        default=0.0, ge=0, le=0.5, description="share of the training images that choose the best epoch; 0: the last"
    )
    evaluate_every: int = Field(default=1, ge=1, description="epochs between looks at the images held out")

    @model_validator(mode="after")
    def _fits(self) -> TrainRecipe:
        if self.iterations is None and self.warm_up is not None and self.warm_up >= self.epochs:
            raise conflict(
                f"{self._name}.warm_up", f"{self.warm_up:g} epochs of {self.epochs}", "leave epochs for the fall"
            )
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            mend = f"set {self._name}.nesterov=false, or momentum above 0"
            raise conflict(f"{self._name}.nesterov", "needs momentum", mend)
        if self.batch_size % self.accumulate:
            problem = f"{self.batch_size} images make no {self.accumulate} equal parts"
            raise conflict(f"{self._name}.accumulate", problem, "use a divisor of batch_size")
        return self


class FinetuneRecipe(TrainRecipe):
    """Quantization-aware training of a calibrated or reconstructed network on the images `data.calibration`."""

    _name: ClassVar[str] = "finetune"
    epochs: int = Field(default=5, ge=1, description="passes over the images")
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: Positive = Field(
        default=5e-3,
        description="of weights and biases, the schedule's peak; adamw: in steps of the grid and standard deviations",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="of weights")
    precision: Literal["float32", "bfloat16", "auto"] = Field(default="auto", description="as in reconstruct")
    holdout: float = Field(
        default=0.02, ge=0, le=0.5, description="share of the training images that tell whether the start was better"
    )
    weights: Literal["lsq", "arq"] = Field(
        default="lsq", description="lsq: their scales are learned; arq: they follow the weights' range in each step"
    )
    activations: Literal["lsq", "lsq+", "pact", "ulq", "fixed"] = Field(
        default="lsq",
        description="lsq: scales are learned; lsq+: zero points too; pact, ulq: the ends of the range; fixed: nothing",
    )
    scale_lr: Positive = Field(
        default=1e-3, description="of all scales, zero points and ends; adamw: in shares of them"
    )
    freeze: float = Field(default=1.0, gt=0, le=1, description="share of the steps after which these stay")
    labels: float = Field(default=0.0, ge=0, description="weight of the labels' cross-entropy; 0: labels are not used")
    distill: float = Field(default=1.0, ge=0, description="weight of KL(float || quantized) of the outputs")
    temperature: Positive = Field(default=2.0, description="by which logits are divided before the KL")
    features: float = Field(
        default=0.0, ge=0, description="weight of the relative error of the units' outputs, beside `distill`"
    )
    batch_norm: Literal["folded", "reestimated"] = Field(
        default="folded",
        description="reestimated: at the end each channel gets back the mean of the float network's output, on the "
        "calibration images",
    )

    @model_validator(mode="after")
    def _teaches(self) -> FinetuneRecipe:
        if not (self.labels or self.distill):
            raise conflict("finetune.distill", "is 0, and finetune.labels too", "give one of them a weight")
        if self.features and not self.distill:
            raise conflict("finetune.features", "stands beside finetune.distill, which is 0", "set it above 0")
        return self


def _seconds(value: Any) -> Any:
    """90s, 20m and 1.5h as seconds; what is no such text stays for pydantic to judge."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([smh])\s*", value) if isinstance(value, str) else None
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else value
