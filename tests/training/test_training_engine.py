"""The engine against a plain loop of torch, its resume, and what it refuses."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import CPU, begin, images, network, settings
from torch import Tensor, nn

from calibquant.data import TensorImages, batches
from calibquant.errors import DataError, ModelError
from calibquant.recipe import AugmentRecipe, Preprocess, TrainRecipe
from calibquant.training import Classification, Source, Training, begin_training, fit, hold_out, open_source
from calibquant.training.engine import make_optimizer

HELD = images(40, seed=2)


def learn(training: Training, source: Source, train: TrainRecipe, *rest: Any, **named: Any) -> nn.Module:
    return fit(training, source, train, Classification(training.network, train), *rest, **named)


def accuracy(trained: nn.Module) -> float:
    """Top-1 on the images held out."""
    batch = next(batches(HELD, 40))
    with torch.no_grad():
        return float((trained(batch.images).argmax(1) == batch.labels).double().mean())


def bits(trained: nn.Module) -> dict[str, bytes]:
    return {key: value.contiguous().numpy().tobytes() for key, value in trained.state_dict().items()}


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    """A state after the way through a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)  # type: ignore[no-any-return]


class KilledError(Exception):
    """The process ends here."""


class Fragile(Source):
    """Images whose delivery ends with a kill at a given step."""

    kill_at = (0, 0)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for k, batch in enumerate(super().epoch(epoch)):
            if (epoch, k) == self.kill_at:
                raise KilledError
            yield batch


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_plain_training_is_torchs_plain_loop(optimizer: str) -> None:
    train = settings(
        optimizer=optimizer, mixup=0, ema=0, label_smoothing=0, clip=None, weight_decay=0.1, warm_up=0, epochs=3
    )
    training, source = begin(train, augment=AugmentRecipe())
    without_dropout(training.network)
    got = learn(training, source, train)
    want = without_dropout(network()).train()
    want[1].momentum = 10 / (3 * source.steps)  # type: ignore[index]  # so short a training needs fast statistics
    decayed = [want[0].weight, want[6].weight]  # type: ignore[index]
    others = [p for p in want.parameters() if not any(p is d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}]
    theirs = (
        torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
        if optimizer == "sgd"
        else torch.optim.AdamW(groups, lr=0.05)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 3 * source.steps)
    for epoch in range(3):
        for pixels, labels in source.epoch(epoch):
            theirs.zero_grad()
            F.cross_entropy(want(pixels), labels).backward()
            theirs.step()
            schedule.step()
    for key, value in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def without_dropout(module: nn.Module) -> nn.Module:
    module[3] = nn.Identity()  # type: ignore[index]
    return module


def test_all_parameters_are_trained_and_only_matrices_decay() -> None:
    groups = make_optimizer(network(), settings(weight_decay=0.3)).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(2, 0.3), (3, 0.0)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("held", [True, False])
def test_a_training_goes_on_after_any_epoch_with_the_same_bits(optimizer: str, held: bool) -> None:
    train, validate = settings(optimizer=optimizer, lr=0.02), accuracy if held else None
    training, source = begin(train)
    states: list[dict[str, Any]] = []
    want = bits(
        learn(
            training,
            source,
            train,
            validate,
            lambda t: states.append(reloaded(t.state())),
        )
    )
    assert len(states) == train.epochs
    for state in states:
        again, source = begin(train)
        again.restore(state)
        torch.rand(3)  # other uses of the global stream do not matter
        assert bits(learn(again, source, train, validate)) == want
        assert again.best_epoch == training.best_epoch
        assert [r.loss for r in again.reports] == [r.loss for r in training.reports]


@pytest.mark.parametrize("kill_at", [(1, 0), (2, 3), (4, 5)])
def test_a_kill_within_an_epoch_costs_that_epoch_only(kill_at: tuple[int, int]) -> None:
    train = settings()
    training, source = begin(train)
    want = bits(learn(training, source, train))
    saved: list[dict[str, Any]] = []
    killed, source = begin(train)
    fragile = Fragile(**vars(source))
    object.__setattr__(fragile, "kill_at", kill_at)
    with pytest.raises(KilledError):
        learn(
            killed,
            fragile,
            train,
            save=lambda t: saved.append(reloaded(t.state())),
        )
    assert len(saved) == kill_at[0]
    again, source = begin(train)
    again.restore(saved[-1])
    assert bits(learn(again, source, train)) == want


def test_the_best_epoch_on_held_out_images_is_kept() -> None:
    train = settings(epochs=4, ema=0)
    training, source = begin(train)
    seen: list[dict[str, bytes]] = []
    scores = iter([0.3, 0.8, 0.8, 0.5])

    def validate(candidate: nn.Module) -> float:
        seen.append(bits(candidate))
        return next(scores)

    kept = learn(training, source, train, validate)
    assert training.best_epoch == 3  # of equals the latest
    assert bits(kept) == seen[2]
    assert [report.accuracy for report in training.reports] == [0.3, 0.8, 0.8, 0.5]


def test_the_last_epoch_is_kept_where_that_is_asked_for() -> None:
    accuracies = iter([0.4, 0.7, 0.2])
    train = settings(epochs=3)
    training, source = begin(train)
    objective = Classification(training.network, train)
    kept = fit(training, source, train, objective, lambda network: next(accuracies), keep_best=False)
    assert (training.best, training.best_epoch) == (None, 3)
    assert [report.accuracy for report in training.reports] == [0.4, 0.7, 0.2]
    assert kept is training.candidate


def test_held_out_images_are_looked_at_every_n_epochs_and_at_the_end() -> None:
    train = settings(epochs=5, evaluate_every=2)
    training, source = begin(train)
    learn(training, source, train, lambda _: 0.5)
    assert [report.accuracy is not None for report in training.reports] == [False, True, False, True, True]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns_in_either_precision(precision: str) -> None:
    train = settings(precision=precision, epochs=12, mixup=0, ema=0.5)
    training, source = begin(train, augment=AugmentRecipe(flip=True))
    trained = learn(training, source, train)
    assert accuracy(trained) > 0.8
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert not trained.training
    assert all(p.is_contiguous() for p in trained.parameters())
    assert training.reports[-1].loss < training.reports[0].loss


def test_a_loss_that_diverges_names_epoch_and_step() -> None:
    train = settings(lr=1e12, clip=None, mixup=0, warm_up=0)
    training, source = begin(train)
    with pytest.raises(ModelError, match=r"training, epoch \d, step \d+: the loss is (nan|inf); train again with a lo"):
        learn(training, source, train)


def test_slow_batch_norm_statistics_settle_within_the_training() -> None:
    for steps, want in ((100, 0.1), (1000, 0.01), (10**6, 0.0003)):
        slow = nn.Sequential(nn.BatchNorm2d(3, momentum=0.0003))
        assert begin_training(slow, TrainRecipe(), steps, CPU).network[0].momentum == pytest.approx(want)  # type: ignore[index]
    assert begin_training(network(), TrainRecipe(), 10**6, CPU).network[1].momentum == 0.1  # type: ignore[index]


def test_every_epoch_has_another_order_and_full_batches() -> None:
    _, source = begin(settings(), augment=AugmentRecipe())
    seen = [torch.cat([pixels for pixels, _ in source.epoch(epoch)]) for epoch in (0, 1)]
    assert source.steps == 6
    assert [len(s) for s in seen] == [48, 48]
    assert not torch.equal(seen[0], seen[1])
    everything = {image.numpy().tobytes() for image in next(batches(images(), 50)).images}
    for epoch in seen:
        assert len({image.numpy().tobytes() for image in epoch} & everything) == 48


def test_what_does_not_fit_into_memory_gives_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    _, stored = begin(settings())
    monkeypatch.setattr("calibquant.training.source.IN_MEMORY", 0)
    _, streamed = begin(settings())
    assert stored.stored is not None
    assert streamed.stored is None
    for (a, x), (b, y) in zip(stored.epoch(3), streamed.epoch(3), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)


def test_held_out_images_are_a_random_share_and_never_trained_on() -> None:
    whole = images(50)
    learned, held = hold_out(whole, 0.2, seed=3)
    assert held is not None
    names = [{s.name(i) for i in range(len(s))} for s in (whole, learned, held)]
    assert len(names[2]) == 10
    assert names[1] | names[2] == names[0]
    assert not names[1] & names[2]
    other = hold_out(whole, 0.2, seed=4)[1]
    assert other is not None
    assert {other.name(i) for i in range(10)} != names[2]
    assert hold_out(whole, 0.0, seed=3) == (whole, None)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (1, [0], "training images: are 1; give at least 2"),
        (4, [0, 1, -1, 0], "tensor#2: has no label; train on images in class folders"),
        (4, None, "tensor#0: has no label"),
    ],
)
def test_images_that_cannot_train_are_refused(pixels: int, labels: list[int] | None, message: str) -> None:
    bad = TensorImages(torch.zeros(pixels, 3, 8, 8), labels)
    with pytest.raises(DataError, match=message):
        open_source(bad, AugmentRecipe(), Preprocess(), 8, 0, CPU)


def test_a_state_of_another_network_is_refused() -> None:
    training, _ = begin(settings())
    other = Training(nn.Linear(2, 2), None, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1))
    with pytest.raises(RuntimeError):
        training.restore(other.state())
