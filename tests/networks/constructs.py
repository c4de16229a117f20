"""Small networks with one construct each: activations, in-place arithmetic, pools, flattening, padding, shape logic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import register

IMAGE = (3, 16, 16)


def conv_bn(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class TwoStage(nn.Module):
    """Two Conv-BNs, `middle` between them (overridden by each network below), mean and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv_bn(3, 8)
        self.second = conv_bn(8, 8)
        self.fc = nn.Linear(8, 5)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.middle(self.first(x))))


@register("shared_relu", IMAGE, "one in-place ReLU module is called after every layer")
class SharedReLU(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def middle(self, x: Tensor) -> Tensor:
        return self.relu(x)

    def head(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(self.relu(x).mean((2, 3))))


@register("inplace_reused", IMAGE, "in-place add_, relu_ and += change tensors whose old names are read again")
class InplaceReused(TwoStage):
    def middle(self, x: Tensor) -> Tensor:
        y = self.second(x)
        y.add_(x)
        z = y
        x += y
        y.relu_()
        return x + z * 0.5

    def head(self, x: Tensor) -> Tensor:
        F.relu_(x)
        torch.relu_(x)
        x *= 0.5
        return super().head(x)


@register("inplace_view", IMAGE, "an in-place ReLU on a slice changes the tensor it is a view of")
class InplaceView(TwoStage):
    def middle(self, x: Tensor) -> Tensor:
        half = x[:, :4]
        half.relu_()
        return x


@register("clamps", IMAGE, "ReLU6 written as hardtanh, clamp, clamp_ and min/max")
class Clamps(TwoStage):
    def middle(self, x: Tensor) -> Tensor:
        x = F.hardtanh(x, 0.0, 6.0) + torch.clamp(x, 0, 6) + x.clamp(min=0.0, max=6.0) + F.relu6(x)
        return x.clamp_(0, 6) + x.clamp(min=0)

    def head(self, x: Tensor) -> Tensor:
        return super().head(torch.clamp_min(x, 0.0))


@register("multiplications", IMAGE, "by Python numbers, by a parameter, by a buffer, division, negation, subtraction")
class Multiplications(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("offset", torch.randn(1, 8, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        y = 2 * x * self.gain
        y = y / 3.0 + self.offset
        return torch.mul(y, 0.7) - x

    def head(self, x: Tensor) -> Tensor:
        return super().head(1.0 - (-x))


@register("spatial_means", IMAGE, "mean([2, 3]), mean(dim=(-2, -1), keepdim=True), adaptive pools, two means, summed")
class SpatialMeans(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def head(self, x: Tensor) -> Tensor:
        y = x.mean([2, 3]) + x.mean(dim=(-2, -1), keepdim=True).flatten(1)
        y = y + self.pool(x).flatten(1) + F.adaptive_avg_pool2d(x, (1, 1)).squeeze(-1).squeeze(-1)
        y = y + torch.mean(x, dim=3).mean(2)
        return self.fc(y)


@register("flattenings", IMAGE, "seven ways from (N, C, 1, 1) or (N, C, H, W) to (N, features)")
class Flattenings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn(3, 4, 2)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(16, 5)
        self.small = nn.Linear(4, 5)
        self.flatten = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        y = self.pool(x)
        batch, channels, height, width = y.shape
        flat = torch.flatten(y, 1) + y.flatten(1) + y.view(y.size(0), -1) + y.view(-1, 16) + self.flatten(y)
        flat = flat + y.reshape(batch, channels * height * width) + torch.reshape(y, (y.shape[0], -1))
        one = F.adaptive_avg_pool2d(x, 1)
        return self.fc(flat) + self.small(one.squeeze(-1).squeeze(-1)) + self.small(one[:, :, 0, 0])


@register("additions", IMAGE, "operator, torch.add, x.add, add with alpha, sub, a scalar, and a sum over a list")
class Additions(TwoStage):
    def middle(self, x: Tensor) -> Tensor:
        y = self.second(x)
        z = torch.add(x, y) + x.add(y)
        z = torch.add(z, y, alpha=2)
        z = z - x + 1.5
        return sum([x, y, z])  # type: ignore[return-value]


@register("concatenations", IMAGE, "torch.cat of a tuple and of a list, torch.concat, torch.concatenate, negative axis")
class Concatenations(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(32, 8, 1)

    def middle(self, x: Tensor) -> Tensor:
        pair = torch.cat((x, F.relu(x)), 1)
        pair = torch.concat([pair, x], dim=-3)
        return self.third(torch.concatenate([pair, x * 2], dim=1))


@register("paddings", IMAGE, "F.pad and ZeroPad2d, asymmetric, negative, with a value, and of channels")
class Paddings(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.strided = nn.Conv2d(8, 4, 3, stride=2)

    def middle(self, x: Tensor) -> Tensor:
        x = self.strided(self.pad(F.relu(x)))
        x = F.pad(x, (1, 0, 2, 1)) + F.pad(x, [1, 0, 2, 1], mode="constant", value=0.25)
        x = F.pad(x, (-1, 0, 0, -1))
        return F.pad(x, (0, 0, 0, 0, 2, 2))


@register("option_a_shortcut", IMAGE, "every second pixel by slicing, channels padded with zeros, added")
class OptionA(TwoStage):
    def middle(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(x), 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.middle(self.first(x)))
        y = y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3))
        return self.head(F.relu(y))


@register("linear_batchnorm", IMAGE, "Linear and BatchNorm1d, with and without bias, functional linear")
class LinearBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(768, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12)
        )
        self.bn = nn.BatchNorm1d(12)
        self.weight = nn.Parameter(torch.randn(5, 12) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.bn(self.body(x))), self.weight)


@register("depthwise_grouped", IMAGE, "depthwise with multiplier, grouped, dilated, asymmetric stride, unequal padding")
def depthwise_grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, groups=3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU6(),
        nn.Conv2d(12, 8, 3, padding=2, dilation=2, groups=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, (3, 5), stride=(2, 1), padding=(1, 2), groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


@register("pools", IMAGE, "ceil_mode, count_include_pad=False, dilation, divisor, overlapping, functional and modules")
class Pools(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.max = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.avg = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)

    def middle(self, x: Tensor) -> Tensor:
        x = self.avg(self.max(F.relu(x)))
        x = F.max_pool2d(x, 3, stride=1, padding=1, dilation=2)
        x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=True)
        return F.adaptive_max_pool2d(x, 2)


@register("activations", IMAGE, "PReLU, LeakyReLU, ELU, softplus, sigmoid, tanh, Mish, GELU(tanh), softmax")
class Activations(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.prelu = nn.PReLU(8, init=0.3)
        self.leaky = nn.LeakyReLU(0.1, inplace=True)
        self.elu = nn.ELU()
        self.mish = nn.Mish()
        self.gelu = nn.GELU(approximate="tanh")

    def middle(self, x: Tensor) -> Tensor:
        return self.prelu(x) + self.leaky(x * 1) + self.elu(x) + F.softplus(x) + x * torch.sigmoid(x)

    def head(self, x: Tensor) -> Tensor:
        x = self.mish(x) + self.gelu(x) + F.leaky_relu(x, 0.2) + x.sigmoid() + F.silu(x) + F.hardswish(x)
        return F.softmax(0.1 * super().head(x), dim=1)


@register("shuffles", IMAGE, "ChannelShuffle, PixelShuffle, PixelUnshuffle, Upsample, permute")
class Shuffles(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.shuffle = nn.ChannelShuffle(2)
        self.up = nn.PixelShuffle(2)
        self.down = nn.PixelUnshuffle(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")

    def middle(self, x: Tensor) -> Tensor:
        x = self.down(self.up(self.shuffle(F.relu(x))))
        x = self.upsample(x)
        return x.permute(0, 1, 3, 2)


@register("shape_branch", IMAGE, "a branch on the input's shape, which symbolic tracing cannot follow")
class ShapeBranch(TwoStage):
    def middle(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 8:
            x = F.max_pool2d(x, 2)
        for _ in range(x.size(1) // 4):
            x = F.relu(x) * 0.5 + x
        return x


@register("assertions", IMAGE, "assertions, isinstance and len() on the way, optional arguments left out")
class Assertions(TwoStage):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert x.dim() == 4, "images expected"
        assert isinstance(x, Tensor)
        if len(x.shape) != 4 or x.ndim != 4:
            raise ValueError("images expected")
        y = self.first(x)
        if mask is not None:
            y = y * mask
        return super().head(F.relu(self.second(y)))


@register("module_list", IMAGE, "a Python loop over a ModuleList with skips, and one over named_children")
class ModuleListLoop(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv_bn(8, 8) for _ in range(3)])
        self.pools = nn.ModuleDict({"a": nn.MaxPool2d(2), "b": nn.AvgPool2d(2)})

    def middle(self, x: Tensor) -> Tensor:
        kept = []
        for index, layer in enumerate(self.layers):
            x = x + F.relu(layer(x)) if index else F.relu(layer(x))
            kept.append(x)
        for _, pool in self.pools.items():
            x = pool(x)
        return x


@register("dictionary", IMAGE, "features travel in a dictionary and come out of it by name, as in detection backbones")
class Dictionary(TwoStage):
    def features(self, x: Tensor) -> dict[str, Tensor]:
        out = {"low": F.relu(self.first(x))}
        out["high"] = F.max_pool2d(F.relu(self.second(out["low"])), 2)
        return out

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        pooled = [value.mean((2, 3)) for value in features.values()]
        return self.fc(pooled[0] + features["high"].amax((2, 3)) + pooled[1])


@register("dead_code", IMAGE, "computed and never used: a layer, a side branch, an unused module and parameter")
class DeadCode(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.loose = nn.Parameter(torch.ones(3))

    def middle(self, x: Tensor) -> Tensor:
        self.second(x).mean()
        return F.dropout(F.relu(x), 0.5, self.training)
