"""The run folder: what a run leaves, and the locks that keep processes from each other's runs.

- `files`: a folder of files, written whole or not at all
- `places`: whether a command can write where its results are to go
- `runs`: beginning, continuing and opening runs
"""

from calibquant.runfolder.files import (
    FORMAT_VERSION,
    WAIT,
    RunFolder,
    alone,
    disk_error,
    make_folder,
    sha256,
    shared_folder,
    write_alone,
    write_atomic,
)
from calibquant.runfolder.places import check_file, check_place
from calibquant.runfolder.runs import (
    QUANTIZATION,
    TRAINED,
    TRAINING,
    final_path,
    interrupted_run,
    kind_of,
    new_run,
    newest_run,
    open_run,
)
from calibquant.strangers import CHECKPOINT, RECEIPT

__all__ = [
    "CHECKPOINT", "FORMAT_VERSION", "QUANTIZATION", "RECEIPT", "TRAINED", "TRAINING", "WAIT", "RunFolder", "alone",
    "check_file", "check_place", "disk_error", "final_path", "interrupted_run", "kind_of", "make_folder", "new_run",
    "newest_run", "open_run", "sha256", "shared_folder", "write_alone", "write_atomic",
]  # fmt: skip
