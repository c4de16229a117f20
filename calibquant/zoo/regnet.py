"""RegNetX (Radosavovic, Kosaraju, Girshick, He and Dollár, "Designing Network Design Spaces", CVPR 2020), torchvision's
key names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Widths = Literal["torchvision", "pycls"]

_STEM = 32  # channels of the first convolution


class Bottleneck(nn.Module):
    """1 × 1, grouped 3 × 3 and 1 × 1 convolutions of one width, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, group_width: int) -> None:
        super().__init__()
        self.proj = None
        if stride != 1 or inputs != outputs:
            self.proj = _conv_bn(inputs, outputs, 1, stride)
        steps: OrderedDict[str, nn.Module] = OrderedDict(
            a=_conv_bn(inputs, outputs, 1).append(nn.ReLU(inplace=True)),
            b=_conv_bn(outputs, outputs, 3, stride, outputs // group_width).append(nn.ReLU(inplace=True)),
            c=_conv_bn(outputs, outputs, 1),
        )
        self.f = nn.Sequential(steps)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        shortcut = x if self.proj is None else self.proj(x)
        return self.activation(shortcut + self.f(x))


class RegNetX(nn.Module):
    """Images (N, 3, H, W), 224 pixels by design, to (N, num_classes).

    Args:
        depths: blocks in each stage; the first of a stage halves the size.
        widths: channels in each stage.
        group_width: channels in each group of the 3 × 3 convolutions.
        num_classes: outputs.
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int], group_width: int, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = _conv_bn(3, _STEM, 3, 2).append(nn.ReLU(inplace=True))
        self.trunk_output = nn.Sequential()
        inputs = _STEM
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            stage = nn.Sequential()
            for i in range(depth):
                stage.add_module(f"block{number}-{i}", Bottleneck(inputs, width, 2 if i == 0 else 1, group_width))
                inputs = width
            self.trunk_output.add_module(f"block{number}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        x = self.avgpool(self.trunk_output(self.stem(x)))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


def regnet_x_400mf(num_classes: int = 1000, widths: Widths = "torchvision") -> RegNetX:
    """RegNetX-400MF, of which two forms are published.

    Its last stage of 392 channels lies halfway between two multiples of the group width 16. torchvision rounds up to
    400; the paper, pycls and timm have 384.
    """
    last = {"torchvision": 400, "pycls": 384}[widths]
    return RegNetX((1, 2, 7, 12), (32, 64, 160, last), 16, num_classes)


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm; a kernel of 3 is padded by 1."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))
