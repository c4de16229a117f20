"""MobileNetV1 (Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto and Adam, "MobileNets: Efficient Convolutional
Neural Networks for Mobile Vision Applications", arXiv:1704.04861).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibquant.zoo.mobilenet import Padding, pad_same_stride2, round_channels

# Channels and stride of the separable convolutions, table 1 of the paper.
_LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class ConvBNReLU(nn.Module):
    """Convolution, BatchNorm and ReLU: (N, `inputs`, H, W) to (N, `outputs`, H / stride, W / stride)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, padding: Padding, bias: bool
    ) -> None:
        super().__init__()
        self.self_padded = padding == "tf_same" and stride == 2
        margin = 0 if self.self_padded else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, margin, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The activations after ReLU."""
        return F.relu(self.bn(self.conv(pad_same_stride2(x) if self.self_padded else x)))


class Separable(nn.Module):
    """Filter each channel, then mix them: (N, `inputs`, H, W) to (N, `outputs`, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, padding: Padding, bias: bool) -> None:
        super().__init__()
        self.depthwise = ConvBNReLU(inputs, inputs, 3, stride, inputs, padding, bias)
        self.pointwise = ConvBNReLU(inputs, outputs, 1, 1, 1, padding, bias)

    def forward(self, x: Tensor) -> Tensor:
        """The activations after both convolutions."""
        y: Tensor = self.pointwise(self.depthwise(x))
        return y


class MobileNetV1(nn.Module):
    """Images (N, 3, H, W), 224 pixels by design, to (N, num_classes), with ReLU as in the paper.

    `MobileNetV1(0.25, 2, bias=True)` is the network of MLPerf Tiny's visual wake words (Banbury et al., "MLPerf Tiny
    Benchmark", NeurIPS Datasets and Benchmarks 2021), made for images of 96 pixels.

    Args:
        width: multiplier of the channels, which are rounded to multiples of 8.
        num_classes: outputs.
        padding: "torch" (one pixel on each side) or "tf_same" (TensorFlow's "SAME", for weights trained there).
        bias: whether convolutions have a bias beside BatchNorm's.
    """

    def __init__(
        self, width: float = 1.0, num_classes: int = 1000, padding: Padding = "torch", bias: bool = False
    ) -> None:
        super().__init__()
        channels = round_channels(32 * width)
        layers: list[nn.Module] = [ConvBNReLU(3, channels, 3, 2, 1, padding, bias)]
        for base, stride in _LAYERS:
            outputs = round_channels(base * width)
            layers.append(Separable(channels, outputs, stride, padding, bias))
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits
