"""RegNetX, MNASNet, MobileNetV1 and the small ResNets: keys and sizes by other means, capture and quantization."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from author_networks import randomize
from torch import Tensor, nn

import calibquant
from calibquant import zoo
from calibquant.graph import fold_batch_norm
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import QuantRecipe

Shapes = dict[str, tuple[int, ...]]


def shapes(name: str, **options: Any) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in zoo.build(name, **options).state_dict().items()}


def parameters(name: str, **options: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in zoo.build(name, **options).parameters())


# Depth, w_a, w_0, w_m and group width of pycls' and torchvision's configurations; parameters in timm's table, millions.
REGNETS = {
    "regnet_x_200mf": (13, 36.44, 24, 2.49, 8, 2.68),
    "regnet_x_400mf": (22, 24.48, 24, 2.54, 16, 5.16),
    "regnet_x_600mf": (16, 36.97, 48, 2.24, 24, 6.20),
    "regnet_x_800mf": (16, 35.73, 56, 2.28, 16, 7.26),
    "regnet_x_1_6gf": (18, 34.01, 80, 2.25, 24, 9.19),
    "regnet_x_3_2gf": (25, 26.31, 88, 2.25, 48, 15.30),
}


@pytest.mark.parametrize("name", REGNETS)
def test_regnet_stages_follow_the_papers_rule(name: str) -> None:
    """Equations 2 to 4: a line, its nearest power of w_m, multiples of 8; then of the group width, halves to even."""
    depth, slope, initial, multiplier, group, millions = REGNETS[name]
    line = initial + slope * np.arange(depth)
    powers = np.round(np.log(line / initial) / np.log(multiplier))
    widths = np.round(initial * multiplier**powers / 8) * 8
    widths = np.round(widths / group) * group
    options = {"widths": "pycls"} if name == "regnet_x_400mf" else {}
    found = shapes(name, **options)
    blocks = {re.match(r"(trunk_output\.block\d\.block\d-\d+)\.", key) for key in found}
    names = sorted({m[1] for m in blocks if m}, key=lambda key: [int(n) for n in re.findall(r"\d+", key)])
    assert [found[f"{block}.f.c.0.weight"][0] for block in names] == widths.astype(int).tolist()
    assert all(found[f"{block}.f.b.0.weight"][1] == group for block in names)
    assert round(parameters(name, **options) / 1e6, 2) == pytest.approx(millions)


def test_regnet_keys_are_torchvisions() -> None:
    found = shapes("regnet_x_600mf")
    expected = {
        "stem.0.weight": (32, 3, 3, 3), "stem.1.running_mean": (32,), "fc.weight": (1000, 528), "fc.bias": (1000,),
        "trunk_output.block1.block1-0.proj.0.weight": (48, 32, 1, 1),
        "trunk_output.block1.block1-0.proj.1.bias": (48,), "trunk_output.block2.block2-1.f.a.0.weight": (96, 96, 1, 1),
        "trunk_output.block3.block3-4.f.b.0.weight": (240, 24, 3, 3),
        "trunk_output.block4.block4-0.f.a.0.weight": (528, 240, 1, 1),
        "trunk_output.block4.block4-6.f.c.1.running_var": (528,),
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert "trunk_output.block4.block4-1.proj.0.weight" not in found
    assert len(found) == 6 + (1 + 3 + 5 + 7) * 18 + 4 * 6 + 2  # stem, blocks, projections, classifier


# timm's description of the network: kind, repetitions, kernel, stride, expansion and channels of each stage.
MNASNET = [
    "ds_r1_k3_s1_e1_c16", "ir_r3_k3_s2_e3_c24", "ir_r3_k5_s2_e3_c40", "ir_r3_k5_s2_e6_c80", "ir_r2_k3_s1_e6_c96",
    "ir_r4_k5_s2_e6_c192", "ir_r1_k3_s1_e6_c320",
]  # fmt: skip
PUBLISHED = {0.5: 2_218_512, 0.75: 3_170_208, 1.0: 4_383_312, 1.3: 6_282_256}  # torchvision's documentation


def mnasnet_size(width: float) -> int:
    """Parameters, counted layer by layer from the description."""

    def rounded(channels: float) -> int:
        nearest = max(8, int(channels / 8 + 0.5) * 8)
        return nearest + 8 if nearest < 0.9 * channels else nearest

    channels = rounded(32 * width)
    size = 3 * 9 * channels + 2 * channels
    for stage in MNASNET:
        repeats, kernel, _, expansion, base = (int(n) for n in re.findall(r"\d+", stage))
        outputs = rounded(base * width)
        for _ in range(repeats):
            hidden = channels * expansion
            if stage.startswith("ir"):
                size += channels * hidden + 2 * hidden
            size += hidden * kernel**2 + 2 * hidden + hidden * outputs + 2 * outputs
            channels = outputs
    return size + channels * 1280 + 2 * 1280 + 1280 * 1000 + 1000


def test_mnasnet_2_has_the_size_that_the_rule_of_the_published_ones_gives() -> None:
    """BRECQ's MNASNet × 2.0 has no published number; the same count gives torchvision's for the others."""
    assert {width: mnasnet_size(width) for width in PUBLISHED} == PUBLISHED
    assert parameters("mnasnet2_0") == mnasnet_size(2.0)


def test_mnasnet_keys_are_torchvisions() -> None:
    found = shapes("mnasnet2_0")
    expected = {
        "layers.0.weight": (64, 3, 3, 3), "layers.3.weight": (64, 1, 3, 3), "layers.6.weight": (32, 64, 1, 1),
        "layers.7.running_var": (32,), "layers.8.0.layers.0.weight": (96, 32, 1, 1),
        "layers.9.2.layers.3.weight": (240, 1, 5, 5), "layers.12.3.layers.6.weight": (384, 2304, 1, 1),
        "layers.13.0.layers.7.bias": (640,), "layers.14.weight": (1280, 640, 1, 1), "layers.15.running_mean": (1280,),
        "classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,),
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert len(found) == 3 * 6 + 16 * 18 + 6 + 2  # stem and first block, 16 blocks, last convolution, classifier


@pytest.mark.parametrize(("width", "size"), [(0.25, 470_072), (0.5, 1_331_592), (0.75, 2_585_560)])
def test_mobilenet_v1_has_kerass_sizes(width: float, size: int) -> None:
    assert parameters("mobilenet_v1", width=width) == size


@pytest.mark.parametrize(("name", "size"), [("mobilenet_v1_vww", 221_794), ("resnet8", 78_666)])
def test_mlperf_tinys_sizes_count_batchnorms_statistics(name: str, size: int) -> None:
    counted = [shape for key, shape in shapes(name).items() if not key.endswith("num_batches_tracked")]
    assert sum(int(np.prod(shape)) for shape in counted) == size


def test_resnet8_keys_are_mlperf_tinys() -> None:
    found = shapes("resnet8")
    convolutions = {
        "stem.0": (16, 3, 3, 3), "first_stack.block.0": (16, 16, 3, 3), "first_stack.block.3": (16, 16, 3, 3),
        "second_stack.block.0": (32, 16, 3, 3), "second_stack.residual": (32, 16, 1, 1),
        "third_stack.block.3": (64, 64, 3, 3), "third_stack.residual": (64, 32, 1, 1),
    }  # fmt: skip
    assert {key: found[f"{key}.weight"] for key in convolutions} == convolutions
    assert {found[f"{key}.bias"] for key in convolutions} == {(16,), (32,), (64,)}
    assert "second_stack.block.4.running_mean" in found
    assert len(found) == 7 * (2 + 5) + 2 * 2 + 2


def test_the_wide_resnet_has_the_layers_of_its_description() -> None:
    """Blocks (2, 2, 3, 2) of 64 to 512 channels, a first convolution without padding, 20 weighted layers."""
    size, inputs = 3 * 64 * 9 + 2 * 64, 64
    for depth, channels in zip((2, 2, 3, 2), (64, 128, 256, 512), strict=True):
        for i in range(depth):
            size += (inputs if i == 0 else channels) * channels * 9 + channels * channels * 9 + 4 * channels
            if i == 0 and inputs != channels:
                size += inputs * channels + 2 * channels
        inputs = channels
    assert parameters("wide_resnet20") == size + 512 * 10 + 10
    network = zoo.build("wide_resnet20").eval()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 20
    assert network.get_submodule("conv1")(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 30, 30)
    assert {"layer2.0.shortcut.1.running_var", "layer3.2.bn2.weight", "linear.bias"} <= set(network.state_dict())


def tensorflow_same(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int) -> Tensor:
    """Convolution with TensorFlow's SAME padding, by its documented formula."""
    margins: list[int] = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0)
        margins += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, margins), weight, bias, stride, groups=groups)


@pytest.mark.parametrize("size", [(32, 32), (31, 30)])
@pytest.mark.parametrize("name", ["mobilenet_v1_vww", "resnet8"])
def test_tf_same_pads_every_convolution_as_tensorflow(
    name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network of plain padding, with each convolution replaced by TensorFlow's, is the one of `tf_same`."""
    network, plain = randomize(zoo.build(name, padding="tf_same")), randomize(zoo.build(name))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        got, different = network(x), plain(x)
        monkeypatch.setattr(
            nn.Conv2d,
            "forward",
            lambda self, x: tensorflow_same(x, self.weight, self.bias, self.stride[0], self.groups),
        )
        want = plain(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (different - want).abs().max() > 1e-3 or size == (31, 30)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "regnet": (lambda: zoo.build("regnet_x_200mf", num_classes=5), 48),
    "mnasnet": (lambda: zoo.build("mnasnet0_5", num_classes=5), 48),
    "mobilenet_v1": (lambda: zoo.build("mobilenet_v1", width=0.25, num_classes=5), 48),
    "mobilenet_v1_vww": (lambda: zoo.build("mobilenet_v1_vww", padding="tf_same"), 48),
    "resnet8": (lambda: zoo.build("resnet8"), 32),
    "resnet8 of TensorFlow": (lambda: zoo.build("resnet8", padding="tf_same"), 32),
    "wide_resnet20": (lambda: zoo.build("wide_resnet20"), 32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_fold_and_quantize(family: str) -> None:
    """The folded graph computes the network; in 8 bits it stays near; every weight is planned."""
    build, size = FAMILIES[family]
    net = randomize(build())
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    teacher = fold_batch_norm(calibquant.capture(net, x))
    recipe = QuantRecipe.model_validate(
        {"weights": {"bits": 8, "observer": "minmax"}, "activations": {"bits": 8, "observer": "minmax"}}
    )
    model = QuantModel(teacher, make_plan(teacher, recipe))
    assert len(model.plan.weights) == sum(p.dim() > 1 for p in net.parameters())
    calibrate_weights(model, recipe)
    calibrate_activations(model, recipe.activations, [x])
    with torch.no_grad():
        want, plain, got = net(x), teacher(x), model(x)
    torch.testing.assert_close(plain, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert float((got - want).norm() / want.norm()) < 0.2
    assert all(not row.reason for row in model.coverage())
