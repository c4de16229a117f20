"""Inception-v3 with torchvision's key names.

Source: Szegedy, Vanhoucke, Ioffe, Shlens and Wojna, "Rethinking the Inception Architecture for Computer Vision", CVPR
2016.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBNReLU(nn.Module):
    """Convolution, BatchNorm and ReLU; a kernel (h, w) of stride 1 is padded to keep the size unless `valid`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, stride: int = 1, valid: bool = False
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        margin = (0, 0) if valid or stride > 1 else (sides[0] // 2, sides[1] // 2)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, margin, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """The activations after ReLU."""
        return F.relu(self.bn(self.conv(x)))


class InceptionA(nn.Module):
    """Branches of 1 × 1, 5 × 5 and two 3 × 3 convolutions and a pool: (N, 224 + `pooled`, H, W)."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBNReLU(inputs, 64)
        self.branch5x5_1 = ConvBNReLU(inputs, 48)
        self.branch5x5_2 = ConvBNReLU(48, 64, 5)
        self.branch3x3dbl_1 = ConvBNReLU(inputs, 64)
        self.branch3x3dbl_2 = ConvBNReLU(64, 96, 3)
        self.branch3x3dbl_3 = ConvBNReLU(96, 96, 3)
        self.branch_pool = ConvBNReLU(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        """The branches, concatenated along the channels."""
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(_average(x))], 1)


class InceptionB(nn.Module):
    """Halve the size: (N, 480 + inputs, (H - 1) // 2, (W - 1) // 2)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvBNReLU(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBNReLU(inputs, 64)
        self.branch3x3dbl_2 = ConvBNReLU(64, 96, 3)
        self.branch3x3dbl_3 = ConvBNReLU(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """The branches, concatenated along the channels."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class InceptionC(nn.Module):
    """Branches of 1 × 1 and of factorized 7 × 7 convolutions, `width` channels inside, and a pool: (N, 768, H, W)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBNReLU(inputs, 192)
        self.branch7x7_1 = ConvBNReLU(inputs, width)
        self.branch7x7_2 = ConvBNReLU(width, width, (1, 7))
        self.branch7x7_3 = ConvBNReLU(width, 192, (7, 1))
        self.branch7x7dbl_1 = ConvBNReLU(inputs, width)
        self.branch7x7dbl_2 = ConvBNReLU(width, width, (7, 1))
        self.branch7x7dbl_3 = ConvBNReLU(width, width, (1, 7))
        self.branch7x7dbl_4 = ConvBNReLU(width, width, (7, 1))
        self.branch7x7dbl_5 = ConvBNReLU(width, 192, (1, 7))
        self.branch_pool = ConvBNReLU(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        """The branches, concatenated along the channels."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class InceptionD(nn.Module):
    """Halve the size: (N, 512 + inputs, (H - 1) // 2, (W - 1) // 2)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvBNReLU(inputs, 192)
        self.branch3x3_2 = ConvBNReLU(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBNReLU(inputs, 192)
        self.branch7x7x3_2 = ConvBNReLU(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvBNReLU(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvBNReLU(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """The branches, concatenated along the channels."""
        wide = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), wide, F.max_pool2d(x, 3, 2)], 1)


class InceptionE(nn.Module):
    """Branches that fork into 1 × 3 and 3 × 1 convolutions: (N, 2048, H, W)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBNReLU(inputs, 320)
        self.branch3x3_1 = ConvBNReLU(inputs, 384)
        self.branch3x3_2a = ConvBNReLU(384, 384, (1, 3))
        self.branch3x3_2b = ConvBNReLU(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvBNReLU(inputs, 448)
        self.branch3x3dbl_2 = ConvBNReLU(448, 384, 3)
        self.branch3x3dbl_3a = ConvBNReLU(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvBNReLU(384, 384, (3, 1))
        self.branch_pool = ConvBNReLU(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        """The branches, concatenated along the channels."""
        single = self.branch3x3_1(x)
        single = torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        double = torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1)
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class AuxiliaryClassifier(nn.Module):
    """Weights of the classifier that helped to train the network; nothing computes it here."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.conv0 = ConvBNReLU(inputs, 128)
        self.conv1 = ConvBNReLU(128, 768, 5, valid=True)
        self.fc = nn.Linear(768, num_classes)


class InceptionV3(nn.Module):
    """Images (N, 3, H, W), 299 pixels by design and 75 at least, to (N, num_classes).

    The auxiliary classifier has its weights, so that published files load, but is computed in neither mode and so is no
    part of what is captured. Torchvision's weights were trained on images of mean 0.5 and deviation 0.5; where
    torchvision changes the image (`transform_input`), give `data.preprocess` these numbers.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBNReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBNReLU(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = ConvBNReLU(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBNReLU(64, 80)
        self.Conv2d_4a_3x3 = ConvBNReLU(80, 192, 3, valid=True)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        for block, width in zip("bcde", (128, 160, 160, 192), strict=True):
            self.add_module(f"Mixed_6{block}", InceptionC(768, width))
        self.AuxLogits = AuxiliaryClassifier(768, num_classes)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280)
        self.Mixed_7c = InceptionE(2048)
        self.dropout = nn.Dropout()
        self.fc = nn.Linear(2048, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        x = self.dropout(F.adaptive_avg_pool2d(x, 1))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


def _average(x: Tensor) -> Tensor:
    """Mean over 3 × 3 pixels, the size kept; zeros beyond the border count."""
    return F.avg_pool2d(x, 3, 1, 1)
