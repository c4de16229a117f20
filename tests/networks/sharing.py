"""Small networks that share, reuse or compute weights, fold badly, or read integers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import register
from .constructs import IMAGE, TwoStage, conv_bn


@register("conv_used_twice_before_bn", IMAGE, "a convolution's output feeds BatchNorm and something else: no folding")
class ConvOutputUsedTwice(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(self.bn(y)) + y


@register("bn_before_conv", IMAGE, "BatchNorm on the image and after a ReLU, before padded convolutions: no folding")
class BatchNormFirst(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(3)
        self.bn1 = nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        return self.bn1(F.relu(x))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.bn0(x))


@register("bn_variants", IMAGE, "BatchNorm without affine, another eps, functional, and two in a row")
class BatchNormVariants(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, eps=0.1), nn.BatchNorm2d(8))
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        bn = self.bn
        y = F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, 1e-3)
        return F.relu(y)


@register("conv_called_twice", IMAGE, "one convolution module at two places of the graph")
class ConvCalledTwice(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.conv(x))))


@register("block_called_twice", IMAGE, "one Conv-BN-ReLU block at three places of the graph, with a skip")
class BlockCalledTwice(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(*conv_bn(8, 8), nn.ReLU(inplace=True))

    def middle(self, x: Tensor) -> Tensor:
        y = self.block(x)
        y = self.block(F.max_pool2d(y, 2))
        return self.block(y) + y


@register("conv_with_two_bns", IMAGE, "one convolution at two places, each followed by its own BatchNorm")
class ConvWithTwoBatchNorms(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

    def middle(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = F.relu(norm(self.conv(x)))
        return x


@register("bn_called_twice", IMAGE, "one BatchNorm after two different convolutions")
class BatchNormCalledTwice(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)])
        self.bn = nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.convs[0](x))) + F.relu(self.bn(self.convs[1](x)))


@register("tied_linears", IMAGE, "two Linears share one Parameter, a third uses it transposed")
class TiedLinears(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight

    def head(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(F.relu(self.a(x.mean((2, 3))))))
        return self.fc(F.linear(y, self.a.weight.t()))


@register("tied_convs", IMAGE, "two convolutions share weight but not bias; only one is followed by BatchNorm")
class TiedConvs(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight
        self.bn = nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.bn(self.a(x)))))


@register("tied_embedding", (7,), "an Embedding of integers whose weight is also the classifier's", tokens=20)
class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.hidden = nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.gelu(self.hidden(self.embedding(tokens)))
        return F.linear(x.mean(1), self.embedding.weight)


@register("token_convolution", (11,), "integer input, Embedding, transpose, Conv1d, maximum over time", tokens=20)
class TokenConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 10, 3, padding=1)
        self.fc = nn.Linear(10, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        x = torch.relu(self.conv(x))
        return self.fc(x.max(dim=2).values)


@register("positions", IMAGE, "Embedding of torch.arange positions added to the features of patches")
class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.positions = nn.Embedding(16, 8)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        where = torch.arange(x.shape[1], device=x.device)
        x = x + self.positions(where)
        return self.fc(F.relu(self.norm(x)).mean(dim=1))


@register("attention", IMAGE, "products of two activations: q @ k transposed, softmax, @ v, einsum-free")
class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(-2, -1) * 8**-0.5, dim=-1)
        x = x + self.proj(torch.matmul(weights, v))
        return self.fc(x.mean(1))


@register("reflect_padding", IMAGE, "convolutions with padding_mode reflect, circular and replicate, BatchNorm behind")
def reflect_padding() -> nn.Module:
    modes = ("reflect", "circular", "replicate")
    layers: list[nn.Module] = []
    for index, mode in enumerate(modes):
        layers += [nn.Conv2d(8 if index else 3, 8, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@register("same_padding", IMAGE, 'padding="same" with odd, even and dilated kernels, and padding="valid"')
def same_padding() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 4, padding="same"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2),
        nn.Conv2d(8, 8, 3, padding="valid"),
        nn.Flatten(),
        nn.Linear(8 * 14 * 14, 5),
    )


class WeightStandardizedConv(nn.Conv2d):
    """Qiao et al. 2019: the weight is normalized in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        mean = weight.mean(dim=(1, 2, 3), keepdim=True)
        std = (weight - mean).std(dim=(1, 2, 3), keepdim=True) + 1e-5
        weight = (weight - mean) / std
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups) * 0.2


@register("weight_standardized", IMAGE, "a convolution's weight computed from a parameter in forward; GroupNorm")
class WeightStandardized(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.conv = WeightStandardizedConv(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


@register("functional_conv", IMAGE, "F.conv2d and F.conv_transpose2d with bare parameters and F.batch_norm statistics")
class FunctionalConv(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.15)
        self.bias = nn.Parameter(torch.randn(8) * 0.1)
        self.up = nn.Parameter(torch.randn(8, 8, 2, 2) * 0.2)

    def middle(self, x: Tensor) -> Tensor:
        x = F.relu(torch.conv2d(x, self.weight, self.bias, stride=2, padding=1))
        return F.relu(F.conv_transpose2d(x, self.up, stride=2))


@register("parametrized", IMAGE, "torch.nn.utils.parametrizations.weight_norm on a convolution")
class Parametrized(TwoStage):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))
