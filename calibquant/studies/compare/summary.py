"""What the cells of a comparison say: the content of compare.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from calibquant.metrics import mcnemar
from calibquant.studies.compare.cells import Cell, CellResult
from calibquant.studies.compare.planning import Study
from calibquant.studies.paired import over_images, over_seeds, spread

FORMAT_VERSION = 1


def summary(study: Study, results: Sequence[CellResult]) -> dict[str, Any]:
    """The content of compare.json.

    Args:
        study: what was planned.
        results: of the cells done, at least one, in the order of the study.

    Returns:
        what was compared, `cells`, `table` (mean ± sd) and `tests` against the baseline; shares are fractions of 1.
    """
    first = results[0]
    measure = "agreement" if first.top1 is None else "top1"
    return {
        "format_version": FORMAT_VERSION,
        "command": study.command,
        "recipe": str(study.recipe),
        "overrides": list(study.overrides),
        "methods": {cell.method: _facts(cell) for cell in study.cells},
        "settings": list(study.settings),
        "seeds": list(study.seeds),
        "baseline": study.baseline,
        "measure": measure,
        "images": len(first.labels),
        "labelled": len(first.correct),
        "float_top1": _mean(r.metrics["float"]["top1"] for r in results),
        "done": len(results),
        "planned": len(study.cells),
        "cells": [_cell(study, result) for result in results],
        "table": [_row(group) for group in _groups(study, results)],
        "tests": [_test(group, base, measure) for group, base in _pairs(study, results)],
    }


def _facts(cell: Cell) -> dict[str, Any]:
    """What has to be stated with a method's results."""
    recipe, count = cell.recipe, cell.recipe.calibration.count
    if cell.foreign:
        facts = {"reconstruction": "none", "iterations": None, "boundary": "none", "placement": "the tool's own"}
        return facts | {"calibration_count": count}
    method = recipe.reconstruct.method
    return {
        "reconstruction": method,
        "iterations": None if method == "none" else recipe.reconstruct.iterations,
        "boundary": recipe.quant.boundary,
        "placement": recipe.quant.placement,
        "calibration_count": count,
    }


def _cell(study: Study, result: CellResult) -> dict[str, Any]:
    metrics = result.metrics
    return {
        "method": result.cell.method,
        "setting": result.cell.setting,
        "seed": result.cell.seed,
        "run": result.run.relative_to(study.out).as_posix(),
        "top1": result.top1,
        "agreement": result.agreement,
        "weight_bits": metrics["size"]["weight_bits"],
        "bytes": metrics["size"]["file"],
        "seconds": _seconds(metrics),
        "units": len(metrics["units"]),
        "rolled_back": _rolled_back(metrics),
    }


def _rolled_back(metrics: dict[str, Any]) -> int:
    return sum(not unit["kept"] for unit in metrics["units"])


def _seconds(metrics: dict[str, Any]) -> dict[str, float]:
    """Seconds of reconstruction and in all."""
    stages = metrics["seconds"]
    return {"reconstruction": stages.get("reconstruct", 0.0), "total": round(sum(stages.values()), 3)}


def _groups(study: Study, results: Sequence[CellResult]) -> list[list[CellResult]]:
    """The results of each setting and method, in the order of the seeds; none is empty."""
    keys = [(setting, method) for setting in study.settings for method in study.methods]
    groups = ([r for r in results if (r.cell.setting, r.cell.method) == key] for key in keys)
    return [group for group in groups if group]


def _row(group: Sequence[CellResult]) -> dict[str, Any]:
    """Mean and spread of a method at a setting."""
    top1 = [r.top1 for r in group if r.top1 is not None]
    seconds = [_seconds(r.metrics) for r in group]
    return {
        "setting": group[0].cell.setting,
        "method": group[0].cell.method,
        "seeds": len(group),
        "top1": asdict(spread(top1)) if top1 else None,
        "agreement": asdict(spread([r.agreement for r in group])),
        "weight_bits": group[0].metrics["size"]["weight_bits"],
        "bytes": round(sum(r.metrics["size"]["file"] for r in group) / len(group)),
        "seconds": {name: _mean(s[name] for s in seconds) for name in ("reconstruction", "total")},
        "units": len(group[0].metrics["units"]),
        "rolled_back": _mean(_rolled_back(r.metrics) for r in group),
    }


def _pairs(study: Study, results: Sequence[CellResult]) -> list[tuple[list[CellResult], list[CellResult]]]:
    """For each setting and method but the baseline: its results and the baseline's, of the seeds that both have."""
    pairs = []
    groups = {(g[0].cell.setting, g[0].cell.method): g for g in _groups(study, results)}
    for (setting, method), group in groups.items():
        base = {r.cell.seed: r for r in groups.get((setting, study.baseline), [])}
        shared = [r for r in group if r.cell.seed in base]
        if method != study.baseline and shared:
            pairs.append((shared, [base[r.cell.seed] for r in shared]))
    return pairs


def _test(group: Sequence[CellResult], base: Sequence[CellResult], measure: str) -> dict[str, Any]:
    """How a method differs from the baseline."""
    labelled = measure == "top1"
    differences = [getattr(a, measure) - getattr(b, measure) for a, b in zip(group, base, strict=True)]
    seeds = over_seeds(differences)
    return {
        "setting": group[0].cell.setting,
        "method": group[0].cell.method,
        "baseline": base[0].cell.method,
        "seeds": [r.cell.seed for r in group],
        "difference": seeds.difference.mean,
        "sd": seeds.difference.sd,
        "interval": None if seeds.interval is None else list(seeds.interval),
        "p_seeds": seeds.p,
        "p_images": over_images(_advantage(group) - _advantage(base)) if labelled else None,
        "mcnemar": [mcnemar(a.correct, b.correct) for a, b in zip(group, base, strict=True)] if labelled else None,
        "verdict": seeds.verdict,
    }


def _advantage(group: Sequence[CellResult]) -> Any:
    """For each labelled image, how many seeds classified it correctly, int64."""
    return np.sum([r.correct for r in group], axis=0, dtype=np.int64)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return spread(known).mean if known else None
