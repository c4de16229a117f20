"""Residual networks, written the way their authors write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import published


class Bottleneck(nn.Module):
    """One in-place ReLU module used three times, a Sequential downsample, `out += identity`."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, groups: int = 1, width: int | None = None) -> None:
        super().__init__()
        width = width or planes
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    """torchvision's ResNet with bottlenecks, narrow."""

    def __init__(self, groups: int = 1, widths: tuple[int, ...] = (4, 8, 12, 16)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        stages, inplanes = [], 8
        for index, (planes, blocks) in enumerate(zip(widths, (2, 1, 2, 1), strict=True)):
            stage = []
            for block in range(blocks):
                stride = 2 if index and not block else 1
                stage.append(Bottleneck(inplanes, planes, stride, groups, planes * 2 if groups > 1 else None))
                inplanes = planes * Bottleneck.expansion
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, 10)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.fc(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


@published("resnet50", (3, 64, 64), "one shared in-place ReLU, Sequential downsample, torch.flatten")
def resnet50() -> nn.Module:
    return ResNet()


@published("resnext50", (3, 64, 64), "grouped 3 × 3 convolutions in bottlenecks")
def resnext50() -> nn.Module:
    return ResNet(groups=4)


class PreActBlock(nn.Module):
    """He et al. 2016: the shortcut branches off after the first activation."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


@published("preact_resnet", (3, 32, 32), "BatchNorm before convolutions, hasattr shortcut, sums without activation")
class PreActResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False)
        self.layers = nn.Sequential(PreActBlock(8, 8, 1), PreActBlock(8, 16, 2), PreActBlock(16, 16, 1))
        self.bn = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.layers(out)
        out = F.relu(self.bn(out))
        out = F.avg_pool2d(out, 8)
        out = out.view(out.size(0), -1)
        out = self.linear(out)
        return out


class LambdaLayer(nn.Module):
    def __init__(self, lambd) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, x: Tensor) -> Tensor:
        return self.lambd(x)


class CifarBlock(nn.Module):
    """An option-A block whose shortcut is an empty Sequential or a lambda."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = LambdaLayer(
                lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


@published("cifar_resnet", (3, 32, 32), "functional ReLU, lambda pad shortcut, avg_pool2d of the whole map, view")
class CifarResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(CifarBlock(8, 8), CifarBlock(8, 8))
        self.layer2 = nn.Sequential(CifarBlock(8, 16, 2), CifarBlock(16, 16))
        self.layer3 = nn.Sequential(CifarBlock(16, 32, 2), CifarBlock(32, 32))
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer1(out)
        out = self.layer2(out)
        out = self.layer3(out)
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        out = self.linear(out)
        return out


class RegNetBlock(nn.Module):
    """RegNetY: grouped bottleneck with squeeze-and-excitation, as named steps of a Sequential."""

    def __init__(self, inputs: int, outputs: int, stride: int, group_width: int, squeeze: int) -> None:
        super().__init__()
        self.proj = None
        if stride != 1 or inputs != outputs:
            self.proj = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.f = nn.Sequential()
        self.f.add_module("a", _conv_bn_relu(inputs, outputs, 1))
        self.f.add_module("b", _conv_bn_relu(outputs, outputs, 3, stride, outputs // group_width))
        self.f.add_module("se", SqueezeExcitation(outputs, squeeze))
        self.f.add_module("c", nn.Sequential(nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.f(x) if self.proj is not None else x + self.f(x)
        return self.activation(x)


class SqueezeExcitation(nn.Module):
    """Scale each channel by what two 1 × 1 convolutions make of the channels' means."""

    def __init__(self, channels: int, squeeze: int, activation=nn.ReLU, scale_activation=nn.Sigmoid) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def _scale(self, x: Tensor) -> Tensor:
        scale = self.avgpool(x)
        scale = self.fc1(scale)
        scale = self.activation(scale)
        scale = self.fc2(scale)
        return self.scale_activation(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self._scale(x) * x


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


@published("regnet_y", (3, 32, 32), "squeeze-and-excitation by multiplication, grouped convolutions, x + f(x)")
class RegNetY(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_relu(3, 8, 3, 2)
        self.trunk_output = nn.Sequential(
            RegNetBlock(8, 16, 2, 4, 4), RegNetBlock(16, 16, 1, 4, 4), RegNetBlock(16, 24, 2, 8, 6)
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.trunk_output(x)
        x = self.avgpool(x)
        x = x.flatten(start_dim=1)
        return self.fc(x)


class Bottle2neck(nn.Module):
    """Res2Net: the width is split, each part receives the part before it."""

    def __init__(self, inputs: int, width: int, scale: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width * scale, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width * scale)
        self.nums = scale - 1
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(self.nums)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(self.nums)])
        self.conv3 = nn.Conv2d(width * scale, inputs, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        spx = torch.split(out, self.width, 1)
        for i in range(self.nums):
            sp = spx[i] if i == 0 else sp + spx[i]  # noqa: F821
            sp = self.convs[i](sp)
            sp = self.relu(self.bns[i](sp))
            out = sp if i == 0 else torch.cat((out, sp), 1)
        out = torch.cat((out, spx[self.nums]), 1)
        out = self.bn3(self.conv3(out))
        out += residual
        return self.relu(out)


@published("res2net", (3, 32, 32), "torch.split, a loop with a carried sum, growing concatenation")
class Res2Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_relu(3, 16, 3, 2)
        self.layer1 = nn.Sequential(Bottle2neck(16, 4, 4), Bottle2neck(16, 4, 4))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem(x))
        return self.fc(x.mean((2, 3)))
