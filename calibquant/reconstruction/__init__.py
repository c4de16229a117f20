"""Learning roundings and scales so that each unit's output comes close to the float network's."""

from calibquant.reconstruction.accumulation import feature_errors
from calibquant.reconstruction.bias_correction import correct_biases
from calibquant.reconstruction.engine import UnitReport
from calibquant.reconstruction.gram import LayerReport, gram_layers, round_weights
from calibquant.reconstruction.network import planned_units, reconstruct

__all__ = [
    "LayerReport", "UnitReport", "correct_biases", "feature_errors", "gram_layers", "planned_units", "reconstruct",
    "round_weights",
]  # fmt: skip
