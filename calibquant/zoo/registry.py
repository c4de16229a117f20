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
from calibquant.zoo.inception import InceptionV3
from calibquant.zoo.mobilenet import MobileNetV2
from calibquant.zoo.resnet import BasicBlock, Bottleneck, ResNet
from calibquant.zoo.squeezenet import SqueezeNet
from calibquant.zoo.vgg import VGG16


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


_CLASSES = Option("use a whole number of at least 1", _positive_int)
_WIDTH = Option("use a number above 0 and up to 16", _width)

_ZOO: dict[str, Entry] = {
    f"cifar_resnet{depth}": Entry(
        partial(CifarResNet, (depth - 2) // 6),
        (3, 32, 32),
        {"shortcut": _one_of("pad", "conv"), "num_classes": _CLASSES},
    )
    for depth in (20, 32, 44, 56, 110)
}
_ZOO |= {
    "mobilenet_v2": Entry(
        MobileNetV2,
        (3, 224, 224),
        {"width": _WIDTH, "num_classes": _CLASSES, "padding": _one_of("torch", "tf_same")},
        regularizer=0.1,
    ),
    "inception_v3": Entry(InceptionV3, (3, 299, 299), {"num_classes": _CLASSES}),
    "vgg16_bn": Entry(VGG16, (3, 224, 224), {"num_classes": _CLASSES}),
    "squeezenet1_1": Entry(SqueezeNet, (3, 224, 224), {"num_classes": _CLASSES}),
    "digits_resnet": Entry(digits_resnet, (1, 16, 16), {"num_classes": _CLASSES}),
}
_RESNETS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
_ZOO |= {
    f"resnet{depth}": Entry(partial(ResNet, *design), (3, 224, 224), {"num_classes": _CLASSES})
    for depth, design in _RESNETS.items()
}


def names() -> list[str]:
    """The names `build` knows, sorted."""
    return sorted(_ZOO)


def build(name: str, **options: object) -> nn.Module:
    """A network of the zoo, randomly initialized, in training mode as torch leaves it.

    Args:
        name: one of `names()`.
        options: the builder's arguments, e.g. `num_classes=10`.

    Raises:
        ModelError: the name, an option or an option's value is unknown.

    Example:
        >>> sum(p.numel() for p in build("cifar_resnet20").parameters())
        269722
    """
    return _entry(name, options).builder(**options)


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
        >>> regularizer_of("mobilenet_v2"), regularizer_of(None)
        (0.1, 0.01)
    """
    return _ZOO[name].regularizer if name in _ZOO else REGULARIZER


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
