"""The page and the figure of a selection study, from the content of selection.json."""

from __future__ import annotations

import io
from typing import Any

from calibquant.studies.selection.planning import SHIFTS

WORDS = {"top1": "top-1 %", "agreement": "agreement %", "worst_class": "worst class %"}


def page(result: dict[str, Any]) -> str:
    """The page: how to make it again, what was studied, the tables and the tests."""
    parts = [
        f"# Which calibration images: {', '.join(result['strategies'])}",
        f"    {result['command']}",
        _facts(result),
    ]
    if result["done"] < result["planned"]:
        parts.append(f"{result['done']} of {result['planned']} cells are done; the same command goes on.")
    for setting in result["settings"]:
        for measure, words in WORDS.items():
            rows = [r for r in result["table"] if r["setting"] == setting and r[measure]]
            if rows:
                parts += [f"{setting.upper()}, {words}, mean ± sd over draws:", _table(result, rows, measure)]
    if result["tests"]:
        parts += [
            f"Differences of {WORDS[result['measure']]} to {result['baseline']}, in points, over draws (a draw is the "
            "mean of its seeds); 95 % interval and p of the paired t-test. Named: the comparison named in advance, "
            "whose p stands alone; all others are corrected together by Holm's method.",
            _tests(result),
        ]
    return "\n\n".join(parts) + "\n"


def _facts(result: dict[str, Any]) -> str:
    learned = result["method"]
    if learned != "none":
        learned += f", {result['iterations']} iterations a unit and {result['network_iterations']} of the network"
    top1 = result["float_top1"]
    return (
        f"Draws {', '.join(map(str, result['draws']))} of {result['pool']} candidates; seeds "
        f"{', '.join(map(str, result['seeds']))}; {SHIFTS[result['shift']]}; boundary {result['boundary']}; "
        f"placement {result['placement']}; reconstruction {learned}; {result['images']} evaluation images"
        + ("" if top1 is None else f"; float top-1 {100 * top1:.2f} %") + "."
    )  # fmt: skip


def _table(result: dict[str, Any], rows: list[dict[str, Any]], measure: str) -> str:
    sizes = [s for s in result["sizes"] if any(r["size"] == s for r in rows)]
    found = {(r["strategy"], r["size"]): r[measure] for r in rows}
    lines = [["strategy", *(f"{size} images" for size in sizes)], ["---", *["---:"] * len(sizes)]]
    for strategy in result["strategies"]:
        cells = [found.get((strategy, size)) for size in sizes]
        if any(cells):
            lines.append([strategy, *("–" if c is None else _spread(c) for c in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:.2f}" + ("" if value["sd"] is None else f" ± {100 * value['sd']:.2f}")


def _tests(result: dict[str, Any]) -> str:
    lines = [["setting", "size", "strategy", "draws", "difference", "95 % interval", "p", "p (Holm)", "named"],
             ["---", "---:", "---", "---:", "---:", "---:", "---:", "---:", "---"]]  # fmt: skip
    for t in result["tests"]:
        interval = "–" if t["interval"] is None else f"{100 * t['interval'][0]:+.2f} to {100 * t['interval'][1]:+.2f}"
        lines.append([
            t["setting"].upper(), str(t["size"]), t["strategy"], str(t["draws"]), f"{100 * t['difference']:+.2f}",
            interval, *("–" if p is None else f"{p:.2g}" for p in (t["p"], t["p_holm"])), "yes" if t["named"] else "",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure_png(result: dict[str, Any]) -> bytes:
    """Mean and standard deviation against the number of images, one panel a setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure, settings = result["measure"], result["settings"]
    figure = Figure(figsize=(5 * len(settings), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, setting in enumerate(settings, start=1):
        axes = figure.add_subplot(1, len(settings), panel)
        for number, strategy in enumerate(result["strategies"]):
            rows = [r for r in result["table"] if (r["setting"], r["strategy"]) == (setting, strategy)]
            if rows:
                nudge = 1.03 ** (number - len(result["strategies"]) / 2)  # so that bars do not cover each other
                axes.errorbar(
                    [r["size"] * nudge for r in rows], [100 * r[measure]["mean"] for r in rows],
                    [100 * (r[measure]["sd"] or 0) for r in rows], marker="o", markersize=3, capsize=2, label=strategy,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(result["sizes"], [str(size) for size in result["sizes"]])
        axes.set_xlabel("calibration images")
        axes.set_ylabel(WORDS[measure])
        axes.set_title(f"{setting.upper()}, {SHIFTS[result['shift']]}", fontsize=9)
    figure.axes[0].legend(fontsize=7)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()
