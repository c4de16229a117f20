"""Quantizers, the plan, the quantized network and its calibration."""

from calibquant.quantization.biases import fit_biases
from calibquant.quantization.calibration import calibrate_activations, calibrate_weights
from calibquant.quantization.correction import Correction, correct_biases_analytically, correct_weights
from calibquant.quantization.energies import weight_energies
from calibquant.quantization.model import CoverageRow, QuantModel
from calibquant.quantization.plan import QuantPlan, TensorPlan, make_plan

__all__ = [
    "Correction", "CoverageRow", "QuantModel", "QuantPlan", "TensorPlan", "calibrate_activations", "calibrate_weights",
    "correct_biases_analytically", "correct_weights", "fit_biases", "make_plan", "weight_energies",
]  # fmt: skip
