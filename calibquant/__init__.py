"""CalibQuant: post-training quantization of vision CNNs to low bits, small on disk and explained.

    import calibquant
    run = calibquant.quantize(calibquant.load_recipe("recipe.yaml"))
    model = calibquant.load(run.folder)

Names are loaded on first use, so that importing the package is fast and has no side effects.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibquant.data import TensorImages, open_images
    from calibquant.errors import CalibQuantError
    from calibquant.evaluation import evaluate
    from calibquant.export.artifact import load
    from calibquant.graph import capture
    from calibquant.pipeline import Run, finetune, judge, quantize, select, train
    from calibquant.quantization import QuantModel, QuantPlan
    from calibquant.recipe import Recipe, load_recipe

_HOME = {
    "CalibQuantError": "errors",
    "QuantModel": "quantization",
    "QuantPlan": "quantization",
    "Recipe": "recipe",
    "Run": "pipeline",
    "TensorImages": "data",
    "capture": "graph",
    "evaluate": "evaluation",
    "finetune": "pipeline",
    "judge": "pipeline",
    "load": "export.artifact",
    "load_recipe": "recipe",
    "open_images": "data",
    "quantize": "pipeline",
    "select": "pipeline",
    "train": "pipeline",
}

__all__ = [
    "CalibQuantError", "QuantModel", "QuantPlan", "Recipe", "Run", "TensorImages", "capture", "evaluate",
    "finetune", "judge", "load", "load_recipe", "open_images", "quantize", "select", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'calibquant' has no attribute '{name}'")
    return getattr(import_module(f"calibquant.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
