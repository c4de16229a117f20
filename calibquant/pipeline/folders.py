"""The run folder where several processes work at one run: the first one writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from calibquant import parallel
from calibquant.runfolder import RunFolder


@contextmanager
def run_folder(opened: Callable[[], AbstractContextManager[RunFolder]]) -> Iterator[RunFolder]:
    """A run folder for the length of a run.

    The first process opens it; each other one gets the files that stand in it, in a folder of its own that vanishes.
    So every process does the same, and only what the first one writes stays.

    Args:
        opened: `new_run` or `interrupted_run` with their arguments.
    """
    if parallel.rank() == 0:
        with opened() as folder:
            files = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
            parallel.first((folder.path.name, files))
            yield folder
        return
    name, files = parallel.first(("", dict[str, bytes]()))
    with TemporaryDirectory() as place:
        folder = RunFolder(Path(place) / name)
        folder.path.mkdir()
        for file, data in files.items():
            folder.write(file, data)
        yield folder
