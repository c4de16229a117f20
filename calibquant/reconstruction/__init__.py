"""Learning roundings and scales so that each unit's output comes close to the float network's."""

from calibquant.reconstruction.accumulation import feature_errors
from calibquant.reconstruction.engine import UnitReport
from calibquant.reconstruction.gram import LayerReport, gram_layers, round_weights
from calibquant.reconstruction.network import planned_units, reconstruct

__all__ = [
    "LayerReport", "UnitReport", "feature_errors", "gram_layers", "planned_units", "reconstruct", "round_weights",
]  # fmt: skip
