"""config.json in the per-layer form of Huawei AMCT: how each layer was quantized, beside its scales in record.txt."""

from __future__ import annotations

from typing import Any

from calibquant.export.record import record
from calibquant.graph.nodes import weight_of
from calibquant.numerics.amct import IFMR_PERCENTILE, IFMR_RANGE, IFMR_STEP
from calibquant.numerics.grid import PerChannel
from calibquant.quantization.model import QuantModel
from calibquant.recipe import QuantRecipe

CONFIG = "config.json"
BALANCER = 0.5


def amct_config(model: QuantModel, recipe: QuantRecipe, batches: int, learned: bool) -> dict[str, Any]:
    """The content of config.json.

    Keys are those of record.txt. AMCT's words stand for what was done: `hfmg` for that observer and for ranges by a
    histogram's divergence, `ifmr` for all others; `arq_quantize` for rounding to nearest, `ada_quantize` for learned
    rounding. A layer is enabled when both its weight and its input are quantized, the input with one scale. Where
    channels share bits, num_bits are those of the widest.

    Args:
        model: the quantized network.
        recipe: how ranges were found.
        batches: calibration batches.
        learned: roundings were learned.
    """
    layers: dict[str, Any] = {}
    quantized = {row["node"]: row for row in record(model)}
    for node in model.teacher.graph.nodes:
        weight = weight_of(node)
        if weight is None:
            continue
        layer = str(weight.target).removesuffix(".weight")
        layers[node.name if layer in layers else layer] = _layer(quantized.get(node.name), model, recipe, learned)
    return {
        "version": 1,
        "batch_num": batches,
        "activation_offset": not recipe.activations.symmetric,
        "do_fusion": True,
        "skip_fusion_layers": [],
        **layers,
    }


def _layer(row: dict[str, Any] | None, model: QuantModel, recipe: QuantRecipe, learned: bool) -> dict[str, Any]:
    if row is None or row["input"] is None or isinstance(row["input"]["scale"], list):
        return {"quant_enable": False}
    weight = model.weight_quantizers[row["weight"]["parameter"]].plan
    return {
        "quant_enable": True,
        "dmq_balancer_param": BALANCER,
        "activation_quant_params": _activation(row["input"]["bits"], recipe),
        "weight_quant_params": {
            "num_bits": row["weight"]["bits"],
            "wts_algo": "ada_quantize" if learned else "arq_quantize",
            "channel_wise": isinstance(weight.granularity, PerChannel),
        },
    }


def _activation(bits: int, recipe: QuantRecipe) -> dict[str, Any]:
    own = recipe.activations
    asymmetric = not own.symmetric
    if own.observer in ("kl", "hfmg"):
        return {"num_bits": bits, "act_algo": "hfmg", "num_of_bins": 4096, "asymmetric": asymmetric}
    kept = IFMR_PERCENTILE if own.observer != "percentile" else round(1 - (1 - own.percentile / 100) / 2, 8)
    return {
        "num_bits": bits,
        "act_algo": "ifmr",
        "max_percentile": kept,
        "min_percentile": kept,
        "search_range": list(IFMR_RANGE),
        "search_step": IFMR_STEP,
        "asymmetric": asymmetric,
    }
