"""The page of an analysis, analysis.md, from the content of analysis.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calibquant.recipe import Recipe

LISTED = 25  # rows of the table of harms


def page(result: dict[str, Any], recipe: Recipe, figures: Sequence[str]) -> str:
    """Advice first, then the tables it comes from."""
    quant = recipe.quant
    parts = [
        f"# Analysis of {recipe.model.name or 'a network'} at {result['setting']}",
        f"Nearest rounding, placement {quant.placement}, boundary {quant.boundary}, activation observer "
        f"{quant.activations.observer}; {recipe.calibration.count} calibration images, tensors measured on the first "
        f"{result['images']}.",
        "## Advice",
        "\n".join(_advice_lines(result)),
        "## Harm of each tensor alone",
        "All others float. Harm: mean square change of the centered logits. Estimate: of it, from one backward pass an "
        "image. KL: of the classes to the float network's, in nats.",
        _lines(*harm_table(result)),
        "![harm](figures/harm.svg)",
        "## Tensors",
        _lines(*_tensor_table(result)),
        "## Activation ranges by observer",
        "Signal to quantization noise in dB on the same images.",
        _lines(*range_table(result)),
    ]
    if result["feature_errors"]:
        parts += ["## Growth of the error", _lines(*_growth_table(result)), "![growth](figures/growth.svg)"]
    histograms = [name for name in figures if name not in ("harm.svg", "growth.svg")]
    if histograms:
        parts += ["## Histograms", *(f"![{name}](figures/{name})" for name in histograms)]
    return "\n\n".join(parts) + "\n"


def _advice_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"- {row['text']}" + "".join(f" (`{key}`)" for key in row["overrides"]) for row in result["advice"]]
    if result["effect"]:
        lines.append(f"- {effect_text(result)}")
    return lines or ["- nothing stands out"]


def effect_text(result: dict[str, Any]) -> str:
    """What the suggested bits do together."""
    effect = result["effect"]
    (loss, less), (agreement, more), (size, larger) = effect["loss"], effect["agreement"], effect["bytes"]
    return (
        f"together, measured on {result['images']} images: KL to the float network {loss:.4f} -> {less:.4f} nats, "
        f"agreement {100 * agreement:.1f} -> {100 * more:.1f} %, {size:,} -> {larger:,} bytes "
        f"({100 * (larger / size - 1):+.1f} %)"
    )


def harm_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The tensors that do the most harm, the worst first."""
    total = sum(row["harm"] for row in result["harms"]) or 1.0
    rows = sorted(result["harms"], key=lambda row: row["harm"], reverse=True)[:LISTED]
    header = [
        "tensor",
        "kind",
        "bits",
        "harm",
        "share %",
        "estimate",
        "KL",
        "classes changed %",
        "bytes more at 8 bits",
    ]
    return header, [
        [
            row["name"], row["kind"], str(row["bits"]), f"{row['harm']:.4g}", f"{100 * row['harm'] / total:.1f}",
            "–" if row["estimate"] is None else f"{row['estimate']:.4g}", f"{row['loss']:.5f}",
            f"{100 * row['disagreement']:.1f}",
            f"{row['bytes']:,}" if row["kind"] == "weight" else "–",
        ]
        for row in rows
    ]  # fmt: skip


def range_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Activations × observers."""
    observers = list(dict.fromkeys(row["observer"] for row in result["ranges"]))
    found: dict[str, dict[str, str]] = {}
    for row in result["ranges"]:
        found.setdefault(row["name"], {})[row["observer"]] = "–" if row["sqnr"] is None else f"{row['sqnr']:.1f}"
    return ["activation", *observers], [
        [name, *(cells.get(o, "–") for o in observers)] for name, cells in found.items()
    ]


def _tensor_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["tensor", "kind", "bits", "low", "high", "clipped %", "SQNR dB", "channel spread", "outliers", "density"]
    return header, [
        [
            row["name"], row["kind"], str(row["bits"]), f"{row['low']:.4g}", f"{row['high']:.4g}",
            f"{100 * row['clipped']:.2f}", "–" if row["sqnr"] is None else f"{row['sqnr']:.1f}",
            "–" if row["spread"] is None else f"{row['spread']:.1f}", str(len(row["outliers"])),
            _density(row["density"]),
        ]
        for row in result["tensors"]
    ]  # fmt: skip


def _density(fit: dict[str, float]) -> str:
    """The nearer density with its parameter and its distance."""
    if fit["laplace_distance"] <= fit["gauss_distance"]:
        return f"Laplace b {fit['b']:.3g} ({fit['laplace_distance']:.2f})"
    return f"Gauss σ {fit['sigma']:.3g} ({fit['gauss_distance']:.2f})"


def _growth_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [[node, f"{100 * error:.1f}"] for node, error in result["feature_errors"].items()]
    return ["after node", "relative feature error %"], rows


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    aligned = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, aligned, *rows))
