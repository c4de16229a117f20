"""The page of a comparison, compare.md, from the content of compare.json."""

from __future__ import annotations

from typing import Any

Table = tuple[list[str], list[list[str]]]
WORDS = ("method", "verdict")  # columns to the left
MEASURES = {"top1": "top-1 %", "agreement": "agreement %"}


def markdown(result: dict[str, Any]) -> str:
    """The page: how to make it again, what was compared, and the three tables."""
    parts = [f"# Comparison of {', '.join(result['methods'])}", f"    {result['command']}", facts(result)]
    if result["done"] < result["planned"]:
        parts.append(f"{result['done']} of {result['planned']} cells are done; the same command goes on.")
    parts += [f"Mean ± standard deviation of {MEASURES[result['measure']]} (seeds):", _lines(score_table(result))]
    parts += ["Size and time, means over the seeds:", _lines(_cost_table(result))]
    if result["tests"]:
        parts += [
            f"Differences of {MEASURES[result['measure']]} to {result['baseline']}, in points. Better or worse is only "
            "what has a 95 % interval over the seeds that excludes 0. p (seeds): paired t-test; p (images): sign-flip "
            "test over the images, all seeds together; McNemar: exact test of each seed.",
            _lines(_test_table(result)),
        ]
    return "\n\n".join(parts) + "\n"


def facts(result: dict[str, Any]) -> str:
    """One line of what has to be stated with the numbers."""
    names = {"boundary": "boundary", "placement": "placement", "calibration_count": "calibration images",
             "iterations": "iterations"}  # fmt: skip
    parts = [f"{words} {_by_method(result['methods'], key)}" for key, words in names.items()]
    parts.append(f"seeds {', '.join(map(str, result['seeds']))}")
    parts.append(f"{result['images']} evaluation images")
    top1 = result["float_top1"]
    parts.append("no labels" if top1 is None else f"float top-1 {_percent(top1)} %")
    return "; ".join(parts) + "."


def score_table(result: dict[str, Any]) -> Table:
    """Methods × settings: mean ± sd (seeds) in percent."""
    found = {(row["method"], row["setting"]): row[result["measure"]] for row in result["table"]}
    rows = [
        [method, *(_spread(found.get((method, setting))) for setting in result["settings"])]
        for method in result["methods"]
    ]
    return [MEASURES[result["measure"]], *result["settings"]], rows


def score_text(top1: float | None, agreement: float) -> str:
    """A cell's scores in words."""
    known = "" if top1 is None else f"top-1 {_percent(top1)} %, "
    return f"{known}agreement {_percent(agreement)} %"


def _cost_table(result: dict[str, Any]) -> Table:
    rows = []
    for row in result["table"]:
        seconds = row["seconds"]
        rolled = f"{row['rolled_back']:.1f} of {row['units']}" if row["units"] else "–"
        rows.append([
            row["setting"], row["method"], f"{row['weight_bits']:.2f}", f"{row['bytes']:,}", _spread(row["agreement"]),
            f"{seconds['reconstruction']:.1f}", f"{seconds['total']:.1f}", rolled,
        ])  # fmt: skip
    header = ["setting", "method", "weight bits", "bytes", "agreement %", "reconstruction s", "total s", "rolled back"]
    return header, rows


def _test_table(result: dict[str, Any]) -> Table:
    rows = []
    for test in result["tests"]:
        interval, each = test["interval"], test["mcnemar"]
        rows.append([
            test["setting"], test["method"], _points(test["difference"]),
            "–" if test["sd"] is None else f"{100 * test['sd']:.2f}",
            "–" if interval is None else f"{_points(interval[0])} to {_points(interval[1])}",
            _p(test["p_seeds"]), _p(test["p_images"]), "–" if each is None else ", ".join(map(_p, each)),
            test["verdict"],
        ])  # fmt: skip
    header = ["setting", "method", "difference", "sd", "95 % interval", "p (seeds)", "p (images)", "McNemar", "verdict"]
    return header, rows


def _by_method(methods: dict[str, dict[str, Any]], key: str) -> str:
    """A fact that all methods share, or the methods of each value."""
    users: dict[str, list[str]] = {}
    for method, values in methods.items():
        users.setdefault("none" if values[key] is None else str(values[key]), []).append(method)
    if len(users) == 1:
        return next(iter(users))
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in users.items())


def _lines(table: Table) -> str:
    header, rows = table
    aligned = ["---" if i == 0 or name in WORDS else "---:" for i, name in enumerate(header)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, aligned, *rows))


def _spread(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    spread = "" if value["sd"] is None else f" ± {100 * value['sd']:.2f}"
    return f"{_percent(value['mean'])}{spread} ({value['n']})"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}"


def _p(value: float | None) -> str:
    """A p-value; a dash when there is none."""
    return "–" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"
