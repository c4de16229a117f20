"""Networks by name, with torchvision's key names, and their weights."""

from __future__ import annotations

from calibquant.zoo.registry import build, input_shape, names, regularizer_of
from calibquant.zoo.weights import build_model, load_weights, save_weights

__all__ = ["build", "build_model", "input_shape", "load_weights", "names", "regularizer_of", "save_weights"]
