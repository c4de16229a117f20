"""The recipe: everything a run depends on, as pydantic models of one YAML file.

    recipe = load_recipe("recipe.yaml", ["quant.weights.bits=2", "seed=7"])

A recipe file may begin with `include: [FILE, …]` and `preset: NAME`; what files say wins over the preset, and the
overrides over both.

- `images`, `quant`, `learning`: the sections and their defaults
- `models`: the recipe made of them
- `presets`: fields by the names of methods
- `loading`: from files, dictionaries and other recipes, with errors of one line
- `idle`: which fields have no effect beside the others
- `shipped`, `catalog`: the recipes that come with the package, by name
"""

from calibquant.recipe.idle import Idle, idle_fields
from calibquant.recipe.images import (
    STRATEGIES,
    AugmentRecipe,
    CalibrationRecipe,
    DataRecipe,
    ModelRecipe,
    Preprocess,
    parse_strategy,
)
from calibquant.recipe.learning import (
    REGULARIZER,
    FinetuneRecipe,
    NetworkRecipe,
    ReconstructRecipe,
    Sampling,
    TrainRecipe,
)
from calibquant.recipe.loading import changed, load_recipe, make_recipe, parse_tree, valid
from calibquant.recipe.models import EvaluationRecipe, ExportRecipe, Recipe
from calibquant.recipe.presets import PRESETS
from calibquant.recipe.quant import (
    ActivationRecipe,
    Allocation,
    Bits,
    Boundary,
    Granularity,
    GridKind,
    MixedRecipe,
    Observer,
    Placement,
    QuantRecipe,
    WeightRecipe,
    has_bits,
)

__all__ = [
    "PRESETS", "REGULARIZER", "STRATEGIES", "ActivationRecipe", "Allocation", "AugmentRecipe", "Bits", "Boundary",
    "CalibrationRecipe", "DataRecipe", "EvaluationRecipe", "ExportRecipe", "FinetuneRecipe", "Granularity", "GridKind",
    "Idle", "MixedRecipe", "ModelRecipe", "NetworkRecipe", "Observer", "Placement", "Preprocess", "QuantRecipe",
    "Recipe", "ReconstructRecipe", "Sampling", "TrainRecipe", "WeightRecipe", "changed", "has_bits", "idle_fields",
    "load_recipe", "make_recipe", "parse_strategy", "parse_tree", "valid",
]  # fmt: skip
