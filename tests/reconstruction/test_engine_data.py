"""What a unit learns from, how batches are drawn, and learned zero points."""

from __future__ import annotations

import pytest
import torch
from test_engine import METHODS, assert_at_rest, block, learn, same, short, state

from calibquant.reconstruction import engine


@pytest.mark.parametrize("method", METHODS)
def test_the_images_held_out_do_not_teach(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other values in the judging rows change the verdict (which is ignored here), not what is learned."""
    monkeypatch.setattr(engine, "restore_state", lambda *_: None)
    results = []
    for spoil in (0.0, 1.0):
        part, data = block()
        data.quantized[::8] += spoil
        data.float_input[::8] -= spoil
        learn("unit", part, data, short(method=method), 0)
        results.append(state(part))
    part, _ = block()
    assert not same(results[0], state(part)), "something was learned"
    assert same(results[0], results[1])


@pytest.mark.parametrize(
    ("method", "drop", "reads"), [("adaround", 0.5, False), ("qdrop", 0.0, False), ("qdrop", 0.5, True)]
)
def test_only_drop_reads_the_float_input(method: str, drop: float, reads: bool) -> None:
    results = []
    for shift in (0.0, 1.0):
        part, data = block()
        data.float_input.add_(shift)
        learn("unit", part, data, short(method=method, drop=drop, never_worse=False), 0)
        results.append(state(part))
    assert same(*results) != reads


@pytest.mark.parametrize(("count", "size"), [(56, 8), (100, 32), (30, 64), (7, 7)])
def test_without_replacement_an_epoch_shows_no_image_twice(count: int, size: int) -> None:
    """And every image once, where the batch size divides their number; epochs differ."""
    recipe = short(batch_size=size, iterations=3 * max(1, count // size))
    torch.manual_seed(0)
    rows = list(engine._batches(count, recipe, recipe.iterations))
    size = min(size, count)
    assert [len(r) for r in rows] == [size] * recipe.iterations
    steps = count // size
    epochs = [torch.cat(rows[i : i + steps]) for i in range(0, len(rows), steps)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == steps * size
        assert set(epoch.tolist()) <= set(range(count))
    if count % size == 0:
        assert all(sorted(e.tolist()) == list(range(count)) for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_with_replacement_every_step_draws_independently() -> None:
    """As torch.randint does; within 40 batches of 16 out of 20, some image comes twice in one batch."""
    recipe = short(batch_size=16, iterations=40, sampling="with_replacement")
    torch.manual_seed(4)
    rows = list(engine._batches(20, recipe, recipe.iterations))
    torch.manual_seed(4)
    assert all(torch.equal(r, torch.randint(0, 20, (16,))) for r in rows)
    assert any(len(set(r.tolist())) < 16 for r in rows)
    assert set(torch.cat(rows).tolist()) == set(range(20))


# --- LSQ+ and sampling ------------------------------------------------------------------------------------------------


def test_learned_zero_points_stay_on_the_grid_and_help() -> None:
    """LSQ+: the loss on a range whose zero point is wrong falls further than with the scale alone."""
    losses = {}
    for rate in (0.0, 0.05):
        part, data = block(128)
        for quantizer in part.activation_quantizers.values():
            quantizer.zero_point = torch.tensor(1, dtype=torch.int32)  # after ReLU one of four codes is wasted
        report = learn("unit", part, data, short(iterations=150, zero_point_lr=rate, never_worse=False), 0)
        losses[rate] = report.loss_after
        for quantizer in part.activation_quantizers.values():
            assert quantizer.zero_point.dtype == torch.int32
            assert 0 <= int(quantizer.zero_point) <= 3
            assert rate > 0 or int(quantizer.zero_point) == 1
        assert_at_rest(part)
    assert losses[0.05] < losses[0.0]


def test_within_batch_draws_anew_for_every_step_without_repeating_an_image() -> None:
    torch.manual_seed(0)
    recipe = short(sampling="within_batch", iterations=40, batch_size=16)
    rows = list(engine._batches(20, recipe, 40))
    assert all(len(set(r.tolist())) == 16 for r in rows)
    assert len({tuple(sorted(r.tolist())) for r in rows}) > 30
