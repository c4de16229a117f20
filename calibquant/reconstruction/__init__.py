"""Learning roundings and scales so that each unit's output comes close to the float network's."""

from calibquant.reconstruction.accumulation import feature_errors
from calibquant.reconstruction.bias_correction import correct_biases
from calibquant.reconstruction.engine import UnitReport
from calibquant.reconstruction.network import planned_units, reconstruct

__all__ = ["UnitReport", "correct_biases", "feature_errors", "planned_units", "reconstruct"]
