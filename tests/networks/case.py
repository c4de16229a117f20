"""How a test network is described, seeded and registered."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Factory = TypeVar("Factory", bound=Callable[[], nn.Module])


@dataclass(frozen=True)
class NetworkCase:
    """A test network.

    Args:
        build: makes the network in eval mode, the same weights at every call, without touching the global generator.
        input_shape: of one example, without the batch.
        published: an architecture from the literature, not a single construct.
        note: what makes it worth testing.
        tokens: for networks of integer input, the size of the vocabulary; 0 for images.
    """

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    published: bool
    note: str
    tokens: int = 0

    def example(self, batch: int = 2, seed: int = 0) -> Tensor:
        """A random input of shape (batch, *input_shape): float32, or int64 below `tokens`."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, *self.input_shape)
        if self.tokens:
            return torch.randint(self.tokens, shape, generator=generator)
        return torch.randn(shape, generator=generator)


NETWORKS: dict[str, NetworkCase] = {}
UNTRACEABLE: dict[str, NetworkCase] = {}


def register(
    name: str,
    input_shape: tuple[int, ...],
    note: str,
    *,
    published: bool = False,
    tokens: int = 0,
    table: dict[str, NetworkCase] = NETWORKS,
) -> Callable[[Factory], Factory]:
    """A decorator that puts a class or function without arguments into a table of networks."""

    def add(factory: Factory) -> Factory:
        if name in table:
            raise ValueError(f"two networks are called {name}")
        seed = zlib.crc32(name.encode())
        table[name] = NetworkCase(lambda: _seeded(factory, seed), input_shape, published, note, tokens)
        return factory

    return add


def published(name: str, input_shape: tuple[int, ...], note: str) -> Callable[[Factory], Factory]:
    """`register` for an architecture from the literature."""
    return register(name, input_shape, note, published=True)


def untraceable(name: str, input_shape: tuple[int, ...], note: str) -> Callable[[Factory], Factory]:
    """`register` for a network that capture must refuse."""
    return register(name, input_shape, note, table=UNTRACEABLE)


def _seeded(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = factory()
        for module in network.modules():
            _randomize(module)
    return network.eval()


def _randomize(module: nn.Module) -> None:
    """Weights that keep the signal's size, and normalizations that are far from the identity."""
    with torch.no_grad():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm) and module.weight is not None:
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
