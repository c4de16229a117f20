"""Threads and devices: the only place that asks torch where and how wide to run."""

from __future__ import annotations

import torch

from calibquant.errors import RecipeError


def set_threads(count: int | None) -> int:
    """Set torch's CPU threads (None leaves them) and return the number in force."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


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
