"""The recipe: everything a run depends on, as pydantic models of one YAML file.

    recipe = load_recipe("recipe.yaml", ["quant.weights.bits=2", "seed=7"])

A recipe may begin with `preset: NAME`; the file's own fields and then the overrides win over the preset's.

- `models`: the sections and their defaults
- `presets`: fields by the names of methods
- `loading`: from files and dictionaries, with errors of one line
"""

from calibquant.recipe.loading import load_recipe, make_recipe
from calibquant.recipe.models import (
    REGULARIZER,
    ActivationRecipe,
    Allocation,
    AugmentRecipe,
    Bits,
    Boundary,
    CalibrationRecipe,
    DataRecipe,
    EvaluationRecipe,
    ExportRecipe,
    Granularity,
    MixedRecipe,
    ModelRecipe,
    Observer,
    Placement,
    Preprocess,
    QuantRecipe,
    Recipe,
    ReconstructRecipe,
    Sampling,
    TrainRecipe,
    WeightRecipe,
)
from calibquant.recipe.presets import PRESETS

__all__ = [
    "PRESETS", "REGULARIZER", "ActivationRecipe", "Allocation", "AugmentRecipe", "Bits", "Boundary",
    "CalibrationRecipe", "DataRecipe", "EvaluationRecipe", "ExportRecipe", "Granularity", "MixedRecipe", "ModelRecipe",
    "Observer", "Placement", "Preprocess", "QuantRecipe", "Recipe", "ReconstructRecipe", "Sampling", "TrainRecipe",
    "WeightRecipe", "load_recipe", "make_recipe",
]  # fmt: skip
