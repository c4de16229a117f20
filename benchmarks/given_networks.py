"""Trained networks that benchmarks measure, from files that the zoo does not read: EfficientNet-Lite0 and ResNet-8."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from calibquant import zoo

# EfficientNet-Lite0 (Tan and Le, ICML 2019; the "lite" form has ReLU6 and no squeeze-and-excitation):
# blocks, kernel, stride of the first, expansion, outputs
LITE0 = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
         (1, 3, 1, 6, 320)]  # fmt: skip
RESNET8_CONVOLUTIONS = ("stem.0", "first_stack.block.0", "first_stack.block.3", "second_stack.block.0",
                        "second_stack.block.3", "second_stack.residual", "third_stack.block.0", "third_stack.block.3",
                        "third_stack.residual")  # fmt: skip


class Block(nn.Module):
    """An inverted residual with the key names of the common PyTorch EfficientNet."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = nn.Conv2d(wide, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Images (N, 3, 224, 224), (x - 127) / 128 on 0 … 255, to (N, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, inputs = [], 32
        for count, kernel, stride, expansion, outputs in LITE0:
            for number in range(count):
                blocks.append(Block(inputs, outputs, kernel, 1 if number else stride, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(inputs, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


def efficientnet_lite0(weights: Path) -> nn.Module:
    """EfficientNet-Lite0 with the weights of a safetensors file."""
    network = EfficientNetLite0()
    state = {name: tensor.float() for name, tensor in load_file(weights).items()}
    missing = network.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    return network.eval()


def resnet8(weights: Path) -> nn.Module:
    """MLPerf Tiny's ResNet-8 with TensorFlow's padding and epsilon, from tensors in the order of its Keras file."""
    network = zoo.build("resnet8", padding="tf_same")
    state = load_file(weights)
    own = network.state_dict()
    norms = [name for name in RESNET8_CONVOLUTIONS if "residual" not in name]
    for number, name in enumerate(RESNET8_CONVOLUTIONS):
        own |= {f"{name}.{key}": state[f"conv.{number}.{key}"] for key in ("weight", "bias")}
    for number, name in enumerate(norms):
        stem, _, place = name.rpartition(".")
        keys = ("weight", "bias", "running_mean", "running_var")
        own |= {f"{stem}.{int(place) + 1}.{key}": state[f"bn.{number}.{key}"] for key in keys}
    own |= {f"fc.{key}": state[f"fc.{key}"] for key in ("weight", "bias")}
    network.load_state_dict(own)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return network.eval()
