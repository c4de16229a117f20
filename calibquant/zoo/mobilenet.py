"""MobileNetV2 (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["torch", "tf_same"]

# Table 2 of the paper: expansion, channels, repetitions, stride of the first.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor` that is at least `divisor` and not below 90 % of `channels`.

    Example:
        >>> round_channels(32 * 0.75), round_channels(16 * 0.35)
        (24, 8)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def pad_same_stride2(x: Tensor) -> Tensor:
    """Zero-pad (N, C, H, W) so that an unpadded 3 × 3 convolution of stride 2 equals TensorFlow's "SAME".

    TensorFlow pads max((ceil(n / 2) - 1) * 2 + 3 - n, 0) pixels, the smaller half in front: 0 and 1 for an even n,
    1 and 1 for an odd n. Written as arithmetic on the shape, so that a tracer can follow it.
    """
    return F.pad(x, (x.shape[-1] % 2, 1, x.shape[-2] % 2, 1))


class ConvBNReLU6(nn.Sequential):
    """Convolution, BatchNorm and ReLU6: (N, `inputs`, H, W) to (N, `outputs`, H / stride, W / stride)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, padding: Padding = "torch"
    ) -> None:
        self_padded = padding == "tf_same" and stride == 2
        margin = 0 if self_padded else (kernel - 1) // 2
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, margin, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )
        self.self_padded = self_padded

    def forward(self, x: Tensor) -> Tensor:
        """The activations after ReLU6."""
        return super().forward(pad_same_stride2(x) if self.self_padded else x)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project: (N, `inputs`, H, W) to (N, `outputs`, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, padding: Padding) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [ConvBNReLU6(inputs, hidden, 1)] if expansion != 1 else []
        layers += [
            ConvBNReLU6(hidden, hidden, 3, stride, groups=hidden, padding=padding),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """MobileNetV2 with torchvision's key names: images (N, 3, H, W), 224 pixels by design, to (N, num_classes).

    Args:
        width: multiplier of the channels.
        num_classes: outputs.
        padding: "torch" (one pixel on each side) or "tf_same" (TensorFlow's "SAME", for weights trained there).
    """

    def __init__(self, width: float = 1.0, num_classes: int = 1000, padding: Padding = "torch") -> None:
        super().__init__()
        channels = round_channels(32 * width)
        layers: list[nn.Module] = [ConvBNReLU6(3, channels, 3, 2, padding=padding)]
        for expansion, base, repetitions, first_stride in _STAGES:
            outputs = round_channels(base * width)
            for index in range(repetitions):
                stride = first_stride if index == 0 else 1
                layers.append(InvertedResidual(channels, outputs, stride, expansion, padding))
                channels = outputs
        last = round_channels(1280 * max(1.0, width))
        layers.append(ConvBNReLU6(channels, last, 1))
        self.features = nn.Sequential(*layers)
        head = nn.Linear(last, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(0.2), head)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits
