"""Networks of the zoo in the structure and with the names of other authors, who wrote the files that users have.

Each is written from its authors' description, narrow or small where that does not change a name: what a file in their
naming computes is known without the tables that translate it. `randomize` draws weights that no layer hides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that keep the signal's size, and BatchNorms far from the identity; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return network.eval()


# ---- timm: EfficientNet's builder makes MobileNetV2 and MNASNet


class TimmDepthwiseSeparable(nn.Module):
    def __init__(self, in_chs: int, out_chs: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv_dw = conv(in_chs, in_chs, 3, groups=in_chs)
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.act = act()
        self.conv_pw = conv(in_chs, out_chs, 1)
        self.bn2 = nn.BatchNorm2d(out_chs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv_dw(x)))
        return self.bn2(self.conv_pw(x))


class TimmInvertedResidual(nn.Module):
    def __init__(self, in_chs: int, out_chs: int, kernel: int, stride: int, exp: int, act: type[nn.Module]) -> None:
        super().__init__()
        mid_chs = in_chs * exp
        self.has_skip = in_chs == out_chs and stride == 1
        self.conv_pw = conv(in_chs, mid_chs, 1)
        self.bn1 = nn.BatchNorm2d(mid_chs)
        self.conv_dw = conv(mid_chs, mid_chs, kernel, stride, groups=mid_chs)
        self.bn2 = nn.BatchNorm2d(mid_chs)
        self.conv_pwl = conv(mid_chs, out_chs, 1)
        self.bn3 = nn.BatchNorm2d(out_chs)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.act(self.bn1(self.conv_pw(x)))
        x = self.act(self.bn2(self.conv_dw(x)))
        x = self.bn3(self.conv_pwl(x))
        return x + shortcut if self.has_skip else x


class TimmEfficientNet(nn.Module):
    """`stages`: (repetitions, kernel, stride, expansion, channels) of the stages behind the separable one."""

    def __init__(
        self, stem: int, first: int, stages: Sequence[tuple[int, int, int, int, int]], act: type[nn.Module],
        num_classes: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_stem = conv(3, stem, 3, 2)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act = act()
        blocks: list[nn.Module] = [nn.Sequential(TimmDepthwiseSeparable(stem, first, act))]
        chs = first
        for repeats, kernel, stride, exp, out in stages:
            stage = []
            for i in range(repeats):
                stage.append(TimmInvertedResidual(chs, out, kernel, stride if i == 0 else 1, exp, act))
                chs = out
            blocks.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = conv(chs, 1280, 1)
        self.bn2 = nn.BatchNorm2d(1280)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv_stem(x)))
        x = self.act(self.bn2(self.conv_head(self.blocks(x))))
        return self.classifier(x.mean((2, 3)))


def timm_mobilenetv2_035(num_classes: int) -> nn.Module:
    """ds_r1_k3_s1_c16, ir_r2_k3_s2_e6_c24, ir_r3_k3_s2_e6_c32, … times 0.35, in multiples of 8."""
    stages = [
        (2, 3, 2, 6, 8),
        (3, 3, 2, 6, 16),
        (4, 3, 2, 6, 24),
        (3, 3, 1, 6, 32),
        (3, 3, 2, 6, 56),
        (1, 3, 1, 6, 112),
    ]
    return TimmEfficientNet(16, 8, stages, nn.ReLU6, num_classes)


def timm_mobilenetv2_110d(num_classes: int) -> nn.Module:
    """The same with 1.2 times as many blocks in the middle stages, and 1.1 times as wide."""
    stages = [
        (3, 3, 2, 6, 24),
        (4, 3, 2, 6, 32),
        (5, 3, 2, 6, 72),
        (4, 3, 1, 6, 104),
        (4, 3, 2, 6, 176),
        (1, 3, 1, 6, 352),
    ]
    return TimmEfficientNet(32, 16, stages, nn.ReLU6, num_classes)


def timm_mnasnet_050(num_classes: int) -> nn.Module:
    """ds_r1_k3_s1_c16_noskip, ir_r3_k3_s2_e3_c24, ir_r3_k5_s2_e3_c40, … times 0.5, in multiples of 8."""
    stages = [
        (3, 3, 2, 3, 16),
        (3, 5, 2, 3, 24),
        (3, 5, 2, 6, 40),
        (2, 3, 1, 6, 48),
        (4, 5, 2, 6, 96),
        (1, 3, 1, 6, 160),
    ]
    return TimmEfficientNet(16, 8, stages, nn.ReLU, num_classes)


# ---- BRECQ: MobileNetV2 with one flat Sequential a block


class BrecqInvertedResidual(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden_dim = inp * expand_ratio
        self.use_res_connect = stride == 1 and inp == oup
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers += [conv(inp, hidden_dim, 1), nn.BatchNorm2d(hidden_dim), nn.ReLU6()]
        layers += [conv(hidden_dim, hidden_dim, 3, stride, hidden_dim), nn.BatchNorm2d(hidden_dim), nn.ReLU6()]
        self.conv = nn.Sequential(*layers, conv(hidden_dim, oup, 1), nn.BatchNorm2d(oup))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class BrecqMobileNetV2(nn.Module):
    def __init__(self, n_class: int) -> None:
        super().__init__()
        features: list[nn.Module] = [nn.Sequential(conv(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU6())]
        inp = 32
        setting = [
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ]  # fmt: skip
        for t, c, n, s in setting:
            for i in range(n):
                features.append(BrecqInvertedResidual(inp, c, s if i == 0 else 1, t))
                inp = c
        features.append(nn.Sequential(conv(inp, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6()))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(1280, n_class))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


# ---- pycls and BRECQ: RegNetX


class PyclsStem(nn.Module):
    def __init__(self, w_out: int) -> None:
        super().__init__()
        self.conv = conv(3, w_out, 3, 2)
        self.bn = nn.BatchNorm2d(w_out)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class PyclsTransform(nn.Module):
    def __init__(self, w_in: int, w_out: int, stride: int, group_w: int) -> None:
        super().__init__()
        self.a = conv(w_in, w_out, 1)
        self.a_bn = nn.BatchNorm2d(w_out)
        self.b = conv(w_out, w_out, 3, stride, w_out // group_w)
        self.b_bn = nn.BatchNorm2d(w_out)
        self.c = conv(w_out, w_out, 1)
        self.c_bn = nn.BatchNorm2d(w_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a_bn(self.a(x)))
        x = F.relu(self.b_bn(self.b(x)))
        return self.c_bn(self.c(x))


class PyclsBlock(nn.Module):
    def __init__(self, w_in: int, w_out: int, stride: int, group_w: int) -> None:
        super().__init__()
        self.proj_block = w_in != w_out or stride != 1
        if self.proj_block:
            self.proj = conv(w_in, w_out, 1, stride)
            self.bn = nn.BatchNorm2d(w_out)
        self.f = PyclsTransform(w_in, w_out, stride, group_w)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu((self.bn(self.proj(x)) if self.proj_block else x) + self.f(x))


class PyclsHead(nn.Module):
    def __init__(self, w_in: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(w_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class PyclsRegNet(nn.Module):
    """Stages s1 … s4 of blocks b1 …"""

    def __init__(self, depths: Sequence[int], widths: Sequence[int], group_w: int, num_classes: int) -> None:
        super().__init__()
        self.stem = PyclsStem(32)
        w_in = 32
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                stage.add_module(f"b{j + 1}", PyclsBlock(w_in, width, 2 if j == 0 else 1, group_w))
                w_in = width
            self.add_module(f"s{i + 1}", stage)
        self.head = PyclsHead(w_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


# ---- timm: RegNetX


class TimmConvNormAct(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, kernel, stride, groups)
        self.bn = nn.BatchNorm2d(outputs)
        self.apply_act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.apply_act else x


class TimmBottleneck(nn.Module):
    def __init__(self, in_chs: int, out_chs: int, stride: int, group_size: int) -> None:
        super().__init__()
        self.conv1 = TimmConvNormAct(in_chs, out_chs, 1)
        self.conv2 = TimmConvNormAct(out_chs, out_chs, 3, stride, out_chs // group_size)
        self.conv3 = TimmConvNormAct(out_chs, out_chs, 1, act=False)
        self.downsample: nn.Module = nn.Identity()
        if in_chs != out_chs or stride != 1:
            self.downsample = TimmConvNormAct(in_chs, out_chs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + self.downsample(x))


class TimmRegNet(nn.Module):
    def __init__(self, depths: Sequence[int], widths: Sequence[int], group_size: int, num_classes: int) -> None:
        super().__init__()
        self.stem = TimmConvNormAct(3, 32, 3, 2)
        chs = 32
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            stage = nn.Sequential()
            for j in range(1, depth + 1):
                stage.add_module(f"b{j}", TimmBottleneck(chs, width, 2 if j == 1 else 1, group_size))
                chs = width
            self.add_module(f"s{i}", stage)
        self.head = PyclsHead(chs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x
