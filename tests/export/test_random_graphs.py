"""Random networks of all ops that have an integer form: deploy.onnx gives the integer executor's codes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from random_graphs import compare

SEEDS = range(1000, 1048)  # benchmarks/random_graphs.py compares others


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_network_gives_the_executor_s_codes(seed: int) -> None:
    """All of exact steps, within one of others, each step fed the runtime's own codes."""
    outcome = compare(seed)
    assert outcome.exact > 0
    assert (outcome.differing, outcome.beyond) == (0, []), (outcome.kinds, outcome.recipe)
