"""What the cells of a selection study say: the content of selection.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from calibquant.studies.paired import holm, over_seeds, spread
from calibquant.studies.selection.planning import SelectionStudy

FORMAT_VERSION = 1
MEASURES = ("top1", "agreement", "worst_class")


def summary(study: SelectionStudy, done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of selection.json.

    A draw is one observation: its seeds are averaged, and strategies are compared on the same draw. The comparison
    that was named in advance stands alone; the p-values of all others are corrected by Holm's method.

    Args:
        study: what was planned.
        done: what the cells left that are done.
    """
    measure = "agreement" if any(cell["top1"] is None for cell in done) else "top1"
    table, tests = [], []
    for setting in study.settings:
        for size in study.sizes:
            found = {
                strategy: _by_draw(
                    [c for c in done if (c["setting"], c["size"], c["strategy"]) == (setting, size, strategy)]
                )
                for strategy in study.strategies
            }
            table += [_row(setting, size, name, draws) for name, draws in found.items() if draws]
            base = found.get(study.baseline, {})
            tests += [
                _test(setting, size, name, draws, base, measure, (name, size) == study.named)
                for name, draws in found.items()
                if name != study.baseline and len(draws.keys() & base.keys()) > 1
            ]
    others = [t for t in tests if not t["named"] and t["p"] is not None]
    for test, p in zip(others, holm([t["p"] for t in others]), strict=True):
        test["p_holm"] = p
    recipe = study.recipe
    return {
        "format_version": FORMAT_VERSION, "command": study.command, "recipe": str(study.source),
        "overrides": list(study.overrides), "strategies": list(study.strategies), "sizes": list(study.sizes),
        "settings": list(study.settings), "draws": list(study.draws), "seeds": list(study.seeds),
        "baseline": study.baseline, "named": study.named, "shift": study.shift, "measure": measure,
        "pool": recipe.calibration.pool, "boundary": recipe.quant.boundary, "placement": recipe.quant.placement,
        "method": recipe.reconstruct.method, "iterations": recipe.reconstruct.iterations,
        "network_iterations": recipe.reconstruct.network.iterations, "done": len(done), "planned": len(study.cells),
        "images": done[0]["images"] if done else None, "float_top1": done[0]["float_top1"] if done else None,
        "table": table, "tests": tests, "cells": list(done),
    }  # fmt: skip


def _by_draw(cells: Sequence[dict[str, Any]]) -> dict[int, dict[str, float | None]]:
    """By draw: the mean over its seeds of each measure."""
    draws = sorted({c["draw"] for c in cells})
    return {d: {m: _mean([c[m] for c in cells if c["draw"] == d]) for m in MEASURES} for d in draws}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _row(setting: str, size: int, strategy: str, draws: dict[int, dict[str, float | None]]) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": setting, "size": size, "strategy": strategy}
    for measure in MEASURES:
        values = [v for d in draws.values() if (v := d[measure]) is not None]
        row[measure] = asdict(spread(values)) if values else None
    return row


def _test(
    setting: str, size: int, strategy: str, draws: dict[int, Any], base: dict[int, Any], measure: str, named: bool
) -> dict[str, Any]:
    shared = sorted(draws.keys() & base.keys())
    found = over_seeds([draws[d][measure] - base[d][measure] for d in shared])
    return {
        "setting": setting, "size": size, "strategy": strategy, "draws": len(shared), "named": named,
        "difference": found.difference.mean, "sd": found.difference.sd, "interval": found.interval, "p": found.p,
        "p_holm": None,
    }  # fmt: skip
