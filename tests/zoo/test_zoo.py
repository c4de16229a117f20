"""The zoo's table: published sizes, shapes, and errors for names and options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from calibquant import zoo
from calibquant.errors import ModelError
from calibquant.zoo.mobilenet import ConvBNReLU6, pad_same_stride2, round_channels

# Of the papers, torchvision's documentation, Keras and MLPerf Tiny, without BatchNorm's statistics. What timm's table
# has in millions only, and the networks without a published number, are in test_families.py.
PUBLISHED_SIZES = {
    "cifar_resnet20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v1_vww": 221_794 - 5_472,
    "mobilenet_v2": 3_504_872,
    "mnasnet0_5": 2_218_512,
    "mnasnet0_75": 3_170_208,
    "mnasnet1_0": 4_383_312,
    "mnasnet1_3": 6_282_256,
    "mnasnet2_0": 12_469_944,
    "squeezenet1_1": 1_235_496,
    "digits_resnet": 77_754,
    "regnet_x_200mf": 2_684_792,
    "regnet_x_400mf": 5_495_976,
    "regnet_x_600mf": 6_196_040,
    "regnet_x_800mf": 7_259_656,
    "regnet_x_1_6gf": 9_190_136,
    "regnet_x_3_2gf": 15_296_552,
    "resnet8": 78_666 - 480,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "vgg16_bn": 138_365_992,
    "wide_resnet20": 12_354_634,
    "inception_v3": 27_161_264,
}
SLOW = ("cifar_resnet110", "vgg16_bn", "resnet101", "resnet152", "mnasnet2_0", "regnet_x_3_2gf")


def test_every_network_has_its_published_number_of_parameters() -> None:
    assert zoo.names() == sorted(PUBLISHED_SIZES)
    for name, size in PUBLISHED_SIZES.items():
        with torch.device("meta"):
            network = zoo.build(name)
        assert sum(p.numel() for p in network.parameters()) == size, name


@pytest.mark.parametrize("name", [name for name in PUBLISHED_SIZES if name not in SLOW])
def test_output_shape_and_symbolic_trace(name: str) -> None:
    network = zoo.build(name, num_classes=7).eval()
    channels, height, width = zoo.input_shape(name)
    x = torch.randn(2, channels, min(height, 75), min(width, 75))
    with torch.no_grad():
        y = network(x)
        traced = fx.symbolic_trace(network)(x)
    assert y.shape == (2, 7)
    assert torch.equal(y, traced)


def test_resnet_keys_are_torchvisions() -> None:
    """Counts of torchvision's state_dicts, and keys of each kind."""
    counts = {"resnet18": 122, "resnet34": 218, "resnet50": 320, "resnet101": 626, "resnet152": 932}
    for name, count in counts.items():
        assert len(zoo.build(name).state_dict()) == count
    state = zoo.build("resnet50").state_dict()
    shapes = {
        "conv1.weight": (64, 3, 7, 7), "layer1.0.downsample.0.weight": (256, 64, 1, 1), "bn1.running_var": (64,),
        "layer2.0.conv2.weight": (128, 128, 3, 3), "layer2.0.downsample.1.bias": (512,), "fc.weight": (1000, 2048),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
    }  # fmt: skip
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert "layer1.1.downsample.0.weight" not in state
    block = zoo.build("resnet50").layer2[0]  # type: ignore[union-attr, index]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize(
    ("width", "channels", "millions"),
    [  # channels of TensorFlow's checkpoints, parameters of timm's table
        (0.35, (16, 8, 8, 16, 24, 32, 56, 112, 1280), 1.68),
        (0.5, (16, 8, 16, 16, 32, 48, 80, 160, 1280), 1.97),
        (0.75, (24, 16, 24, 24, 48, 72, 120, 240, 1280), 2.64),
        (1.4, (48, 24, 32, 48, 88, 136, 224, 448, 1792), 6.11),
    ],
)
def test_mobilenet_width_follows_the_published_rounding(
    width: float, channels: tuple[int, ...], millions: float
) -> None:
    """Multiples of 8; only what is wider than 1 widens the last layer."""
    with torch.device("meta"):
        network = zoo.build("mobilenet_v2", width=width)
    state = network.state_dict()
    last_of_stage = [1, 3, 6, 10, 13, 16, 17]
    found = [state[f"features.{i}.conv.{2 if i == 1 else 3}.weight"].shape[0] for i in last_of_stage]
    assert (state["features.0.0.weight"].shape[0], *found, state["features.18.0.weight"].shape[0]) == channels
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions
    assert [round_channels(c) for c in (4, 11, 12, 19, 24)] == [8, 16, 16, 24, 24]


def test_cifar_shortcut_forms_differ_in_keys_only_where_shapes_change() -> None:
    pad = set(zoo.build("cifar_resnet20").state_dict())
    conv = set(zoo.build("cifar_resnet20", shortcut="conv").state_dict())
    assert {key.split(".")[0] for key in pad - conv} == {"linear"}
    assert {".".join(key.split(".")[:3]) for key in conv - pad if key.startswith("layer")} == {
        "layer2.0.downsample",
        "layer3.0.downsample",
    }


def test_pad_shortcut_subsamples_and_centers_the_channels() -> None:
    block = zoo.build("cifar_resnet20").layer2[0]  # type: ignore[union-attr, index]
    x = torch.randn(2, 16, 8, 8)
    y = block.downsample(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y.shape == (2, 32, 4, 4)
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def tensorflow_same(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolution with TensorFlow's SAME padding, by its documented formula."""
    kernel = weight.shape[-1]
    margins: list[int] = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        margins += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, margins), weight, stride=stride)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (8, 7), (9, 12), (2, 3), (1, 1)])
def test_tf_same_equals_tensorflows_formula(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = ConvBNReLU6(3, 4, 3, stride=2, padding="tf_same").eval()
    conv = layer[0]
    assert isinstance(conv, nn.Conv2d)
    x = torch.randn(2, 3, *size)
    expected = tensorflow_same(x, conv.weight, 2)
    with torch.no_grad():
        assert torch.equal(conv(pad_same_stride2(x)), expected)
        torch.testing.assert_close(layer(x), (expected / (1 + 1e-5) ** 0.5).clamp(0, 6))


def test_tf_same_changes_the_five_strided_convolutions_only() -> None:
    network = zoo.build("mobilenet_v2", padding="tf_same")
    unpadded = [
        m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and not m.padding[0]
    ]
    assert len(unpadded) == 5
    assert all(conv.stride == (2, 2) for conv in unpadded)
    assert network.state_dict().keys() == zoo.build("mobilenet_v2").state_dict().keys()


@pytest.mark.parametrize(("options", "momentum"), [({}, 0.0003), ({"norm_momentum": 0.1}, 0.1)])
def test_mnasnets_statistics_follow_as_fast_as_asked(options: dict[str, object], momentum: float) -> None:
    network = zoo.build("mnasnet0_5", **options)
    assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {momentum}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar_resnet21", {}, "'cifar_resnet21' is not in the zoo; did you mean 'cifar_resnet"),
        ("vit", {}, "'vit' is not in the zoo; known are cifar_resnet110, "),
        ("mobilenet_v2", {"paddings": "torch"}, "model.options.paddings: mobilenet_v2 has no such option; did you"),
        ("squeezenet1_1", {"width": 1}, "model.options.width: squeezenet1_1 has no such option; known are num_classes"),
        ("mobilenet_v2", {"padding": "same"}, "model.options.padding: 'same' is not valid; use torch or tf_same"),
        ("mobilenet_v2", {"width": 0}, "model.options.width: 0 is not valid; use a number above 0"),
        (
            "mnasnet1_0",
            {"norm_momentum": 0},
            "model.options.norm_momentum: 0 is not valid; use a number above 0 and up",
        ),
        ("cifar_resnet20", {"num_classes": True}, "model.options.num_classes: True is not valid; use a whole number"),
        ("cifar_resnet20", {"num_classes": 2.5}, "model.options.num_classes: 2.5 is not valid; use a whole number"),
        ("cifar_resnet20", {"shortcut": ["pad"]}, "model.options.shortcut: ['pad'] is not valid; use pad or conv"),
    ],
)
def test_wrong_names_and_options_are_named(name: str, options: dict[str, object], message: str) -> None:
    for call in (zoo.build, zoo.input_shape):
        with pytest.raises(ModelError) as error:
            call(name, **options)
        assert message in str(error.value)
