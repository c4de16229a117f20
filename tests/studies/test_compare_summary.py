"""Table, tests and page from cells made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from calibquant.studies.compare.cells import Cell, CellResult
from calibquant.studies.compare.markdown import markdown, score_table
from calibquant.studies.compare.planning import Study, make_study
from calibquant.studies.compare.summary import summary

LABELS = np.arange(10) % 2
FIELDS: dict[str, Any] = {"model": {"name": "digits_resnet"}, "data": {"kind": "digits"}, "runs": "r"}


def planned(**change: Any) -> Study:
    arguments: dict[str, Any] = {
        "recipe": FIELDS, "methods": ["nearest", "qdrop", "brecq"], "bits": ["w4a4", "w2a2"], "seeds": 3,
        "baseline": None, "overrides": [], "out": Path("o"), "jobs": 1,
    }  # fmt: skip
    return make_study(**arguments | change)


def result(cell: Cell, wrong: int, labels: np.ndarray = LABELS, **metrics: Any) -> CellResult:
    """A network that is wrong on the first images."""
    predictions = np.where(np.arange(len(labels)) < wrong, 9, labels).astype(np.int64)
    facts = {
        "quantized": {"agreement": 1 - wrong / 20, "count": len(labels)},
        "float": {"top1": 0.9},
        "size": {"weight_bits": 4.5, "file": 1000 + wrong},
        "units": [],
        "seconds": {"weights": 1.0, "evaluate_quantized": 2.0},
    }
    return CellResult(cell, cell.folder / "net-001", facts | metrics, predictions, labels)


def results(study: Study, wrong: dict[str, list[int]], **more: Any) -> list[CellResult]:
    """Cells whose methods are wrong on so many images, one number for each seed of each setting."""
    left = {method: list(numbers) for method, numbers in wrong.items()}
    return [result(cell, left[cell.method].pop(0), **more) for cell in study.cells if left[cell.method]]


WRONG = {"nearest": [5, 6, 7, 4, 4, 4], "qdrop": [2, 4, 3, 4, 5, 3], "brecq": [7, 9, 9, 3, 3, 3]}


def test_means_tests_and_verdicts_by_hand() -> None:
    study = planned()
    found = summary(study, results(study, WRONG))
    nearest = found["table"][0]
    assert nearest["top1"] == pytest.approx({"n": 3, "mean": 0.4, "sd": 0.1})
    assert nearest["agreement"] == pytest.approx({"n": 3, "mean": 0.7, "sd": 0.05})
    assert (nearest["bytes"], nearest["weight_bits"]) == (1006, 4.5)
    assert nearest["seconds"] == {"reconstruction": 0.0, "total": 3.0}
    assert found["float_top1"] == pytest.approx(0.9)
    qdrop, brecq, qdrop2, brecq2 = found["tests"]
    assert [t["verdict"] for t in found["tests"]] == ["better", "worse", "not shown", "not shown"]
    known = scipy.stats.ttest_rel([0.8, 0.6, 0.7], [0.5, 0.4, 0.3])
    assert (qdrop["difference"], qdrop["sd"]) == pytest.approx((0.3, 0.1))
    assert qdrop["p_seeds"] == pytest.approx(known.pvalue)
    assert qdrop["interval"] == pytest.approx(tuple(known.confidence_interval()))
    assert qdrop["mcnemar"] == [0.25, 0.5, 0.125]  # 3, 2 and 4 images to none
    # differences over the seeds: images 2..6 gain 1, 2, 3, 2, 1 and none loses, so only two of 2^5 flips go as far
    assert qdrop["p_images"] == pytest.approx(2 / 32)
    assert brecq["difference"] == pytest.approx(-0.7 / 3)
    assert (brecq2["interval"], brecq2["p_seeds"], brecq2["sd"]) == (None, None, pytest.approx(0))
    assert qdrop2["difference"] == pytest.approx(0)


def test_another_baseline_and_a_single_method() -> None:
    study = planned(baseline="brecq", bits=["w4a4"])
    found = summary(study, results(study, {name: wrong[:3] for name, wrong in WRONG.items()}))
    assert [(t["method"], t["baseline"], t["verdict"]) for t in found["tests"]] == [
        ("nearest", "brecq", "better"), ("qdrop", "brecq", "better"),
    ]  # fmt: skip
    alone = planned(methods=["nearest"], bits=["w4a4"])
    found = summary(alone, results(alone, {"nearest": [5, 6, 7]}))
    assert found["tests"] == []
    assert "McNemar" not in markdown(found)


def test_one_seed_has_no_spread_but_a_test_over_images() -> None:
    study = planned(seeds=1, bits=["w4a4"])
    found = summary(study, results(study, {"nearest": [5], "qdrop": [2], "brecq": [5]}))
    (qdrop, brecq) = found["tests"]
    assert (qdrop["sd"], qdrop["interval"], qdrop["p_seeds"], qdrop["verdict"]) == (None, None, None, "not shown")
    assert qdrop["mcnemar"] == [0.25]
    assert qdrop["p_images"] == pytest.approx(0.25)
    assert (brecq["difference"], brecq["p_images"]) == (0, 1)
    page = markdown(found)
    assert "| nearest | 50.00 (1) |" in page
    assert "| W4A4 | qdrop | +30.00 | – | – | – | 0.2500 | 0.2500 | not shown |" in page


def test_only_seeds_that_both_have_are_compared() -> None:
    study = planned()
    found = summary(study, results(study, {"nearest": [5, 6], "qdrop": [2], "brecq": []}))
    assert [(row["method"], row["seeds"]) for row in found["table"]] == [("nearest", 2), ("qdrop", 1)]
    assert [(t["method"], t["seeds"]) for t in found["tests"]] == [("qdrop", [1005])]
    assert (found["done"], found["planned"]) == (3, 18)
    assert score_table(found)[1] == [
        ["nearest", "45.00 ± 7.07 (2)", "–"], ["qdrop", "80.00 (1)", "–"], ["brecq", "–", "–"],
    ]  # fmt: skip
    assert "3 of 18 cells are done" in markdown(found)


def test_without_labels_agreement_takes_the_place() -> None:
    study = planned(bits=["w4a4"])
    cells = results(study, {name: wrong[:3] for name, wrong in WRONG.items()}, labels=np.full(10, -1))
    found = summary(study, [CellResult(c.cell, c.run, c.metrics | {"float": {"top1": None}}, c.predictions, c.labels)
                            for c in cells])  # fmt: skip
    assert (found["measure"], found["labelled"], found["float_top1"]) == ("agreement", 0, None)
    assert [row["top1"] for row in found["table"]] == [None] * 3
    test = found["tests"][0]
    assert (test["p_images"], test["mcnemar"]) == (None, None)
    assert test["difference"] == pytest.approx(0.15)
    assert test["verdict"] == "better"
    page = markdown(found)
    assert "| agreement % | W4A4 |" in page
    assert "| nearest | 70.00 ± 5.00 (3) |" in page
    assert "10 evaluation images; no labels." in page


def test_images_without_a_label_do_not_count() -> None:
    study = planned(bits=["w4a4"], seeds=1)
    labels = np.where(np.arange(10) < 4, -1, LABELS)
    found = summary(study, results(study, {"nearest": [6], "qdrop": [4], "brecq": [0]}, labels=labels))
    assert (found["images"], found["labelled"]) == (10, 6)
    assert [row["top1"]["mean"] for row in found["table"]] == pytest.approx([4 / 6, 1, 1])
    assert [test["mcnemar"] for test in found["tests"]] == [[0.5], [0.5]]


def test_the_page_tells_what_differs_between_methods() -> None:
    study = planned(methods=["nearest", "qdrop", "brecq-reference"], bits=["w2a2"], seeds=1)
    wrong = {"nearest": [5], "qdrop": [5], "brecq-reference": [5]}
    line = markdown(summary(study, results(study, wrong))).split("\n\n")[2]
    assert line == (
        "boundary qdrop (nearest, qdrop), brecq (brecq-reference); placement integer (nearest, qdrop), academic "
        "(brecq-reference); calibration images 1024; iterations none (nearest), 2000 (qdrop), 20000 (brecq-reference); "
        "seeds 1005; 10 evaluation images; float top-1 90.00 %."
    )
