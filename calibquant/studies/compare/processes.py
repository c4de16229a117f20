"""Several cells at a time, each in a process of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from types import FrameType

from calibquant.errors import RunFolderError
from calibquant.studies.compare.cells import Cell, Way, complete


def complete_in_processes(cells: Mapping[int, Cell], jobs: int, finished: Callable[[int, Way], None]) -> None:
    """Complete cells; `finished` hears the place of each and what had to be done, in this process.

    When a cell fails, or on Ctrl-C, the others are interrupted: what had a checkpoint can be gone on with.

    Raises:
        CalibQuantError: the first that a cell met.
        KeyboardInterrupt: Ctrl-C.
    """
    queue, ours = iter(cells.items()), set(active_children())
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_enlist) as pool:
        # One cell a worker and no more: what a pool has queued beyond that cannot be taken back.
        running = {pool.submit(_work, cell): i for i, cell in islice(queue, jobs)}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    way = future.result()
                    finished(running.pop(future), way)
                    running |= {pool.submit(_work, cell): i for i, cell in islice(queue, 1)}
        except BrokenProcessPool:
            problem = "a process ended without a word, often for want of memory"
            raise RunFolderError("calibquant compare, jobs", problem, "try fewer") from None
        except BaseException:
            for process in set(active_children()) - ours:
                if process.pid is not None:
                    os.kill(process.pid, signal.SIGINT)
            raise


def _enlist() -> None:
    """A worker hears Ctrl-C only while it has a cell, and ends with the study however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End as if killed, which every run survives: an orphan would go on for hours and disturb the next study."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(cell: Cell) -> Way:
    signal.signal(signal.SIGINT, _interrupt_once)
    try:
        return complete(cell)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt_once(signum: int, frame: FrameType | None) -> None:
    """A second Ctrl-C, or the study's after the terminal's, does not disturb the cleaning up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
