"""Which folders are runs: data, whose code is not run and whose places are not written to."""

from __future__ import annotations

import os
from pathlib import Path

RECEIPT, CHECKPOINT = "receipt.json", "checkpoint.json"  # in a finished and in an interrupted run folder


def in_run_folder(path: Path) -> bool:
    """Whether a file lies in a run folder, finished or not, by its path or by where a link leads.

    Example:
        >>> in_run_folder(Path("configs/digits.yaml"))
        False
    """
    above = {*path.absolute().parents, *Path(os.path.realpath(path)).parents}
    return any(folder.name.endswith(".partial") or (folder / RECEIPT).is_file() for folder in above)
