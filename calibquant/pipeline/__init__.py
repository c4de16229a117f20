"""The pipeline: the order of the stages, from a recipe to a run folder."""

from calibquant.pipeline.choosing import Judged, judge, select
from calibquant.pipeline.dry_run import DryRun, dry_run
from calibquant.pipeline.measuring import evaluate_float, evaluate_run, run_recipe
from calibquant.pipeline.preparing import Prepared, prepare
from calibquant.pipeline.quantizing import Run, finetune, quantize, resume
from calibquant.pipeline.reporting import Reporter
from calibquant.pipeline.training import TrainedRun, resume_training, train

__all__ = [
    "DryRun", "Judged", "Prepared", "Reporter", "Run", "TrainedRun", "dry_run", "evaluate_float", "evaluate_run",
    "finetune", "judge", "prepare", "quantize", "resume", "resume_training", "run_recipe", "select", "train",
]  # fmt: skip
