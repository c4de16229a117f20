"""Random small networks of all ops that have an integer form; each is drawn from its seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "relu6": F.relu6, "hardtanh": F.hardtanh, "leaky_relu": F.leaky_relu, "sigmoid": torch.sigmoid,
    "tanh": torch.tanh, "silu": F.silu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "gelu": F.gelu,
    "elu": F.elu, "softplus": F.softplus, "mish": F.mish, "traced_silu": lambda x: x * torch.sigmoid(x),
    "traced_hardswish": lambda x: x * F.relu6(x + 3) / 6, "square": lambda x: x * x,
    "residual_relu": lambda x: x + F.relu(x),
    "scaled": lambda x: 0.7 * x - 0.2,
}  # fmt: skip


class Layer(nn.Module):
    """A drawn layer: its modules, and a function of them and of what enters."""

    def __init__(self, kind: str, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.kind, self.function, self.parts = kind, function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


@dataclass(frozen=True)
class Shape:
    """Channels, height and width."""

    channels: int
    height: int
    width: int


class Draw:
    """Draws layers; every choice comes from the seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def layer(self, shape: Shape) -> Layer:
        kinds = [
            self.convolution, self.convolution, self.convolution, self.depthwise, self.function, self.function,
            self.residual, self.concatenation, self.repeated, self.product, self.gate, self.pool, self.pool, self.pad,
            self.transposed, self.resize, self.move, self.linear, self.attention, self.constant,
        ]  # fmt: skip
        return self.random.choice(kinds)(shape)

    def convolution(self, shape: Shape) -> Layer:
        """Any size, stride, dilation, groups and padding that fit."""
        pick, c = self.random.choice, shape.channels
        kernel = (pick((1, 2, 3)), pick((1, 2, 3, 5)))
        dilation = (pick((1, 1, 2)), pick((1, 1, 2)))
        padding = tuple(self.random.randint(0, k) for k in kernel)
        if any(
            s + 2 * p < (k - 1) * d + 1
            for s, p, k, d in zip((shape.height, shape.width), padding, kernel, dilation, strict=True)
        ):
            kernel, dilation = (1, 1), (1, 1)
        groups = pick([g for g in (1, 1, 2, c) if c % g == 0])
        outputs = groups * pick((1, 2, 3)) if groups < c else c
        conv = nn.Conv2d(
            c, outputs, kernel, (pick((1, 1, 2)), pick((1, 1, 2, 3))), padding, dilation, groups, pick((True, False))
        )
        return Layer("conv", lambda x, m: m(x), conv)

    def depthwise(self, shape: Shape) -> Layer:
        c, kernel = shape.channels, self.random.choice((3, 5))
        return Layer("depthwise", lambda x, m: F.relu6(m(x)), nn.Conv2d(c, c, kernel, 1, kernel // 2, groups=c))

    def function(self, shape: Shape) -> Layer:
        kind = self.random.choice(sorted(FUNCTIONS))
        conv = nn.Conv2d(shape.channels, shape.channels, 1)
        return Layer(kind, lambda x, m: FUNCTIONS[kind](m(x)), conv)

    def residual(self, shape: Shape) -> Layer:
        c, kind = shape.channels, self.random.choice(("add", "sub", "relu_after"))
        conv = nn.Conv2d(c, c, 3, padding=1)
        return {
            "add": Layer("add", lambda x, m: m(x) + x, conv), "sub": Layer("sub", lambda x, m: x - m(x), conv),
            "relu_after": Layer("add_relu", lambda x, m: F.relu(m(x) + x), conv),
        }[kind]  # fmt: skip

    def concatenation(self, shape: Shape) -> Layer:
        first, second = nn.Conv2d(shape.channels, 3, 1), nn.Conv2d(shape.channels, 2, 3, padding=1)
        after = self.random.choice((F.relu, F.silu, lambda x: x))
        return Layer("cat", lambda x, a, b: torch.cat([F.relu(a(x)), after(b(x))], 1), first, second)

    def repeated(self, shape: Shape) -> Layer:
        """The same tensor twice, and a tensor beside its moved copy."""
        dim = self.random.choice((1, 2, 3))
        conv = nn.Conv2d(shape.channels, 2, 1)
        return self.random.choice(
            (
                Layer("cat_twice", lambda x, m: (lambda y: torch.cat([y, x, y], dim))(F.relu6(x)), conv),
                Layer("cat_of_conv", lambda x, m: (lambda y: torch.cat([y, y], dim))(m(x)), conv),
                Layer("moved", lambda x, m: torch.cat([x, F.pad(x, (1, -1))], 1), conv),
            )
        )

    def product(self, shape: Shape) -> Layer:
        c = shape.channels
        return Layer(
            "mul", lambda x, a, b: a(x) * torch.sigmoid(b(x)), nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 3, padding=1)
        )

    def gate(self, shape: Shape) -> Layer:
        """Squeeze and excitation."""
        squeeze, excite = nn.Conv2d(shape.channels, 2, 1), nn.Conv2d(2, shape.channels, 1)
        end = self.random.choice((torch.sigmoid, F.hardsigmoid))
        return Layer("gate", lambda x, a, b: x * end(b(F.relu(a(x.mean((2, 3), keepdim=True))))), squeeze, excite)

    def pool(self, shape: Shape) -> Layer:
        kernel = tuple(min(n, self.random.choice((1, 2, 3))) for n in (shape.height, shape.width))
        padding = tuple(self.random.randint(0, k // 2) for k in kernel)
        stride, ceil, counted = (
            self.random.choice((1, 2, 3)),
            self.random.choice((True, False)),
            self.random.choice((True, False)),
        )
        size = (min(shape.height, 3), min(shape.width, 2))
        return self.random.choice(
            (
                Layer("max_pool", lambda x: F.max_pool2d(x, kernel, stride, padding, 1, ceil)),
                Layer("avg_pool", lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil, counted)),
                Layer("avg_divisor", lambda x: F.avg_pool2d(x, kernel, stride, padding, divisor_override=3)),
                Layer("adaptive_avg", lambda x: F.adaptive_avg_pool2d(x, size)),
                Layer("adaptive_max", lambda x: F.adaptive_max_pool2d(x, size)),
                Layer("mean", lambda x: x - x.mean((2, 3), keepdim=True)),
            )
        )

    def pad(self, shape: Shape) -> Layer:
        sides = [self.random.randint(0, 2) for _ in range(4)]
        reflected = [min(side, shape.width - 1 if i < 2 else shape.height - 1) for i, side in enumerate(sides)]
        return self.random.choice(
            (
                Layer("pad", lambda x: F.pad(x, sides)),
                Layer("pad_value", lambda x: F.pad(x, sides, value=0.5)),
                Layer("reflect", lambda x: F.pad(x, reflected, "reflect")),
            )
        )

    def transposed(self, shape: Shape) -> Layer:
        layer = nn.ConvTranspose2d(
            shape.channels, 3, self.random.choice((2, 3)), 2, 1, bias=self.random.choice((True, False))
        )
        return Layer("conv_transpose", lambda x, m: F.relu(m(x)), layer)

    def resize(self, shape: Shape) -> Layer:
        factors, corners = (
            (self.random.choice((0.6, 1.3, 2)), self.random.choice((1.0, 1.7, 2))),
            self.random.choice((True, False)),
        )
        if shape.height * shape.width > 150 or min(shape.height, shape.width) < 2:
            factors = (1.0, 1.0)
        return self.random.choice(
            (
                Layer("nearest", lambda x: F.interpolate(x, scale_factor=factors)),
                Layer(
                    "bilinear", lambda x: F.interpolate(x, scale_factor=factors, mode="bilinear", align_corners=corners)
                ),
                Layer("bilinear_size", lambda x: F.interpolate(x, (5, 8), mode="bilinear", align_corners=corners)),
            )
        )

    def move(self, shape: Shape) -> Layer:
        c = shape.channels
        moves = [
            Layer("transpose", lambda x: x.transpose(2, 3)),
            Layer("slice", lambda x: x[:, :, ::2, : max(1, shape.width - 1)]),
        ]
        moves += [Layer("shuffle", lambda x: F.channel_shuffle(x, 2))] if c % 2 == 0 else []
        moves += [Layer("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2))] if c % 4 == 0 else []
        if shape.height % 2 == 0 and shape.width % 2 == 0:
            moves.append(Layer("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2)))
        return self.random.choice(moves)

    def linear(self, shape: Shape) -> Layer:
        """On the channels of a map, and on its rows."""
        rows, channels = nn.Linear(shape.width, 4), nn.Linear(shape.channels, 5, bias=False)
        return self.random.choice(
            (
                Layer("linear_4d", lambda x, m: m(x), rows),
                Layer(
                    "linear_3d",
                    lambda x, m: m(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:]),
                    channels,
                ),
            )
        )

    def attention(self, shape: Shape) -> Layer:
        def attend(x: Tensor) -> Tensor:
            y = x.flatten(2)
            return (torch.softmax(y @ y.transpose(1, 2) / 4, -1) @ y).unflatten(2, x.shape[2:])

        return Layer("attention", attend)

    def constant(self, shape: Shape) -> Layer:
        gain = torch.linspace(0.5, 1.5, shape.channels).reshape(-1, 1, 1)
        return self.random.choice((Layer("gain", lambda x: x * gain), Layer("offset", lambda x: x + gain - 1)))


class RandomNetwork(nn.Module):
    """A stem, drawn layers, and a head of 5 outputs.

    Args:
        seed: of every choice and weight.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        draw = Draw(seed)
        self.size = (3, draw.random.randint(5, 13), draw.random.randint(5, 13))
        self.stem = nn.Conv2d(3, draw.random.choice((4, 6, 8)), 3, padding=1)
        self.layers = nn.ModuleList()
        x = self.stem(torch.zeros(1, *self.size))
        for _ in range(draw.random.randint(3, 7)):
            layer = draw.layer(Shape(*x.shape[1:]))
            self.layers.append(layer)
            x = layer(x).detach()
        self.head = nn.Linear(x.shape[1], 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))

    @property
    def kinds(self) -> list[str]:
        """What was drawn."""
        return [str(layer.kind) for layer in self.layers]
