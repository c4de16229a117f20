"""Choosing calibration images: what is known of candidates, strategies, and judging a given set."""

from calibquant.recipe import parse_strategy
from calibquant.selection.judging import Judgement, LayerJudgement, Stretch, judge
from calibquant.selection.scoring import Pool, labelled_pool, score_pool
from calibquant.selection.strategies import STRATEGIES, Choice, Needs, needs_of, select

__all__ = [
    "STRATEGIES", "Choice", "Judgement", "LayerJudgement", "Needs", "Pool", "Stretch", "judge", "labelled_pool",
    "needs_of", "parse_strategy", "score_pool", "select",
]  # fmt: skip
