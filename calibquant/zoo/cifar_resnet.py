"""CIFAR ResNets (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["pad", "conv"]


def _conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class PadShortcut(nn.Module):
    """Option A of He et al.: every second pixel, and zeros for the channels that are new.

    (N, `inputs`, H, W) becomes (N, `outputs`, ceil(H / stride), ceil(W / stride)) without parameters.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (outputs - inputs) // 2
        self.channels = (before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        """The padded shortcut of `x`."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.channels))


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut: (N, `inputs`, H, W) becomes (N, `outputs`, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            if shortcut == "pad":
                self.downsample = PadShortcut(inputs, outputs, stride)
            else:
                projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
                self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class CifarResNet(nn.Module):
    """A ResNet of three stages with 16, 32 and 64 channels for small images, (N, C, H, W) to (N, num_classes).

    The classifier is called `linear` with pad shortcuts and `fc` with convolutional ones, as in the published weights.

    Args:
        blocks: residual blocks in each stage; the depth is 6 × blocks + 2.
        shortcut: "pad" (option A of the paper, no parameters) or "conv" (1 × 1 convolution and BatchNorm).
        num_classes: outputs.
        in_channels: channels of the image.
    """

    def __init__(self, blocks: int, shortcut: Shortcut = "pad", num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, 16, 1)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, shortcut)
        self.layer2 = _stage(blocks, 16, 32, shortcut)
        self.layer3 = _stage(blocks, 32, 64, shortcut)
        self.classifier_name = "linear" if shortcut == "pad" else "fc"
        self.add_module(self.classifier_name, nn.Linear(64, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        classifier: nn.Module = getattr(self, self.classifier_name)
        logits: Tensor = classifier(x)
        return logits


def _stage(blocks: int, inputs: int, outputs: int, shortcut: Shortcut) -> nn.Sequential:
    stride = 1 if inputs == outputs else 2
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))
