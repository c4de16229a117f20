"""Training of float networks."""

from calibquant.training.engine import EpochReport, Training, begin_training, fit
from calibquant.training.schedules import learning_rate
from calibquant.training.source import Source, hold_out, open_source

__all__ = ["EpochReport", "Source", "Training", "begin_training", "fit", "hold_out", "learning_rate", "open_source"]
