"""The table of networks: building one by its name and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from calibquant.errors import ModelError, nearest
from calibquant.recipe import REGULARIZER
from calibquant.zoo.cifar_resnet import CifarResNet
from calibquant.zoo.digits import digits_resnet
from calibquant.zoo.external import build_external, is_external
from calibquant.zoo.inception import InceptionV3
from calibquant.zoo.mnasnet import MNASNet
from calibquant.zoo.mobilenet import MobileNetV2
from calibquant.zoo.mobilenet_v1 import MobileNetV1
from calibquant.zoo.regnet import RegNetX, regnet_x_400mf
from calibquant.zoo.resnet import BasicBlock, Bottleneck, ResNet
from calibquant.zoo.squeezenet import SqueezeNet
from calibquant.zoo.tiny_resnet import TinyResNet
from calibquant.zoo.vgg import VGG16
from calibquant.zoo.wide_resnet import WideResNet20


@dataclass(frozen=True)
class Option:
    """What an option's value must be, in words for the error and as a test."""

    allowed: str
    valid: Callable[[object], bool]


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Args:
        builder: makes it.
        input_shape: (C, H, W) of its usual input.
        options: of the builder.
        regularizer: weight of the rounding regularizer in QDrop's released configurations.
    """

    builder: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]
    options: Mapping[str, Option]
    regularizer: float = REGULARIZER


def _one_of(*words: str) -> Option:
    return Option("use " + " or ".join(words), lambda value: value in words)


def _positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _width(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 16


def _share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


_CLASSES = {"num_classes": Option("use a whole number of at least 1", _positive_int)}
_WIDTH = {"width": Option("use a number above 0 and up to 16", _width)}
_MOMENTUM = {"norm_momentum": Option("use a number above 0 and up to 1", _share)}
_PADDING = {"padding": _one_of("torch", "tf_same")}
_IMAGENET = (3, 224, 224)
_CIFAR = (3, 32, 32)
_RESNETS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
# Blocks and channels of the four stages, and channels of a group; figure 17 of the paper.
_REGNETS = {
    "200mf": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "600mf": ((1, 3, 5, 7), (48, 96, 240, 528), 24),
    "800mf": ((1, 3, 7, 5), (64, 128, 288, 672), 16),
    "1_6gf": ((2, 4, 10, 2), (72, 168, 408, 912), 24),
    "3_2gf": ((2, 6, 15, 2), (96, 192, 432, 1008), 48),
}
# Weights of the rounding regularizer of QDrop's released configurations.
_MOBILENET, _MNASNET = 0.1, 0.2

_ZOO: dict[str, Entry] = {
    f"cifar_resnet{depth}": Entry(
        partial(CifarResNet, (depth - 2) // 6), _CIFAR, {"shortcut": _one_of("pad", "conv"), **_CLASSES}
    )
    for depth in (20, 32, 44, 56, 110)
}
_ZOO |= {f"resnet{depth}": Entry(partial(ResNet, *design), _IMAGENET, _CLASSES) for depth, design in _RESNETS.items()}
_ZOO |= {f"regnet_x_{size}": Entry(partial(RegNetX, *design), _IMAGENET, _CLASSES) for size, design in _REGNETS.items()}
_ZOO |= {
    f"mnasnet{str(width).replace('.', '_')}": Entry(
        partial(MNASNet, width), _IMAGENET, {**_MOMENTUM, **_CLASSES}, _MNASNET
    )
    for width in (0.5, 0.75, 1.0, 1.3, 2.0)
}
_ZOO |= {
    "regnet_x_400mf": Entry(regnet_x_400mf, _IMAGENET, {"widths": _one_of("torchvision", "pycls"), **_CLASSES}),
    "mobilenet_v1": Entry(MobileNetV1, _IMAGENET, {**_WIDTH, **_PADDING, **_CLASSES}),
    "mobilenet_v1_vww": Entry(
        partial(MobileNetV1, width=0.25, num_classes=2, bias=True), (3, 96, 96), {**_PADDING, **_CLASSES}
    ),
    "mobilenet_v2": Entry(MobileNetV2, _IMAGENET, {**_WIDTH, **_PADDING, **_CLASSES}, _MOBILENET),
    "inception_v3": Entry(InceptionV3, (3, 299, 299), _CLASSES),
    "vgg16_bn": Entry(VGG16, _IMAGENET, _CLASSES),
    "squeezenet1_1": Entry(SqueezeNet, _IMAGENET, _CLASSES),
    "resnet8": Entry(TinyResNet, _CIFAR, {**_PADDING, **_CLASSES}),
    "wide_resnet20": Entry(WideResNet20, _CIFAR, _CLASSES),
    "digits_resnet": Entry(digits_resnet, (1, 16, 16), _CLASSES),
}
_EXTERNAL_REGULARIZER = {
    "torchvision:mobilenet_v2": _MOBILENET,
    **{f"timm:mobilenetv2_{width}": _MOBILENET for width in ("035", "050", "075", "100", "110d", "120d", "140")},
    **{f"torchvision:mnasnet{width}": _MNASNET for width in ("0_5", "0_75", "1_0", "1_3")},
    **{f"timm:mnasnet_{width}": _MNASNET for width in ("050", "075", "100", "140")},
}


def names() -> list[str]:
    """The names `build` knows, sorted."""
    return sorted(_ZOO)


def build(name: str, **options: object) -> nn.Module:
    """A network, randomly initialized, in training mode as torch leaves it.

    Args:
        name: one of `names()`, or one of the forms of `build_external`.
        options: the builder's arguments, e.g. `num_classes=10`.

    Raises:
        ModelError: the name, an option or an option's value is unknown, or the network cannot be built.

    Example:
        >>> sum(p.numel() for p in build("cifar_resnet20").parameters())
        269722
    """
    return build_external(name, options) if is_external(name) else _entry(name, options).builder(**options)


def input_shape(name: str, **options: object) -> tuple[int, int, int]:
    """The shape (C, H, W) of the images the network was designed for.

    Raises:
        ModelError: the name, an option or an option's value is unknown.

    Example:
        >>> input_shape("digits_resnet")
        (1, 16, 16)
    """
    return _entry(name, options).input_shape


def regularizer_of(name: str | None) -> float:
    """Weight of the rounding regularizer for a network; the usual one where none of its own is known.

    Example:
        >>> regularizer_of("mobilenet_v2"), regularizer_of("timm:mobilenetv2_100.ra_in1k"), regularizer_of(None)
        (0.1, 0.1, 0.01)
    """
    if name in _ZOO:
        return _ZOO[name].regularizer
    return _EXTERNAL_REGULARIZER.get((name or "").partition(".")[0], REGULARIZER)  # timm names weights after a point


def _entry(name: str, options: Mapping[str, object]) -> Entry:
    if name not in _ZOO:
        raise ModelError("model.name", f"'{name}' is not in the zoo", nearest(name, _ZOO))
    entry = _ZOO[name]
    for key, value in options.items():
        if key not in entry.options:
            raise ModelError(f"model.options.{key}", f"{name} has no such option", nearest(key, entry.options))
        if not entry.options[key].valid(value):
            raise ModelError(f"model.options.{key}", f"{value!r} is not valid", entry.options[key].allowed)
    return entry
