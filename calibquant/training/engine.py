"""Training of a network, float or quantized; it can stop after any epoch and go on with the same bits.

All randomness of a step comes from (seed, epoch, step), so that what a checkpoint holds is the state of the network, of
its average and of the optimizer, and how many epochs are done.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from calibquant import parallel
from calibquant.errors import ModelError, unknown
from calibquant.recipe import TrainRecipe
from calibquant.training.average import update_average
from calibquant.training.losses import Objective, Stream
from calibquant.training.schedules import learning_rate, steps_of
from calibquant.training.source import Source

SETTLED = 10  # times that a running average shrinks its start by e
CHECK = 20  # steps between looks at the loss, each of which waits for the device

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class EpochReport:
    """What an epoch did.

    Args:
        epoch: counted from 1.
        loss: mean training loss of its steps.
        lr: learning rate of its last step.
        accuracy: top-1 on the images held out, of the average where there is one; without labels, agreement with the
            float network; None where it was not measured.
        seconds: of the epoch.
    """

    epoch: int
    loss: float
    lr: float
    accuracy: float | None
    seconds: float


@dataclass(eq=False)
class Training:
    """A training on its way; `state` and `restore` are what a checkpoint holds.

    Args:
        network: is trained in place.
        average: the moving average of its weights, or None.
        optimizer: of the network's parameters.
        reports: of the epochs done.
        best: the state_dict of the best epoch on the images held out; None before any was measured, or if the last
            epoch is kept.
        best_epoch: its number; otherwise the last one's.
    """

    network: nn.Module
    average: nn.Module | None
    optimizer: torch.optim.Optimizer
    reports: list[EpochReport] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_epoch: int = 0

    @property
    def candidate(self) -> nn.Module:
        """The network that is kept if the training ends here."""
        return self.network if self.average is None else self.average

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and containers of them; not copied."""
        return {
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "reports": [asdict(report) for report in self.reports],
            "best": self.best,
            "best_epoch": self.best_epoch,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; the optimizer keeps its own settings.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: it was another network's, or another kind of training's.
        """
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        theirs = [{k for k in group if k != "params"} for group in state["optimizer"]["param_groups"]]
        if (self.average is None) != (state["average"] is None) or [set(group) for group in own] != theirs:
            raise RuntimeError("the state is of another optimizer, or has an average where this has none")
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, fields in zip(self.optimizer.param_groups, own, strict=True):
            group.update(fields)
        self.reports = [EpochReport(**row) for row in state["reports"]]
        self.best, self.best_epoch = state["best"], state["best_epoch"]


def begin_training(network: nn.Module, settings: TrainRecipe, steps: int, device: torch.device) -> Training:
    """A training of `network`, moved to the device in channels-last layout, before its first step.

    BatchNorm's running statistics forget at least as fast as to have no more than exp(-10) of their start in them after
    all `steps`; some networks come with a momentum for very long trainings.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, min(1.0, SETTLED / steps))
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(network).eval() if settings.ema else None
    return Training(network, average, make_optimizer(network, settings))


def make_optimizer(network: nn.Module, settings: TrainRecipe) -> torch.optim.Optimizer:
    """SGD or AdamW; weight decay is for parameters of two and more dimensions: no norm's and no bias."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return optimizer_of([
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ], settings)  # fmt: skip


def optimizer_of(groups: list[dict[str, Any]], settings: TrainRecipe) -> torch.optim.Optimizer:
    """The optimizer that the settings name, of groups of parameters."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999))
    if settings.optimizer != "sgd":
        raise unknown("train.optimizer", settings.optimizer, ("sgd", "adamw"))
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)


def fit(
    training: Training,
    source: Source,
    settings: TrainRecipe,
    objective: Objective,
    validate: Callable[[nn.Module], float] | None = None,
    save: Callable[[Training], None] | None = None,
    progress: Progress | None = None,
    keep_best: bool = True,
) -> nn.Module:
    """Train for the epochs, or steps, that are still to do.

    Args:
        training: from `begin_training`, perhaps restored.
        source: the images.
        settings: the recipe's `train` or `finetune`.
        objective: what is minimized, of the network that is trained.
        validate: accuracy of a network on images held out.
        save: called after each epoch.
        progress: called with the steps done, the steps in all and words.
        keep_best: whether the epoch with the best accuracy (of equals the latest) is kept, not the last.

    Returns:
        the network of the best epoch, or of the last without `validate` or `keep_best`, in eval mode and in torch's
        usual layout.

    Raises:
        ModelError: the loss is no finite number, or a label is no class of the network.
        DataError: an image cannot be read.
    """
    total = steps_of(settings, source.steps)
    epochs = math.ceil(total / source.steps)
    for epoch in range(len(training.reports), epochs):
        started = time.perf_counter()
        loss = _epoch(training, source, settings, objective, epoch, progress)
        parallel.align(training.candidate)
        accuracy = None
        if validate is not None and ((epoch + 1) % settings.evaluate_every == 0 or epoch + 1 == epochs):
            accuracy = validate(training.candidate.eval())
        lr = learning_rate(settings, min((epoch + 1) * source.steps, total) - 1, source.steps)
        _note_best(training, epoch + 1, accuracy if keep_best else None)
        training.reports.append(EpochReport(epoch + 1, loss, lr, accuracy, time.perf_counter() - started))
        if save is not None:
            save(training)
    kept = training.candidate
    if keep_best and training.best is not None:
        kept.load_state_dict(training.best)
    return kept.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def _note_best(training: Training, epoch: int, accuracy: float | None) -> None:
    earlier = [report.accuracy for report in training.reports if report.accuracy is not None]
    if accuracy is not None and accuracy >= max(earlier, default=0.0):
        training.best = {key: value.clone() for key, value in training.candidate.state_dict().items()}
        training.best_epoch = epoch
    elif training.best is None:
        training.best_epoch = epoch


def _epoch(
    training: Training,
    source: Source,
    settings: TrainRecipe,
    objective: Objective,
    epoch: int,
    progress: Progress | None,
) -> float:
    """One pass over the images, or what of it is left to do; the mean loss."""
    training.network.train()
    losses: list[Tensor] = []
    total = steps_of(settings, source.steps)
    steps = min(source.steps, total - epoch * source.steps)
    for k, (images, labels) in enumerate(islice(source.epoch(epoch), steps)):
        step = epoch * source.steps + k
        _set_rates(training.optimizer, learning_rate(settings, step, source.steps), step / total)
        losses.append(_step(training, images, labels, settings, objective, (source.seed, epoch, k)))
        if training.average is not None:
            update_average(training.average, training.network, settings.ema, step)
        if len(losses) % CHECK == 0 or len(losses) == steps:
            latest = _finite(losses, epoch)
            if progress is not None:
                words = f"epoch {epoch + 1} of {math.ceil(total / source.steps)}, loss {latest:.3f}"
                progress(step + 1, total, words)
    _finite(losses, epoch)
    return parallel.total(float(torch.stack(losses).double().mean())) / parallel.world()


def _step(
    training: Training, images: Tensor, labels: Tensor, settings: TrainRecipe, objective: Objective, stream: Stream
) -> Tensor:
    """One step of the optimizer; the loss, on the device."""
    training.optimizer.zero_grad()
    total, size = torch.zeros((), device=images.device), math.ceil(len(images) / settings.accumulate)
    for some, theirs in zip(images.split(size), labels.split(size), strict=True):
        loss = objective(some.contiguous(memory_format=torch.channels_last), theirs, stream)
        loss = loss * (len(some) / len(images))
        loss.backward()
        total += loss.detach()
    if settings.clip is not None:
        nn.utils.clip_grad_norm_(training.network.parameters(), settings.clip)
    training.optimizer.step()
    return total


def _set_rates(optimizer: torch.optim.Optimizer, lr: float, share: float) -> None:
    """The rates of a step, a share of all behind it: a group may have a `factor`, and stay from a share `until` on."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0) if share < group.get("until", 1.0) else 0.0


def _finite(losses: list[Tensor], epoch: int) -> float:
    """The latest loss; all of the last `CHECK` are checked."""
    recent = torch.stack(losses[-CHECK:]).tolist()
    for i, loss in enumerate(recent):
        if not math.isfinite(loss):
            step = len(losses) - len(recent) + i + 1
            mend = "train again with a lower train.lr, a longer train.warm_up or train.clip"
            raise ModelError(f"training, epoch {epoch + 1}, step {step}", f"the loss is {loss}", mend)
    return float(recent[-1])
