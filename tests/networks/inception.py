"""GoogLeNet and Inception-v3, written the way their authors write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import published


class BasicConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, **kwargs) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class GoogLeNetBlock(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(inputs, 6, kernel_size=1)
        self.branch2 = nn.Sequential(BasicConv2d(inputs, 4, kernel_size=1), BasicConv2d(4, 6, kernel_size=3, padding=1))
        self.branch3 = nn.Sequential(BasicConv2d(inputs, 4, kernel_size=1), BasicConv2d(4, 6, kernel_size=3, padding=1))
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True), BasicConv2d(inputs, 6, kernel_size=1)
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._forward(x)
        return torch.cat(outputs, 1)


@published("googlenet", (3, 64, 64), "four branches, ceil-mode max pools, input transform by channel slices")
class GoogLeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform_input = True
        self.conv1 = BasicConv2d(3, 8, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = GoogLeNetBlock(8)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = GoogLeNetBlock(24)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=0.2)
        self.fc = nn.Linear(24, 10)

    def _transform_input(self, x: Tensor) -> Tensor:
        if self.transform_input:
            x_ch0 = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
            x_ch1 = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
            x_ch2 = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
            x = torch.cat((x_ch0, x_ch1, x_ch2), 1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self._transform_input(x)
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool3(self.inception3a(x))
        x = self.inception4a(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.dropout(x)
        return self.fc(x)


class InceptionC(nn.Module):
    """Inception-v3's block of factorized convolutions, with a pooling branch and nested concatenations."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, 6, kernel_size=1)
        self.branch7x7_1 = BasicConv2d(inputs, 4, kernel_size=1)
        self.branch7x7_2 = BasicConv2d(4, 4, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7_3 = BasicConv2d(4, 6, kernel_size=(7, 1), padding=(3, 0))
        self.branch3x3_1 = BasicConv2d(inputs, 4, kernel_size=1)
        self.branch3x3_2a = BasicConv2d(4, 3, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(4, 3, kernel_size=(3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(inputs, 6, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = torch.cat([self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)], 1)
        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branch_pool = self.branch_pool(branch_pool)
        return torch.cat([branch1x1, branch7x7, branch3x3, branch_pool], 1)


class InceptionB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(inputs, 8, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch3x3(x), F.max_pool2d(x, kernel_size=3, stride=2)], 1)


@published("inception_v3", (3, 64, 64), "1 × 7 and 7 × 1 kernels, functional pools, nested concatenations, no padding")
class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 8, kernel_size=3, stride=2)
        self.Mixed_6a = InceptionB(8)
        self.Mixed_6b = InceptionC(16)
        self.Mixed_6c = InceptionC(24)
        self.dropout = nn.Dropout()
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_1a_3x3(x)
        x = self.Mixed_6a(x)
        x = self.Mixed_6b(x)
        x = self.Mixed_6c(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = self.dropout(x)
        x = x.view(x.shape[0], -1)
        return self.fc(x)
