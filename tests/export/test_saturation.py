"""deploy.onnx is exact on every processor: also on those whose kernels add two products in 16 bits.

The executor computes as such a kernel does; that mode is compared with a sum written out pair by pair, and with ONNX
Runtime's own kernels on processors that have them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
import torch
from networks import NETWORKS, folded, quantized
from onnx_cases import session_of
from torch import Tensor, nn

from calibquant.export import kernels
from calibquant.export.audit import saturating_steps, summarize
from calibquant.export.executor import execute
from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import Storage, deploy_onnx
from calibquant.export.onnx_files import with_outputs
from calibquant.export.processor import runtime_saturates
from calibquant.export.program import Program
from calibquant.graph import capture, fold_batch_norm
from calibquant.quantization import QuantModel
from calibquant.recipe import ActivationRecipe, QuantRecipe, WeightRecipe

MINMAX = ActivationRecipe(bits=8, observer="minmax")


class Heavy(nn.Module):
    """Positive weights of equal size, so that at full reach nearly every pair of products saturates."""

    def __init__(self, channels: int = 7) -> None:
        super().__init__()
        c = channels
        self.a = nn.Conv2d(3, c, 3, padding=1, stride=2)
        self.b = nn.Conv2d(c, 2 * c, 3, padding=1)
        self.depthwise = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.grouped = nn.Conv2d(2 * c, 2 * c, 1, groups=2)
        self.row = nn.Conv1d(2 * c, c, 3, padding=1)
        self.fc = nn.Linear(c, 5)
        for parameter in self.parameters():
            parameter.data.abs_()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.b(torch.relu(self.a(x))))))
        x = torch.relu(self.grouped(x) + x)
        return self.fc(torch.relu(self.row(x.mean(2))).mean(2))


def heavy(reach: str, **weights: object) -> tuple[QuantModel, Tensor]:
    torch.manual_seed(3)
    images = 3 * torch.randn(8, 3, 13, 11)
    settings = WeightRecipe(**{"bits": 8, "observer": "minmax", "reach": reach, **weights})  # type: ignore[arg-type]
    recipe = QuantRecipe(boundary="none", weights=settings, activations=MINMAX)
    graph = fold_batch_norm(capture(Heavy().eval(), images[:2]))
    return quantized(graph, recipe, images), images


def adversarial(program: Program, shape: torch.Size) -> Tensor:
    """The largest and the smallest codes, alone and side by side."""
    grid = next(grid for grid in program.grids.values() if grid is not None)
    low, high = ((code - grid.zero_point) * float(grid.scale) for code in (grid.low, grid.high))
    ends = torch.tensor([low, high])
    picked = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0))
    picked[0], picked[1] = 0, 1
    return ends[picked]


def codes_equal(program: Program, images: Tensor) -> None:
    """The saturating kernel gives every code that the exact one gives."""
    exact = execute(program, images.numpy(), keep=True)
    paired = execute(program, images.numpy(), keep=True, saturating=True)
    for name, value in exact.values.items():
        np.testing.assert_array_equal(paired.values[name], value, err_msg=name)


def written_out(codes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Sums of one row of codes as vpmaddubsw and vpmaddwd take them, in plain integers."""
    sums = np.zeros(len(weight), np.int64)
    padded = [*codes.astype(int), 0]
    for o, row in enumerate(weight.astype(int)):
        extended = [*row, 0]
        pairs = [(i, i + 1) for i, _ in pairwise(range(len(padded))) if i % 2 == 0]
        for i, j in pairs:
            sums[o] += min(max(padded[i] * extended[i] + padded[j] * extended[j], -32768), 32767)
    return sums


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_what_pairs_lose_is_what_plain_integers_lose(width: int) -> None:
    generator = np.random.default_rng(width)
    weight = generator.choice([-128, -127, -64, 0, 64, 127], (6, width)).astype(np.int8)
    codes = generator.choice([0, 3, 128, 254, 255], (20, width)).astype(np.uint8)
    exact = codes.astype(int) @ weight.astype(int).T
    want = np.stack([written_out(row, weight) for row in codes])
    np.testing.assert_array_equal(exact - kernels.lost_in_pairs(codes, weight), want)


def test_pairs_of_a_convolution_are_channels_of_one_position() -> None:
    """Odd numbers of channels, groups, padding with a zero point, stride and dilation."""
    generator = np.random.default_rng(1)
    codes = generator.choice([0, 250, 255], (2, 6, 7, 5)).astype(np.uint8)
    weight = generator.choice([-127, 90, 127], (4, 3, 3, 2)).astype(np.int8)
    settings = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    lost = kernels.lost_in_convolution(codes, weight, np.uint8(9), groups=2, **settings)
    padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (2, 2)), constant_values=9)
    for n, o, y, x in np.ndindex(lost.shape):
        group = slice(3 * (o // 2), 3 * (o // 2) + 3)
        window = padded[n, group, 2 * y : 2 * y + 3, x : x + 3 : 2].transpose(1, 2, 0).reshape(-1)
        row = weight[o].transpose(1, 2, 0).reshape(1, -1)
        assert lost[n, o, y, x] == window.astype(int) @ row[0].astype(int) - written_out(window, row)[0]


def test_full_reach_saturates_and_automatic_reach_does_not() -> None:
    full, images = heavy("full")
    wide, narrow = make_program(full), make_program(heavy("auto")[0])
    different = {
        name
        for name, value in execute(wide, images.numpy(), keep=True).values.items()
        if (execute(wide, images.numpy(), keep=True, saturating=True).values[name] != value).any()
    }
    assert {"relu", "relu_1"} <= different
    assert saturating_steps(wide) == ["relu", "relu_1", "grouped", "relu_4", "fc"]
    assert saturating_steps(narrow) == []
    codes_equal(narrow, images)
    codes_equal(narrow, adversarial(narrow, images.shape))
    pairs = {row.step: row.pairs for row in summarize(narrow)}
    assert pairs["relu_2"] == "single", "depthwise kernels add no pairs, and keep 8 bits"
    assert set(pairs.values()) == {"single", "fit"}
    assert {row.pairs for row in summarize(wide)} == {"single", "saturate"}


def test_bits_by_layer() -> None:
    """Dense layers get the 7 bits that fit, the depthwise one keeps its 8."""
    model, _ = heavy("auto")
    bits = {name: q.plan.grid.bits for name, q in model.weight_quantizers.items()}
    assert bits.pop("depthwise.weight") == 8
    assert set(bits.values()) == {7}
    assert {q.plan.reach for q in model.weight_quantizers.values()} == {64, None}


@pytest.mark.parametrize("storage", ["packed", "int8"])
@pytest.mark.parametrize(
    "weights",
    [
        {"grid": "apot", "bits": 6},
        {"grid": "codebook", "bits": 4},
        {"grid": "nuq", "bits": 8},
        {"bits": 7, "allocation": "optimal"},
    ],
    ids=["apot", "codebook", "nuq", "channels"],
)
def test_what_passes_the_reach_all_the_same_is_stored_as_uint8(weights: dict[str, object], storage: Storage) -> None:
    model, images = heavy("auto", **weights)
    program = make_program(model)
    wide = {row.step for row in summarize(program) if row.pairs == "uint8"}
    assert wide, "the case is none"
    assert saturating_steps(program) == []
    codes_equal(program, adversarial(program, images.shape))
    data = deploy_onnx(program, images[:1], storage)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    assert_runs(program, data, images)
    for step in wide:
        assert any(step in note and "uint8" in note for note in program.notes)


def assert_runs(program: Program, data: bytes, images: Tensor) -> None:
    """ONNX Runtime gives the executor's codes, whatever the processor."""
    names = [step.output for step in program.steps if step.grid is not None]
    session = session_of(with_outputs(data, names))
    values = dict(zip((o.name for o in session.get_outputs()), session.run(None, {"x": images.numpy()}), strict=True))
    done = execute(program, images.numpy(), keep=True, given={name: values[name] for name in names})
    for name in names:
        if name not in done.approximate:
            np.testing.assert_array_equal(values[name], done.values[name], err_msg=name)


def test_runtime_gives_the_codes_of_the_mode_it_computes_in() -> None:
    """At full reach, on a processor with either kind of kernel."""
    model, images = heavy("full")
    program = make_program(model)
    names = [step.output for step in program.steps if step.grid is not None]
    session = session_of(with_outputs(deploy_onnx(program, images[:1]), names))
    values = dict(zip((o.name for o in session.get_outputs()), session.run(None, {"x": images.numpy()}), strict=True))
    own = {name: values[name] for name in names}
    done = execute(program, images.numpy(), keep=True, given=own, saturating=runtime_saturates())
    for name in names:
        if name not in done.approximate:
            np.testing.assert_array_equal(values[name], done.values[name], err_msg=name)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_is_the_same_on_both_kinds_of_kernels(name: str, bits: int) -> None:
    """Random inputs, and those that make sums of pairs largest."""
    images = NETWORKS[name].example(4, seed=5)
    recipe = QuantRecipe(
        weights=WeightRecipe(bits=bits, observer="minmax"), activations=ActivationRecipe(bits=bits, observer="minmax")
    )
    program = make_program(quantized(folded(name), recipe, images))
    assert saturating_steps(program) == []
    codes_equal(program, images)
    if images.is_floating_point():
        codes_equal(program, adversarial(program, images.shape))


def test_a_run_of_an_earlier_version_is_exact_too() -> None:
    """Its weights have 8 bits everywhere: the file stores them as uint8, and the codes stay those of the run."""
    model, images = heavy("full")
    old = QuantModel(model.teacher, replace(model.plan, reach="auto"), shared=model)
    program = make_program(old)
    assert {row.pairs for row in summarize(program)} == {"single", "uint8"}
    exact = execute(make_program(model), images.numpy(), keep=True)
    same = execute(program, images.numpy(), keep=True, saturating=True)
    for name, value in exact.values.items():
        np.testing.assert_array_equal(same.values[name], value)
    assert_runs(program, deploy_onnx(program, images[:1]), images)
