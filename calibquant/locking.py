"""Locks between processes: who holds one works alone, and one that was killed holds none."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class HeldError(Exception):
    """Another process holds the lock; the message names it."""


@contextmanager
def locked(path: Path, wait: float = 0) -> Iterator[None]:
    """Hold the lock that a file stands for. The file is gone afterwards, unless the process is killed.

    Args:
        path: the file; it is made.
        wait: seconds to wait for a process that holds it.

    Raises:
        HeldError: another process holds it.
        OSError: the file cannot be made.
    """
    from filelock import FileLock, Timeout

    holder = _holder(path)  # before the attempt: some versions of filelock empty the file
    lock = FileLock(path, timeout=wait, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise HeldError(holder or _holder(path) or "another process") from None
    try:
        path.write_text(f"{os.getpid()} {platform.node()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):  # first: once it is free, the file may be another's
            path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    """The process that a lock's file names; "" where it names none."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            found = re.fullmatch(rb"(\d{1,10}) ([\w.-]{1,80})\n", file.read(128))
        if found is not None:
            host = found[2].decode()
            return f"process {int(found[1])}" + ("" if host == platform.node() else f" on {host}")
    return ""
