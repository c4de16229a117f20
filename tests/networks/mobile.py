"""Mobile networks, written the way their authors write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .case import published
from .resnets import SqueezeExcitation


class ConvBNReLU(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        padding = (kernel - 1) // 2
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden_dim = round(inp * expand_ratio)
        self.use_res_connect = stride == 1 and inp == oup
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvBNReLU(inp, hidden_dim, kernel=1))
        layers.extend(
            [
                ConvBNReLU(hidden_dim, hidden_dim, stride=stride, groups=hidden_dim),
                nn.Conv2d(hidden_dim, oup, 1, 1, 0, bias=False),
                nn.BatchNorm2d(oup),
            ]
        )
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)


@published("mobilenet_v2", (3, 32, 32), "Conv-BN-ReLU6 Sequentials, depthwise convolutions, linear bottlenecks")
class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [ConvBNReLU(3, 8, stride=2)]
        features += [InvertedResidual(8, 8, 1, 1), InvertedResidual(8, 12, 2, 4), InvertedResidual(12, 12, 1, 4)]
        features += [InvertedResidual(12, 16, 2, 4), InvertedResidual(16, 16, 1, 4), ConvBNReLU(16, 48, kernel=1)]
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1)).reshape(x.shape[0], -1)
        x = self.classifier(x)
        return x


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int, groups: int, act: nn.Module | None) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=0.001, momentum=0.01),
    ]
    return nn.Sequential(*layers, act) if act is not None else nn.Sequential(*layers)


class MobileNetV3Block(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, kernel: int, stride: int, se: bool, hs: bool) -> None:
        super().__init__()
        act = nn.Hardswish if hs else nn.ReLU
        self.use_res_connect = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [_conv_bn(inputs, hidden, 1, 1, 1, act(inplace=True))]
        layers.append(_conv_bn(hidden, hidden, kernel, stride, hidden, act(inplace=True)))
        if se:
            layers.append(SqueezeExcitation(hidden, 8, scale_activation=nn.Hardsigmoid))
        layers.append(_conv_bn(hidden, outputs, 1, 1, 1, None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


@published("mobilenet_v3", (3, 32, 32), "hardswish, squeeze-and-excitation with hardsigmoid, two-layer classifier")
class MobileNetV3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_bn(3, 8, 3, 2, 1, nn.Hardswish(inplace=True)),
            MobileNetV3Block(8, 16, 8, 3, 1, se=True, hs=False),
            MobileNetV3Block(8, 24, 12, 5, 2, se=False, hs=True),
            MobileNetV3Block(12, 24, 12, 5, 1, se=True, hs=True),
            _conv_bn(12, 32, 1, 1, 1, nn.Hardswish(inplace=True)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(32, 24), nn.Hardswish(inplace=True), nn.Dropout(p=0.2, inplace=True), nn.Linear(24, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x


class MNASBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        mid = inputs * expansion
        self.apply_residual = inputs == outputs and stride == 1
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, mid, 1, bias=False),
            nn.BatchNorm2d(mid, momentum=0.0003),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, mid, kernel, padding=kernel // 2, stride=stride, groups=mid, bias=False),
            nn.BatchNorm2d(mid, momentum=0.0003),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs, momentum=0.0003),
        )

    def forward(self, input: Tensor) -> Tensor:
        if self.apply_residual:
            return self.layers(input) + input
        return self.layers(input)


@published("mnasnet", (3, 32, 32), "one flat Sequential, a branch on an attribute, mean over [2, 3]")
class MNASNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Sequential(MNASBlock(8, 12, 3, 2, 3), MNASBlock(12, 12, 3, 1, 3)),
            nn.Sequential(MNASBlock(12, 16, 5, 2, 3), MNASBlock(16, 16, 5, 1, 3)),
            nn.Conv2d(16, 40, 1, bias=False),
            nn.BatchNorm2d(40),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Sequential(nn.Dropout(p=0.2, inplace=True), nn.Linear(40, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        x = x.mean([2, 3])
        return self.classifier(x)


class StochasticDepth(nn.Module):
    """Drops whole residual branches while training; the identity in eval mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        noise = torch.empty((input.shape[0], 1, 1, 1), dtype=input.dtype).bernoulli_(1 - self.p).div_(1 - self.p)
        return input * noise


class MBConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.use_res_connect = stride == 1 and inputs == outputs
        layers = [_conv_bn(inputs, hidden, 1, 1, 1, nn.SiLU(inplace=True))] if expansion != 1 else []
        layers.append(_conv_bn(hidden, hidden, kernel, stride, hidden, nn.SiLU(inplace=True)))
        squeeze = SqueezeExcitation(hidden, max(1, inputs // 4), activation=nn.SiLU)
        self.block = nn.Sequential(*layers, squeeze, _conv_bn(hidden, outputs, 1, 1, 1, None))
        self.stochastic_depth = StochasticDepth(0.2)

    def forward(self, input: Tensor) -> Tensor:
        result = self.block(input)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += input
        return result


@published("efficientnet", (3, 32, 32), "SiLU, squeeze-and-excitation, stochastic depth that eval mode switches off")
class EfficientNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_bn(3, 8, 3, 2, 1, nn.SiLU(inplace=True)),
            nn.Sequential(MBConv(8, 8, 3, 1, 1)),
            nn.Sequential(MBConv(8, 12, 5, 2, 4), MBConv(12, 12, 5, 1, 4)),
            _conv_bn(12, 40, 1, 1, 1, nn.SiLU(inplace=True)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(p=0.2, inplace=True), nn.Linear(40, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)
