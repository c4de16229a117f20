"""The recipe as one pydantic model. Every default stands in the modules of its sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from calibquant.errors import nearest
from calibquant.recipe.images import CalibrationRecipe, DataRecipe, ModelRecipe
from calibquant.recipe.learning import FinetuneRecipe, ReconstructRecipe, TrainRecipe
from calibquant.recipe.presets import PRESETS, merged
from calibquant.recipe.quant import QuantRecipe
from calibquant.recipe.section import Section, conflict, keep_given, without_nulls

MOST_THREADS = 1024


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
    images: int = Field(
        default=256,
        ge=1,
        description="calibration images on which decisions of deploy.onnx and of the integer network are compared; "
        "every code on the first 32 of them",
    )
    evaluate: bool = Field(default=True, description="measure the accuracy of deploy.onnx on the evaluation images")


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
    finetune: FinetuneRecipe | None = Field(default=None, description="train the quantized network further")
    train: TrainRecipe | None = Field(default=None, description="calibquant train needs it")
    seed: int = Field(default=1005, ge=0, lt=1 << 63)
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None = Field(
        default=None, description="CPU threads; none: one for a small network, else torch's default"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N or mps")
    runs: Path = Field(default=Path("runs"), description="folder that receives the run folder")

    @model_validator(mode="wrap")
    @classmethod
    def _with_preset(cls, fields: Any, handler: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        """What the preset sets stands below the fields, and does not count as set by the user."""
        if not isinstance(fields, dict):
            return handler(fields)
        fields, name = without_nulls(cls, fields), fields.get("preset")
        if name is None:
            return handler(fields)
        if not isinstance(name, str) or name not in PRESETS:
            raise conflict("preset", f"'{name}' is unknown", nearest(str(name), PRESETS))
        recipe = handler(merged(PRESETS[name], fields))
        keep_given(recipe, fields)
        return recipe

    @model_validator(mode="after")
    def _augmentable(self) -> Recipe:
        if self.calibration.augment and self.data.augment is None:
            problem = "changes images as data.augment says, which is not given"
            raise conflict("calibration.augment", problem, "give data.augment, or set calibration.augment=false")
        return self

    @model_validator(mode="after")
    def _learnable(self) -> Recipe:
        settings = self.reconstruct
        whole = settings.method != "none" and settings.network.iterations
        if self.quant.activations.granularity == "per_channel" and (settings.method in ("brecq", "qdrop") or whole):
            what = settings.method if settings.method != "adaround" else "reconstruct.network"
            problem = f"{what} learns one scale for an activation"
            raise conflict("reconstruct.method", problem, "use adaround, or quant.activations.granularity=per_tensor")
        return self

    @model_validator(mode="after")
    def _trainable(self) -> Recipe:
        if self.finetune is None:
            return self
        if self.model.submodule is not None:
            problem = f"trains a whole network, not its part {self.model.submodule}"
            raise conflict("finetune", problem, "leave model.submodule out")
        activations, weights = self.quant.activations, self.quant.weights
        if activations.granularity == "per_channel" and self.finetune.activations != "fixed":
            mend = "use quant.activations.granularity=per_tensor, or finetune.activations=fixed"
            raise conflict("finetune.activations", "learns one range for an activation", mend)
        if self.finetune.weights == "arq" and (weights.grid != "uniform" or weights.allocation != "none"):
            problem = "arq needs a uniform grid with the same bits in all channels"
            raise conflict("finetune.weights", problem, "use lsq")
        return self

    @property
    def setting(self) -> str:
        """Bits of stored codes in the field's short form, such as W4A4; WmixA8 where each weight has its own."""
        mixed = self.quant.mixed
        weights = "mix" if mixed else self.quant.weights.code_bits
        return f"W{weights}A{'mix' if mixed and mixed.tensors == 'both' else self.quant.activations.bits}"

    def to_yaml(self) -> str:
        """The effective recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
