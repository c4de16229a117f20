"""Quantization-aware training of a small network: what its loss is, what it moves, and that it helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import images, network
from torch import Tensor, nn

from calibquant.data import batches
from calibquant.graph import capture, fold_batch_norm, with_biases
from calibquant.numerics.distance import output_loss
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import AugmentRecipe, FinetuneRecipe, Preprocess, QuantRecipe
from calibquant.training import Distillation, Source, begin_finetuning, finished, fit, open_source

QUANT = QuantRecipe.model_validate({"weights": {"bits": 2}, "activations": {"bits": 2}, "boundary": "none"})
STREAM = (9, 0, 0)


def pictures() -> Tensor:
    return next(batches(images(), 50)).images


def quantized(quant: QuantRecipe = QUANT, factor: float = 1.0) -> QuantModel:
    """The small network at 2 bits, with weights of which every class is different.

    Values behind the first layer are `factor` times as large, and the last layer undoes that.
    """
    net = network().eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        nn.init.orthogonal_(net[-1].weight, 3.0 / factor)  # type: ignore[index, arg-type, union-attr]
        net[1].weight.mul_(factor)  # type: ignore[index, operator, union-attr]
        net[1].bias.mul_(factor)  # type: ignore[index, operator, union-attr]
    teacher = with_biases(fold_batch_norm(capture(net, pictures()[:2])))
    model = QuantModel(teacher, make_plan(teacher, quant))
    calibrate_weights(model, quant)
    calibrate_activations(model, quant.activations, [pictures()])
    return model


def settings(**fields: Any) -> FinetuneRecipe:
    usual = {"epochs": 6, "batch_size": 10, "precision": "float32", "lr": 0.02, "scale_lr": 0.02}
    return FinetuneRecipe.model_validate(usual | fields)


def source_of(train: FinetuneRecipe) -> Source:
    preprocess = Preprocess()
    return open_source(images(), AugmentRecipe(), preprocess, train.batch_size, 9, torch.device("cpu"), labelled=False)


def trained(train: FinetuneRecipe, model: QuantModel) -> tuple[QuantModel, list[float]]:
    training, source = begin_finetuning(model, train, pictures()), source_of(train)
    kept = fit(training, source, train, Distillation(model, train, pictures()))
    return finished(training, kept), [report.loss for report in training.reports]


WAYS: list[dict[str, Any]] = [
    {}, {"activations": "lsq+"}, {"activations": "pact"}, {"activations": "ulq", "weights": "arq"},
    {"activations": "fixed"}, {"optimizer": "sgd", "lr": 0.05, "scale_lr": 0.05},
    {"optimizer": "sgd", "activations": "pact", "weight_decay": 1e-3}, {"labels": 1.0, "distill": 0.0, "mixup": 0.2},
    {"features": 1.0, "labels": 0.5, "ema": 0.8}, {"freeze": 0.5, "clip": 1.0}, {"mixup": 1.0}, {"weights": "arq"},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_begins_where_calibration_ended_and_brings_the_network_closer(way: dict[str, Any]) -> None:
    model, x = quantized(), pictures()
    want, before = model.teacher(x), model(x)
    train = settings(**way)
    if train.weights == "lsq":
        begin_finetuning(model, train, pictures())
        with torch.no_grad():
            assert torch.equal(model(x), before)
        model.stop_learning()
        assert torch.equal(model(x), before)
    result, losses = trained(train, model)
    with torch.no_grad():
        got = result(x)
    assert losses[-1] < losses[0]
    if not train.labels:
        assert output_loss(got, want) < output_loss(before, want)
    assert all(q.rounding is None for q in result.weight_quantizers.values())
    assert all(q.ends is None and q.learned_scale is None for q in result.activation_quantizers.values())


def test_the_loss_is_the_sum_of_its_parts() -> None:
    model, x = quantized(), pictures()[:8]
    labels = torch.arange(8) % 3
    train = settings(labels=0.5, distill=2.0, temperature=3.0, features=0.7, label_smoothing=0.1)
    begin_finetuning(model, train, pictures())
    loss = Distillation(model, train, x)(x, labels, STREAM)
    with torch.no_grad():
        got, want = model(x), model.teacher(x)
        student, teacher = (F.softmax(v.double() / 3, 1) for v in (got, want))
        distance = 9 * (teacher * (teacher / student).log()).sum(1).mean()
        cross = F.cross_entropy(got.double(), labels, label_smoothing=0.1)
        seen = Distillation(model, train, x).student
        errors = [((a - b) ** 2).mean() / (b**2).mean() for a, b in zip(seen(x)[:-1], seen.wanted(x)[:-1], strict=True)]
    assert errors
    wanted = 2.0 * (distance + 0.7 * torch.stack(errors).mean()) + 0.5 * cross
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("activations", ["lsq", "ulq"])
def test_parts_of_a_batch_one_after_another_are_one_step(activations: str) -> None:
    found = []
    for count in (1, 5):
        model = quantized()
        train = settings(iterations=1, optimizer="sgd", accumulate=count, activations=activations, features=1.0)
        training = begin_finetuning(model, train, pictures())
        fit(training, source_of(train), train, Distillation(model, train, pictures()))
        found.append([p.detach().clone() for p in model.parameters()])
    whole, parts = found
    assert whole
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("optimizer", "alike"), [("adamw", True), ("sgd", False)])
def test_under_adamw_the_size_of_a_layer_does_not_matter(optimizer: str, alike: bool) -> None:
    """A network of ReLUs is the same with one layer times 4 and the next by 4; powers of two make no rounding."""
    x, train = pictures(), settings(optimizer=optimizer, activations="lsq", epochs=3)
    first, other = (trained(train, quantized(factor=factor))[0] for factor in (1.0, 4.0))
    with torch.no_grad():
        before, found, same = quantized()(x), first(x), other(x)
    assert not torch.allclose(before, found, atol=1e-2)
    assert torch.allclose(found, same, atol=1e-5) == alike


def test_frozen_scales_stay_while_weights_move() -> None:
    model = quantized()
    train = settings(epochs=4, freeze=0.5)
    training, source = begin_finetuning(model, train, pictures()), source_of(train)
    seen: list[tuple[Tensor, Tensor]] = []

    def save(_: object) -> None:
        latents = [q.rounding for q in model.weight_quantizers.values()]
        seen.append((torch.cat([v.learned_scale.detach().reshape(-1).clone() for v in latents]),  # type: ignore[union-attr]
                     torch.cat([v.weight.detach().reshape(-1).clone() for v in latents])))  # type: ignore[union-attr]  # fmt: skip

    fit(training, source, train, Distillation(model, train, pictures()), save=save)
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[1][0], seen[2][0])
    assert torch.equal(seen[2][0], seen[3][0])
    assert not torch.equal(seen[2][1], seen[3][1])


def test_iterations_end_a_training_within_an_epoch() -> None:
    model, train = quantized(), settings(iterations=7)
    training, source = begin_finetuning(model, train, pictures()), source_of(train)
    steps: list[int] = []
    objective = Distillation(model, train, pictures())
    fit(training, source, train, lambda x, y, s: (steps.append(1), objective(x, y, s))[1])  # type: ignore[func-returns-value]
    assert (source.steps, len(steps), len(training.reports)) == (5, 7, 2)


def test_biases_reach_the_artifact_as_corrections() -> None:
    model = quantized()
    result, _ = trained(settings(), model)
    deltas = [d.delta for d in result.bias_deltas.values()]
    assert len(deltas) == 2
    assert all(d is not None and d.abs().max() > 0 for d in deltas)
