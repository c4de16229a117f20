"""Running a network over data and measuring it."""

from calibquant.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
