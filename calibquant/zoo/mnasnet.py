"""MNASNet-B1 (Tan, Chen, Pang, Vasudevan, Sandler, Howard and Le, "MnasNet: Platform-Aware Neural Architecture Search
for Mobile", CVPR 2019) with torchvision's key names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibquant.zoo.mobilenet import round_channels

# Kernel, expansion, channels, repetitions, stride of the first; of the model b1 that the authors released.
_STAGES = (
    (3, 3, 24, 3, 2), (5, 3, 40, 3, 2), (5, 6, 80, 3, 2), (3, 6, 96, 2, 1), (5, 6, 192, 4, 2), (3, 6, 320, 1, 1),
)  # fmt: skip
_STEM, _SEPARABLE, _LAST = 32, 16, 1280
MOMENTUM = 0.0003  # of BatchNorm: 1 - 0.9997, TensorFlow's


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project: (N, `inputs`, H, W) to (N, `outputs`, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            *_conv_bn(inputs, hidden, 1), nn.ReLU(inplace=True),
            *_conv_bn(hidden, hidden, kernel, stride, groups=hidden), nn.ReLU(inplace=True),
            *_conv_bn(hidden, outputs, 1),
        )  # fmt: skip
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y: Tensor = self.layers(x)
        return y + x if self.residual else y


class MNASNet(nn.Module):
    """Images (N, 3, H, W), 224 pixels by design, to (N, num_classes).

    All channels but the last 1280 are multiplied by `width` and rounded to multiples of 8, those of the stem too, as in
    torchvision since its version 2 of the network.

    Args:
        width: multiplier of the channels.
        num_classes: outputs.
        norm_momentum: of BatchNorm while training. The published one follows thousands of steps; statistics of a short
            training need a larger one, such as 0.1.
    """

    def __init__(self, width: float, num_classes: int = 1000, norm_momentum: float = MOMENTUM) -> None:
        super().__init__()
        stem, channels = round_channels(_STEM * width), round_channels(_SEPARABLE * width)
        layers: list[nn.Module] = [
            *_conv_bn(3, stem, 3, 2), nn.ReLU(inplace=True),
            *_conv_bn(stem, stem, 3, groups=stem), nn.ReLU(inplace=True),
            *_conv_bn(stem, channels, 1),
        ]  # fmt: skip
        for kernel, expansion, base, repetitions, first_stride in _STAGES:
            blocks, outputs = [], round_channels(base * width)
            for i in range(repetitions):
                blocks.append(InvertedResidual(channels, outputs, kernel, first_stride if i == 0 else 1, expansion))
                channels = outputs
            layers.append(nn.Sequential(*blocks))
        self.layers = nn.Sequential(*layers, *_conv_bn(channels, _LAST, 1), nn.ReLU(inplace=True))
        head = nn.Linear(_LAST, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(0.2), head)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = norm_momentum
        nn.init.kaiming_uniform_(head.weight, mode="fan_out", nonlinearity="sigmoid")
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        x = F.adaptive_avg_pool2d(self.layers(x), 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def _conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that keeps the size but for its stride, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs)
