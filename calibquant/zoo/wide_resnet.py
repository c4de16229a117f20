"""The wide ResNet-20 for CIFAR-10 of the program ptq_resnet20, with its key names.

It has the blocks of ResNet-18 (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016) and one more, and
not the 16 to 64 channels of the paper's ResNet-20.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DEPTHS = (2, 2, 3, 2)  # blocks of the stages with 64, 128, 256 and 512 channels


class WideBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut: (N, `inputs`, H, W) to (N, `outputs`, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class WideResNet20(nn.Module):
    """Images (N, 3, 32, 32) to (N, num_classes); the first convolution is not padded and leaves 30 pixels."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, depth in enumerate(_DEPTHS, start=1):
            stage, outputs = nn.Sequential(), 32 << number
            for i in range(depth):
                stage.append(WideBlock(inputs, outputs, 2 if number > 1 and i == 0 else 1))
                inputs = outputs
            self.add_module(f"layer{number}", stage)
        self.linear = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, len(_DEPTHS) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits
