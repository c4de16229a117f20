"""The figures of an analysis, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibquant.numerics.aciq import DensityFit
from calibquant.studies.analysis.advice import Harm
from calibquant.studies.analysis.tensors import TensorFacts

BINS, BARS = 120, 30
INK, MARK = "#33557a", "#b8432f"


def histogram_svg(fact: TensorFacts, grid_ends: tuple[float, float] | None) -> bytes:
    """The values' density on a logarithmic axis, both fitted densities, and the ends of the grid."""
    figure, axes = _figure(6, 3)
    histogram = fact.histogram
    edges = np.linspace(fact.low, fact.high if fact.high > fact.low else fact.low + 1, BINS + 1)
    counts, _ = np.histogram(histogram.centers.numpy(), bins=edges, weights=histogram.counts.numpy())
    density = counts / (counts.sum() * np.diff(edges))
    axes.stairs(density, edges, fill=True, color=INK, alpha=0.5, label="values")
    x = (edges[:-1] + edges[1:]) / 2
    for name, y, style in (("Laplace", laplace(fact.density, x), "--"), ("Gauss", gauss(fact.density, x), ":")):
        axes.plot(x, y, style, color="black", linewidth=1, label=name)
    for end in grid_ends or ():
        axes.axvline(end, color=MARK, linewidth=1)
    axes.set_yscale("log")
    positive = density[density > 0]
    axes.set_ylim(positive.min() / 3, positive.max() * 3)
    axes.set_title(f"{fact.kind} {fact.name}, {fact.bits} bits", fontsize=9)
    axes.legend(fontsize=7)
    return _svg(figure)


def harm_svg(harms: Sequence[Harm]) -> bytes:
    """The tensors that do the most harm, as bars."""
    rows = sorted(harms, key=lambda h: h.harm, reverse=True)[:BARS][::-1]
    figure, axes = _figure(7, 0.8 + 0.22 * len(rows))
    colors = [INK if row.kind == "weight" else MARK for row in rows]
    axes.barh(range(len(rows)), [row.harm for row in rows], color=colors)
    axes.set_yticks(range(len(rows)), [f"{row.name} ({row.bits} bits)" for row in rows], fontsize=7)
    axes.set_xlabel("mean square change of the logits, this tensor alone quantized; weights blue, activations red")
    return _svg(figure)


def growth_svg(errors: Mapping[str, float]) -> bytes:
    """The relative feature error after each block."""
    figure, axes = _figure(7, 3)
    axes.plot(range(len(errors)), [100 * e for e in errors.values()], marker="o", color=INK)
    axes.set_xticks(range(len(errors)), list(errors), rotation=90, fontsize=6)
    axes.set_ylabel("|quantized - float| / |float|, %")
    axes.set_ylim(bottom=0)
    return _svg(figure)


def laplace(fit: DensityFit, x: Any) -> Any:
    """The fitted Laplace density at x."""
    return np.exp(-np.abs(x - fit.mean) / fit.b) / (2 * fit.b) if fit.b > 0 else np.zeros_like(x)


def gauss(fit: DensityFit, x: Any) -> Any:
    """The fitted Gauss density at x."""
    if fit.sigma <= 0:
        return np.zeros_like(x)
    return np.exp(-(((x - fit.mean) / fit.sigma) ** 2) / 2) / (fit.sigma * np.sqrt(2 * np.pi))


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # heavy, and needed here alone

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> bytes:
    import matplotlib as mpl

    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "calibquant", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
