"""The figure of a comparison, compare.png, from the content of compare.json."""

from __future__ import annotations

import io
from typing import Any

from calibquant.studies.compare.markdown import MEASURES


def pareto_png(result: dict[str, Any]) -> bytes:
    """Bytes of the saved network against accuracy: a line a method, a point a setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
        for row, x, y in zip(rows, sizes, means, strict=True):
            axes.annotate(row["setting"], (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("packed network, kB")
    axes.set_ylabel(MEASURES[measure])
    axes.legend(fontsize=7)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120, metadata={"Software": None})
    return data.getvalue()
