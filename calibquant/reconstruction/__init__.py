"""Learning roundings, scales and biases so that each unit, and then the network, gives what the float network gives."""

from calibquant.reconstruction.accumulation import feature_errors
from calibquant.reconstruction.bias_correction import correct_biases
from calibquant.reconstruction.budget import within_time
from calibquant.reconstruction.engine import UnitReport
from calibquant.reconstruction.gram import LayerReport, gram_layers, round_weights
from calibquant.reconstruction.network import planned_units, reconstruct

__all__ = [
    "LayerReport", "UnitReport", "correct_biases", "feature_errors", "gram_layers", "planned_units",
    "reconstruct", "round_weights", "within_time",
]  # fmt: skip
