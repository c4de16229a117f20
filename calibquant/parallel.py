"""Threads, memory, devices and processes: the only place that asks torch where and how wide to run.

Under torchrun each process holds the whole network and its share of the images; see docs/scaling.md. Alone, a process
has all images, and whatever speaks to the others returns what it was given.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from calibquant.errors import ParallelError, RecipeError

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # names of glibc's mallopt
VALUES_AT_ONCE = 3 << 19  # numbers in the images of a batch: ten images of 3 x 224 x 224
SMALL = 10_000_000  # multiply-adds for an image; a network of fewer takes one thread: benchmarks/results/threads.md
LARGEST_KEPT = 256 << 20  # bytes; a larger tensor, such as all images' features, goes back to the system when freed

_GONE = ("gloo", "nccl", "connection", "peer")  # words of torch's errors when another process is gone

Value = TypeVar("Value")


def set_threads(count: int | None) -> int:
    """Set torch's CPU threads and return the number in force; None takes the number that the process has of its own.

    From then on the process also keeps the memory that it frees.
    """
    _keep_freed_memory()
    if torch.get_num_threads() != _threads.chosen:
        _threads.own = torch.get_num_threads()
    _threads.decoding = _threads.chosen = count or _threads.own
    torch.set_num_threads(_threads.chosen)
    return _threads.chosen


def fit_threads(count: int | None, network: nn.Module, images: Tensor) -> int:
    """Set torch's CPU threads for a network and return the number in force.

    A small network takes one thread: several would wait for each other longer than they work. The choice depends on the
    network alone, so that a run can be repeated. How many threads decode images does not change.

    Args:
        count: of the recipe; None chooses by the network, unless OMP_NUM_THREADS says how many there are.
        network: in eval mode.
        images: a batch that it takes, (N, ...).
    """
    set_threads(count)
    if count is None and "OMP_NUM_THREADS" not in os.environ and products_of(network, images[:1]) < SMALL:
        _threads.chosen = 1
        torch.set_num_threads(1)
    return _threads.chosen


def decoding_threads() -> int:
    """How many threads may decode images: the recipe's number, or as many as the process has of its own."""
    now = torch.get_num_threads()
    return _threads.decoding if now == _threads.chosen else now


def products_of(network: nn.Module, images: Tensor) -> int:
    """How many products the network's convolutions and matrix products sum up for these images."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    return int(counter.get_total_flops()) // 2


@dataclass
class _Threads:
    """How many torch had before a run set them, how many that run set, and how many decode images meanwhile."""

    own: int = 0
    chosen: int = 0
    decoding: int = 0


_threads = _Threads()


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
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=in_bfloat16(device, precision))


def in_bfloat16(device: torch.device | str, precision: str) -> bool:
    """Whether `reduced_precision` of the same arguments computes in bfloat16."""
    kind = torch.device(device).type
    fast = torch.cuda.is_bf16_supported() if kind == "cuda" else kind == "cpu" and _cpu_has_bfloat16()
    return precision == "bfloat16" or (precision == "auto" and fast)


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
    if name == "cuda" and world() > 1:
        name = f"cuda:{_local_rank()}"
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


@contextmanager
def together() -> Iterator[None]:
    """Within the context the processes that torchrun started know each other; without torchrun nothing happens.

    GPUs speak by NCCL and CPUs by gloo.

    Raises:
        ParallelError: the others cannot be reached, or one of them is lost on the way.
    """
    started = "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not started or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(_local_rank())
    with _speaking():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    before = signal.signal(signal.SIGTERM, _ended)  # torchrun sends it to those that are left
    try:
        with _speaking():
            yield
            dist.barrier()  # none leaves while another still speaks
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def world() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them; the first one, 0, writes and speaks."""
    return dist.get_rank() if world() > 1 else 0


def share(count: int) -> range:
    """Which of `count` things are this process's: neighbours, so that the shares in order are all of them once.

    Example:
        >>> share(5)
        range(0, 5)
    """
    return range(count * rank() // world(), count * (rank() + 1) // world())


def local(rows: Tensor, count: int) -> Tensor:
    """Of row numbers below `count` those in this process's share, counted from its first; int64."""
    mine = share(count)
    return rows if world() == 1 else rows[(rows >= mine.start) & (rows < mine.stop)] - mine.start


def drawn(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Batches that every process draws alike; from then on each has random numbers of its own."""
    if world() == 1:
        return batches
    alike = list(batches)
    torch.manual_seed(torch.initial_seed() + rank())
    return iter(alike)


def every(value: Value) -> list[Value]:
    """The values of all processes, in their order; they are pickled among processes of one job."""
    if world() == 1:
        return [value]
    found: list[Value | None] = [None] * world()
    with _speaking():
        dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def first(value: Value) -> Value:
    """The first process's value."""
    if world() == 1:
        return value
    found = [value]
    with _speaking():
        dist.broadcast_object_list(found, 0)
    return found[0]


def total(number: float) -> float:
    """The sum of all processes' numbers, the same in each."""
    return sum(every(number)) if world() > 1 else number


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Give each parameter the sum of its gradients over all processes; one without a gradient counts as zero."""
    if world() == 1:
        return
    chosen = list(parameters)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
    flat = torch.cat([g.reshape(-1) for g in found])
    with _speaking():
        dist.all_reduce(flat)
    for parameter, part in zip(chosen, flat.split([g.numel() for g in found]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def align(network: nn.Module) -> None:
    """Give every process the first one's buffers: each finds statistics of BatchNorm on its own images."""
    if world() > 1:
        with _speaking():
            for buffer in network.buffers():
                if buffer.is_floating_point():  # codes are the same, and gloo knows no int16
                    dist.broadcast(buffer, 0)


def synchronized(network: nn.Module) -> nn.Module:
    """A network whose gradients become the mean over all processes in backward; alone, the network itself."""
    if world() == 1:
        return network
    with warnings.catch_warnings():  # torch 2.13 has another name for this, which 2.9 does not know
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(network, broadcast_buffers=False)


@contextmanager
def _speaking() -> Iterator[None]:
    """What torch raises when another process is gone becomes an error with a mend."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in _GONE):
            raise
        raise _lost("lost another process, whose own message says why") from error


def _ended(*_: object) -> None:
    raise _lost("was told to end: another process is lost, whose own message says why, or the job was stopped")


def _lost(problem: str) -> ParallelError:
    return ParallelError(f"process {os.environ.get('RANK', '?')}", problem, "start the job again with --resume")


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
