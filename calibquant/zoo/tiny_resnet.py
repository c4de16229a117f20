"""ResNet-8 of MLPerf Tiny's image classification (Banbury et al., "MLPerf Tiny Benchmark", NeurIPS Datasets and
Benchmarks 2021), with the key names of its PyTorch reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibquant.zoo.mobilenet import Padding, pad_same_stride2


class Stack(nn.Module):
    """Two 3 × 3 convolutions and a shortcut, whose 1 × 1 convolution has no BatchNorm; all convolutions have a bias."""

    def __init__(self, inputs: int, outputs: int, stride: int, padding: Padding) -> None:
        super().__init__()
        self.self_padded = padding == "tf_same" and stride == 2
        self.block = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 0 if self.self_padded else 1), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.residual = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = self.block(pad_same_stride2(x) if self.self_padded else x)
        return F.relu(y + self.residual(x))


class TinyResNet(nn.Module):
    """Images (N, 3, H, W), 32 pixels by design, to (N, num_classes).

    Args:
        num_classes: outputs.
        padding: "torch" (one pixel on each side) or "tf_same" (TensorFlow's "SAME", for weights trained there).
    """

    def __init__(self, num_classes: int = 10, padding: Padding = "torch") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.first_stack = Stack(16, 16, 1, padding)
        self.second_stack = Stack(16, 32, 2, padding)
        self.third_stack = Stack(32, 64, 2, padding)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        x = self.third_stack(self.second_stack(self.first_stack(self.stem(x))))
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits
