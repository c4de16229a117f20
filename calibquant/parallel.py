"""Threads, memory and devices: the only place that asks torch where and how wide to run."""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Sequence
from functools import cache

import torch

from calibquant.errors import RecipeError

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # names of glibc's mallopt
VALUES_AT_ONCE = 3 << 19  # numbers in the images of a batch: ten images of 3 x 224 x 224
LARGEST_KEPT = 256 << 20  # bytes; a larger tensor, such as all images' features, goes back to the system when freed


def set_threads(count: int | None) -> int:
    """Set torch's CPU threads (None leaves them) and return the number in force.

    From then on the process also keeps the memory that it frees.
    """
    _keep_freed_memory()
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


@cache
def _keep_freed_memory() -> None:
    """Let tensors reuse freed memory; no value that is computed changes.

    By default glibc gives each tensor over 32 MB back to the system, and a network on images of 224 x 224 then spends
    most of its time on having the pages of new ones cleared: see benchmarks/results/memory.md.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(TRIM_THRESHOLD, -1)  # never


def images_at_once(shape: Sequence[int], most: int, device: torch.device | str = "cpu") -> int:
    """How many images pass through a network at once where nothing depends on it.

    On a CPU large batches only cost memory: more than fit its caches are not faster.

    Args:
        shape: of the network's input, (N, ...).
        most: for small images, and on other devices.

    Example:
        >>> images_at_once((1, 3, 32, 32), 250), images_at_once((1, 3, 224, 224), 250)
        (250, 10)
    """
    if torch.device(device).type != "cpu":
        return most
    return max(1, min(most, VALUES_AT_ONCE // math.prod(shape[1:])))


def reduced_precision(device: torch.device | str, precision: str) -> torch.autocast:
    """A context in which products are computed in a precision; values between them follow.

    Args:
        device: where.
        precision: float32, bfloat16, or auto: bfloat16 where the processor computes with it.
    """
    kind = torch.device(device).type
    fast = torch.cuda.is_bf16_supported() if kind == "cuda" else kind == "cpu" and _cpu_has_bfloat16()
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16" or (precision == "auto" and fast))


@cache
def _cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 by itself; without, it is slower than float32."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()


def resolve_device(name: str) -> torch.device:
    """The device a recipe's `device` names; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        RecipeError: the name is unknown, or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError("device", f"'{name}' is unknown", "use auto, cpu, cuda, cuda:N or mps") from None
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise RecipeError("device", f"this machine has no '{name}'", "use device=auto or device=cpu")
    return device
