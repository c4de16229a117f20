"""The figure of a comparison, compare.png, from the content of compare.json."""

from __future__ import annotations

import io
from typing import Any

from calibquant.studies.compare.markdown import MEASURES


def pareto_png(result: dict[str, Any]) -> bytes:
    """Bytes of the saved network against accuracy: a line a method, a point a setting, whose name is at its best."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    measure = result["measure"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method in result["methods"]:
        rows = sorted((r for r in result["table"] if r["method"] == method), key=lambda r: r["bytes"])
        sizes, means = [r["bytes"] / 1000 for r in rows], [100 * r[measure]["mean"] for r in rows]
        axes.errorbar(
            sizes,
            means,
            [100 * (r[measure]["sd"] or 0) for r in rows],
            marker="o",
            markersize=4,
            capsize=2,
            label=method,
        )
    for setting in dict.fromkeys(r["setting"] for r in result["table"]):
        best = max((r for r in result["table"] if r["setting"] == setting), key=lambda r: r[measure]["mean"])
        place = best["bytes"] / 1000, 100 * best[measure]["mean"]
        axes.annotate(setting, place, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("packed network, kB")
    axes.set_ylabel(MEASURES[measure])
    axes.legend(fontsize=7)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120, metadata={"Software": None})
    return data.getvalue()
