"""Training of float networks, and of quantized ones."""

from calibquant.training.engine import EpochReport, Training, begin_training, fit
from calibquant.training.finetuning import Distillation, begin_finetuning, finished
from calibquant.training.losses import Classification
from calibquant.training.schedules import learning_rate, steps_of
from calibquant.training.source import Source, check_training_images, hold_out, open_source

__all__ = [
    "Classification", "Distillation", "EpochReport", "Source", "Training", "begin_finetuning", "begin_training",
    "check_training_images", "finished", "fit", "hold_out", "learning_rate", "open_source", "steps_of",
]  # fmt: skip
