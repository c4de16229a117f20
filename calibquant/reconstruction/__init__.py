"""Learning roundings and scales so that each unit's output comes close to the float network's."""

from calibquant.reconstruction.engine import UnitReport
from calibquant.reconstruction.network import planned_units, reconstruct

__all__ = ["UnitReport", "planned_units", "reconstruct"]
