"""The run that a command is about, and dotted recipe keys behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run the Python code that the recipe of a run folder names.")
]


def run_and_overrides(target: Path | None, overrides: list[str] | None, runs: Path) -> tuple[Path, list[str]]:
    """A target that may be left out: then the newest run is taken, and what stands in its place is an override.

    Raises:
        RunFolderError: there is no run yet.
    """
    from calibquant.runfolder import newest_run

    keys = overrides or []
    if target is not None and "=" in str(target) and not target.exists():
        target, keys = None, [str(target), *keys]
    return (newest_run(runs) if target is None else target), keys
