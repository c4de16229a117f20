"""Presets: fields of recipes by name. Those of a method set what makes the method.

Those named *-reference follow its released code in everything.
"""

from __future__ import annotations

from functools import reduce
from typing import Any


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """The fields of both, sections merged; those of `top` win."""
    result = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


# QDrop's released code, which CaPTQ's follows; see docs/methods.md, "Presets".
_QDROP_CODE: dict[str, Any] = {
    "calibration": {"count": 1024, "range_count": 256, "batch_size": 256, "strategy": "first"},
    "quant": {
        "placement": "academic",
        "boundary": "qdrop",
        "weights": {"symmetric": False, "granularity": "per_channel", "observer": "mse"},
        "activations": {"symmetric": False, "observer": "mse-batch"},
    },
    "reconstruct": {"method": "qdrop", "iterations": 20_000, "sampling": "with_replacement", "never_worse": False},
}
# BRECQ's released code.
_BRECQ_CODE: dict[str, Any] = {
    "calibration": {"count": 1024, "range_count": 64, "batch_size": 64, "strategy": "first"},
    "quant": {
        "placement": "academic",
        "boundary": "brecq",
        "weights": {"symmetric": False, "granularity": "per_channel", "observer": "mse-shrink"},
        "activations": {"symmetric": False, "observer": "mse-shrink"},
    },
    "reconstruct": {
        "method": "brecq",
        "iterations": 20_000,
        "sampling": "within_batch",
        "scale_iterations": 5_000,
        "scale_lr": 4e-4,
        "scale_inputs": "float",
        "skip_first": True,
        "never_worse": False,
    },
}


def _analytic(*parts: dict[str, Any]) -> dict[str, Any]:
    """A preset without reconstruction whose `quant` has the fields of all parts; the later win."""
    return {"quant": reduce(merged, parts), "reconstruct": {"method": "none"}}


# The parts of Banner et al.'s method, each alone on top of min-max ranges, and all together.
_MINMAX: dict[str, Any] = {"weights": {"observer": "minmax"}, "activations": {"observer": "minmax"}}
_CLIPPING = {"activations": {"observer": "aciq-laplace"}}
_ALLOCATION = {
    "weights": {"allocation": "banner"},
    "activations": {"granularity": "per_channel", "allocation": "banner"},
}
_CORRECTION = {"weights": {"correction": "mean-variance"}}

# Rates under which some hundred iterations suffice, with scales and biases beside the roundings.
_LEARNED: dict[str, Any] = {
    "method": "qdrop",
    "rounding_lr": 2e-2,
    "weight_scale_lr": 5e-3,
    "scale_lr": 5e-3,
    "relative_scales": True,
    "bias_lr": 5e-3,
    "precision": "auto",
}

_FAST: dict[str, Any] = {"reconstruct": {**_LEARNED, "iterations": 100, "network": {"iterations": 120}}}

PRESETS: dict[str, dict[str, Any]] = {
    "nearest": {"reconstruct": {"method": "none"}},
    "gram": {"quant": {"weights": {"rounding": "gram"}}, "reconstruct": {"method": "none"}},
    "banner-base": _analytic(_MINMAX),
    "banner-clipping": _analytic(_MINMAX, _CLIPPING),
    "banner-allocation": _analytic(_MINMAX, _ALLOCATION),
    "banner-correction": _analytic(_MINMAX, _CORRECTION),
    "banner-all": _analytic(_MINMAX, _CLIPPING, _ALLOCATION, _CORRECTION),
    # ACIQ's clipping, with biases corrected on the calibration images.
    "aciq": _analytic({"activations": {"observer": "aciq"}}, {"bias_correction": "empirical"}),
    # What CalibQuant does without a gradient, deployable as integers.
    "analytic": _analytic(
        {"weights": {"observer": "mse", "rounding": "gram"}, "activations": {"observer": "mse"}},
        {"bias_correction": "empirical"},
    ),
    "adaround": {"reconstruct": {"method": "adaround"}},
    "brecq": {"reconstruct": {"method": "brecq", "scale_lr": 4e-4}},
    "qdrop": {"reconstruct": {"method": "qdrop"}},
    "fast": _FAST,
    "best": {"reconstruct": {**_LEARNED, "iterations": 500, "network": {"iterations": 1000}}},
    # Quantization-aware training from where `fast` ends.
    "qat": {**_FAST, "finetune": {}},
    # What AMCT's retraining does by default, with its observers.
    "amct-qat": {
        "quant": {
            "weights": {"symmetric": True, "observer": "arq"},
            "activations": {"observer": "ifmr"},
        },
        "reconstruct": {"method": "none"},
        "finetune": {
            "weights": "arq",
            "activations": "ulq",
            "labels": 1.0,
            "distill": 0.0,
            "iterations": 2000,
            "batch_size": 25,
            "optimizer": "sgd",
            "nesterov": False,
            "lr": 1e-5,
            "scale_lr": 1e-5,
            "weight_decay": 1e-4,
            "precision": "float32",
        },
    },
    "captq": {"quant": {"boundary": "captq"}, "reconstruct": {"method": "qdrop"}},
    "adaround-reference": {**_BRECQ_CODE, "reconstruct": {**_BRECQ_CODE["reconstruct"], "method": "adaround"}},
    "brecq-reference": _BRECQ_CODE,
    "qdrop-reference": _QDROP_CODE,
    "captq-reference": {**_QDROP_CODE, "quant": {**_QDROP_CODE["quant"], "boundary": "captq"}},
    # Symmetric per-channel weights and min-max activations, everything integer, as most 8-bit toolkits do. Gram
    # rounding and bias correction make up for the bit that weights lose where kernels of some processors saturate.
    "int8": {
        "quant": {
            "placement": "integer",
            "boundary": "none",
            "weights": {"bits": 8, "symmetric": True, "observer": "minmax", "rounding": "gram"},
            "activations": {"bits": 8, "observer": "minmax"},
            "bias_correction": "empirical",
        },
    },
}
