"""Training of float networks."""

from calibquant.training.fit import fit

__all__ = ["fit"]
