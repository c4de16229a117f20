"""QDrop's block reconstruction written plainly from its paper and description: the reference that step_time.py times.

What a researcher would write for the units of a CIFAR ResNet in plain PyTorch: modules, autograd, two optimizers. It
uses nothing of CalibQuant. Sources: Nagel et al., ICML 2020 (AdaRound); Esser et al., ICLR 2020 (LSQ); Li et al., ICLR
2021 (BRECQ); Wei et al., ICLR 2022 (QDrop).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ZETA, GAMMA = 1.1, -0.1


@dataclass(frozen=True)
class Settings:
    """QDrop's hyper-parameters."""

    iterations: int = 20_000
    batch_size: int = 32
    drop: float = 0.5
    regularizer: float = 0.01
    warm_up: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    rounding_lr: float = 1e-3
    scale_lr: float = 4e-5


def round_ste(x: Tensor) -> Tensor:
    """Rounds; the gradient passes."""
    return (torch.round(x) - x).detach() + x


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`; its gradient is multiplied by `factor`."""
    return (x - x * factor).detach() + x * factor


class LsqActivation(nn.Module):
    """Fake-quantizes an activation with a learned scale; some values pass as they are."""

    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, qmax: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.clone())
        self.register_buffer("zero_point", zero_point.float())
        self.qmax, self.prob = qmax, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data.abs_()
        self.scale.data.clamp_(min=torch.finfo(torch.float32).eps)
        scale = scale_gradient(self.scale, 1 / math.sqrt(x.numel() * self.qmax))
        codes = torch.clamp(round_ste(x / scale) + self.zero_point, 0, self.qmax)
        x_q = (codes - self.zero_point) * scale
        if self.prob < 1:
            return torch.where(torch.rand_like(x) < self.prob, x_q, x)
        return x_q


class AdaRoundWeight(nn.Module):
    """A weight whose roundings are learned; scale and zero point broadcast against it."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, qmax: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.float())
        self.qmax = qmax
        fraction = weight / scale - torch.floor(weight / scale)
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1))

    def h(self) -> Tensor:
        """How far each weight is rounded up, in [0, 1]."""
        return torch.clamp(torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def forward(self) -> Tensor:
        codes = torch.clamp(torch.floor(self.weight / self.scale) + self.h() + self.zero_point, 0, self.qmax)
        return (codes - self.zero_point) * self.scale


class Convolution(nn.Module):
    """3 x 3, padded, BatchNorm folded into weight and bias."""

    bias: Tensor

    def __init__(self, weight: AdaRoundWeight, bias: Tensor, stride: int = 1) -> None:
        super().__init__()
        self.weight, self.stride = weight, stride
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), self.bias, self.stride, padding=1)


class Stem(nn.Module):
    """The first convolution."""

    def __init__(self, conv: Convolution, activation: LsqActivation) -> None:
        super().__init__()
        self.conv, self.activation = conv, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(F.relu(self.conv(x)))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut: the identity, or every second pixel and zeros for the new channels."""

    def __init__(self, convs: list[Convolution], activations: list[LsqActivation]) -> None:
        super().__init__()
        self.conv1, self.conv2 = convs
        self.activation1, self.activation2 = activations

    def shortcut(self, x: Tensor) -> Tensor:
        """The block's input in the shape of its output."""
        stride, new = self.conv1.stride, len(self.conv1.bias) - x.shape[1]
        if stride == 1:
            return x
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, new // 2, new - new // 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation1(F.relu(self.conv1(x)))
        return self.activation2(F.relu(self.conv2(y) + self.shortcut(x)))


class Head(nn.Module):
    """Global pool and classifier; the logits are not quantized."""

    bias: Tensor

    def __init__(self, weight: AdaRoundWeight, bias: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.mean((2, 3)), self.weight(), self.bias)


def beta_at(step: int, settings: Settings) -> float:
    """The regularizer's exponent: linearly from one end to the other after the warm-up."""
    start = settings.warm_up * settings.iterations
    progress = (step - start) / (settings.iterations - start)
    return settings.beta[1] + (settings.beta[0] - settings.beta[1]) * max(0.0, 1 - progress)


def learn(
    unit: nn.Module,
    quantized: Tensor,
    float_input: Tensor,
    target: Tensor,
    settings: Settings,
    draw: Callable[[int, int], Tensor] | None = None,
) -> None:
    """QDrop's optimization of one unit.

    Args:
        unit: its roundings and scales are learned.
        quantized, float_input, target: cached input in the quantized network, input and output in the float network.
        settings: the hyper-parameters.
        draw: (images, batch size) -> the rows of a batch; by default independent draws as in QDrop.
    """
    roundings = [m for m in unit.modules() if isinstance(m, AdaRoundWeight)]
    activations = [m for m in unit.modules() if isinstance(m, LsqActivation)]
    for activation in activations:
        activation.prob = 1 - settings.drop
    optimizer = torch.optim.Adam([r.alpha for r in roundings], lr=settings.rounding_lr)
    scale_optimizer = schedule = None
    if activations:
        scale_optimizer = torch.optim.Adam([a.scale for a in activations], lr=settings.scale_lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(scale_optimizer, settings.iterations)
    for step in range(1, settings.iterations + 1):
        if draw is None:
            rows = torch.randint(0, len(target), (settings.batch_size,))
        else:
            rows = draw(len(target), settings.batch_size)
        x = quantized[rows]
        if settings.drop > 0:
            x = torch.where(torch.rand_like(x) < 1 - settings.drop, x, float_input[rows])
        optimizer.zero_grad()
        if scale_optimizer is not None:
            scale_optimizer.zero_grad()
        loss = (unit(x) - target[rows]).pow(2).sum(1).mean()
        if step >= settings.warm_up * settings.iterations:
            beta = beta_at(step, settings)
            for rounding in roundings:
                loss = loss + settings.regularizer * (1 - (2 * rounding.h() - 1).abs().pow(beta)).sum()
        loss.backward()
        optimizer.step()
        if scale_optimizer is not None and schedule is not None:
            scale_optimizer.step()
            schedule.step()
