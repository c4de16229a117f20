"""Evaluating networks over image sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibquant.data import TensorImages, open_images
from calibquant.errors import DataError, ModelError
from calibquant.evaluation import evaluate
from calibquant.metrics import score
from calibquant.recipe import DataRecipe, Preprocess


def make_images(count: int = 20, labelled: bool = True) -> tuple[TensorImages, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(count, 3, 4, 4, generator=generator)
    labels = torch.randint(0, 7, (count,), generator=generator).tolist()
    return TensorImages(tensor, labels if labelled else None), tensor


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 7)).eval()


@pytest.mark.parametrize("batch_size", [1, 6, 20, 100])
def test_scores_are_those_of_all_logits_at_once(batch_size: int) -> None:
    images, tensor = make_images()
    model = network()
    got = evaluate(model, images, batch_size, keep_logits=True)
    with torch.no_grad():
        logits = torch.cat([model(part) for part in tensor.split(batch_size)])
    assert got.logits is not None
    assert torch.equal(got.logits, logits)
    assert not got.logits.is_inference()
    assert got.scores == score(logits, images.labels())
    assert got.predictions.dtype == np.int64
    assert got.predictions.tolist() == logits.argmax(1).tolist()
    assert got.indices == tuple(range(20))
    assert got.labels.tolist() == images.labels().tolist()
    assert got.confusion.sum(axis=1).tolist() == [got.labels.tolist().count(i) for i in range(7)]
    assert got.confusion.trace() == (got.predictions == got.labels).sum()


@pytest.mark.parametrize(("count", "expected"), [(None, 20), (1, 1), (13, 13), (500, 20)])
def test_count_takes_the_first_images(count: int | None, expected: int) -> None:
    images, _ = make_images()
    whole = evaluate(network(), images, 6)
    got = evaluate(network(), images, 6, count=count)
    assert got.scores.count == expected
    assert got.predictions.tolist() == whole.predictions[:expected].tolist()
    assert got.logits is None


def test_agreement_with_a_reference() -> None:
    images, _ = make_images(labelled=False)
    first = evaluate(network(), images, 6)
    other = first.predictions.copy()
    other[:5] = (other[:5] + 1) % 7
    got = evaluate(network(), images, 7, reference=other)
    assert got.scores.agreement == pytest.approx(15 / 20)
    assert got.scores.top1 is None
    with pytest.raises(DataError, match="reference: holds 20 predictions for 10 images"):
        evaluate(network(), images, 7, count=10, reference=other)


def test_progress_counts_images() -> None:
    seen: list[tuple[int, int]] = []
    evaluate(network(), make_images()[0], 8, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8, 20), (16, 20), (20, 20)]


def test_the_network_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 7))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.eval()
    model[0].train()
    evaluate(model, make_images()[0], 8)
    assert [m.training for m in model] == [True, False, False]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_gradients_are_off() -> None:
    def function(x: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        return x.mean(dim=(2, 3))

    evaluate(function, make_images(labelled=False)[0], 8)


def test_half_precision_logits_are_taken() -> None:
    got = evaluate(lambda x: x.mean(dim=(2, 3)).bfloat16(), make_images(labelled=False)[0], 8, keep_logits=True)
    assert got.logits is not None
    assert got.logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, r"is float32 of shape \(8, 3, 4, 4\); it must return .* \(8, classes\)"),
        (lambda x: x.sum(), r"is float32 of shape \(\)"),
        (lambda x: x.mean(dim=(2, 3))[:5], r"is float32 of shape \(5, 3\)"),
        (lambda x: x.flatten(1).long(), r"is int64 of shape \(8, 48\)"),
        (lambda x: x.flatten(1)[:, :0], r"is float32 of shape \(8, 0\)"),
        (lambda x: (x, x), "is a tuple, not a tensor"),
        (lambda x: {"out": x}, "is a dict, not a tensor"),
        (lambda x: None, "is a NoneType, not a tensor"),
    ],
)
def test_outputs_that_are_no_logits_are_named(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"network output: {message}"):
        evaluate(function, make_images()[0], 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_the_first_image(value: float) -> None:
    images, tensor = make_images(labelled=False)
    marks = {tensor[13, 0, 0, 0].item(), tensor[14, 0, 0, 0].item()}

    def function(x: Tensor) -> Tensor:
        logits = x.mean(dim=(2, 3)).clone()
        logits[[float(v) in marks for v in x[:, 0, 0, 0]], 1] = value
        return logits

    with pytest.raises(ModelError, match="network output: holds NaN or infinity for tensor#13"):
        evaluate(function, images, 8)


def test_labels_beyond_the_classes_are_refused() -> None:
    images = TensorImages(torch.zeros(3, 3, 4, 4), [0, 2, 7])
    with pytest.raises(DataError, match=r"tensor#2: label 7 is outside 0..6"):
        evaluate(network(), images, 1)
    assert evaluate(network(), images, 1, count=2).scores.count == 2


@pytest.mark.parametrize("count", [None, 0])
def test_nothing_to_evaluate_is_an_error(count: int | None) -> None:
    images = TensorImages(torch.zeros(0 if count is None else 2, 3, 4, 4))
    with pytest.raises(DataError, match="there are no images to evaluate on"):
        evaluate(network(), images, 4, count=count)


def test_skipped_images_are_missing_from_the_result(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "val").mkdir()
    for name in "abcd":
        Image.new("RGB", (4, 4), (ord(name), 0, 0)).save(tmp_path / "val" / f"{name}.png")
    for name in "bd":
        (tmp_path / "val" / f"{name}.png").write_bytes(b"")
    images = open_images(DataRecipe(kind="folder", root=tmp_path, on_error="skip"), "evaluation")
    seen: list[tuple[int, int]] = []
    got = evaluate(network(), images, 1, progress=lambda done, total: seen.append((done, total)))
    assert got.indices == (0, 2)
    assert len(got.predictions) == 2
    assert seen == [(1, 4), (3, 4), (4, 4)]


def test_digits_from_end_to_end() -> None:
    settings = Preprocess(mean=(0.0,), std=(1.0,))
    train = open_images(DataRecipe(kind="digits", preprocess=settings), "calibration")
    test = open_images(DataRecipe(kind="digits", preprocess=settings), "evaluation")
    stacked = torch.stack([train.image(i).flatten() for i in range(len(train))])
    centres = torch.stack([stacked[torch.from_numpy(train.labels()) == c].mean(0) for c in range(10)])
    got = evaluate(lambda x: -torch.cdist(x.flatten(1), centres), test, 100)
    assert got.scores.top1 is not None
    assert got.scores.top1 > 0.85  # nearest class mean; shuffled labels would give 0.1
