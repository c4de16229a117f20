"""The record: readable scales per layer, as JSON and in the text form of Huawei AMCT (record.txt)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from calibquant.graph.nodes import activations_of, op_of, weight_of
from calibquant.numerics.grid import widest
from calibquant.quantization.model import QuantModel
from calibquant.quantization.quantizers import ActivationQuantizer


def record(model: QuantModel) -> list[dict[str, Any]]:
    """One entry for each call of an op with a quantized weight, in execution order.

    Returns:
        dictionaries with `node`, `layer`, `op`, `weight` (parameter, bits, signed, scale and zero_point per channel),
        `input` and `output` (bits, signed, scale, zero_point; None for float or a dynamic range). Scales and zero
        points of an activation per channel are lists. Where channels share bits, `bits` are those of the widest, and
        `channel_bits` those of each. Where levels are few, `bits` are those of the integers, `stored_bits` those of a
        stored code, and `levels` the integers, of all channels or of each. And `bias_delta`, a float for each channel,
        where the bias was corrected.
    """
    rows = []
    for node in model.teacher.graph.nodes:
        weight = weight_of(node)
        if weight is None or str(weight.target) not in model.weight_quantizers:
            continue
        quantizer = model.weight_quantizers[str(weight.target)]
        q = quantizer.get()
        correction = model.bias_deltas.get(node.name)
        delta = None if correction is None else correction.delta
        rows.append({
            "node": node.name,
            "layer": str(weight.target).removesuffix(".weight"),
            "op": op_of(node).name,  # type: ignore[union-attr]
            "weight": {
                "parameter": str(weight.target),
                "bits": q.grid.bits,
                **({} if q.levels is None else {"stored_bits": quantizer.plan.bits, "levels": q.levels.tolist()}),
                "signed": q.grid.signed,
                "scale": q.scale.reshape(-1).tolist(),
                "zero_point": q.zero_point.reshape(-1).tolist(),
                **_channel_bits(q.channel_bits),
            },
            "input": _grid(model.quantizer_before(activations_of(node)[0])),
            "output": _grid(_quantizer_after(model, node)),
            **({} if delta is None else {"bias_delta": delta.tolist()}),
        })  # fmt: skip
    return rows


def record_text(model: QuantModel) -> str:
    """The record in AMCT's protobuf text form.

    AMCT's codes are signed: q = clamp(round(x / scale) + offset, -2^(b-1), 2^(b-1) - 1), so an unsigned grid's offset
    is its zero point - 2^(b-1). A layer whose input is not quantized has no scale_d. A record's key is the layer's
    name, from its second call on the node's; dst_type is the container of its widest codes.

    AMCT knows neither channels with bits of their own, whose offsets here are those in the widest channel's container,
    nor scales for each channel of an activation: such an input has no scale_d.
    """
    lines: list[str] = []
    keys: set[str] = set()
    for row in record(model):
        key = row["node"] if row["layer"] in keys else row["layer"]
        keys.add(key)
        lines += ["record {", f'  key: "{key}"', "  value {"]
        data, weight = row["input"], row["weight"]
        if data is not None and isinstance(data["scale"], list):
            data = None
        widest = max(weight["bits"], data["bits"] if data else 0)
        if data is not None:
            lines += [f"    scale_d: {data['scale']!r}", f"    offset_d: {_offset(data, data['zero_point'])}"]
        lines += [f"    scale_w: {s!r}" for s in weight["scale"]]
        lines += [f"    offset_w: {_offset(weight, z)}" for z in weight["zero_point"]]
        lines += [f'    dst_type: "INT{next(c for c in (4, 8, 16) if widest <= c)}"', "  }", "}"]
    return "\n".join(lines) + "\n"


def _offset(grid: dict[str, Any], zero_point: int) -> int:
    return zero_point if grid["signed"] else zero_point - (1 << (grid["bits"] - 1))


def _grid(quantizer: ActivationQuantizer | None) -> dict[str, Any] | None:
    if quantizer is None or quantizer.scale is None:
        return None
    bits, signed, levels = quantizer.channel_bits, quantizer.plan.grid.signed, quantizer.levels
    return {
        "quantizer": quantizer.name,
        "bits": quantizer.plan.grid.bits if bits is None else widest(bits, signed).bits,
        "signed": signed,
        "scale": quantizer.scale.tolist(),
        "zero_point": quantizer.zero_point.tolist(),
        **_channel_bits(bits),
        **({} if levels is None else {"stored_bits": quantizer.plan.bits, "levels": levels.tolist()}),
    }


def _channel_bits(bits: Tensor | None) -> dict[str, list[int]]:
    return {} if bits is None else {"channel_bits": bits.tolist()}


def _quantizer_after(model: QuantModel, node: fx.Node) -> ActivationQuantizer | None:
    """The first quantizer on the only way from `node`."""
    while node.name not in model.activation_quantizers:
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))
    return model.activation_quantizers[node.name]
