"""Locks keep processes from each other's runs; what a killed process left is taken or removed by the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from calibquant.errors import RunFolderError
from calibquant.locking import HeldError, locked
from calibquant.runfolder import alone, interrupted_run, new_run, open_run, shared_folder, write_alone

HOLD = "import sys, time; print('held', flush=True); time.sleep(600)"


@contextmanager
def other_process(program: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has said "held" and sleeps; it is killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def holding(body: str) -> str:
    """A program that holds what the context manager `body` gives."""
    return (
        "from pathlib import Path\nfrom calibquant.locking import locked\n"
        "from calibquant.runfolder import interrupted_run, new_run, shared_folder\n"
        f"with {body} as it:\n    {HOLD}\n"
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_lock_names_its_holder_and_is_free_when_that_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / ".x.lock"
    with other_process(holding("locked(Path('.x.lock'))"), tmp_path) as process:
        with pytest.raises(HeldError, match=f"^process {process.pid}$"), locked(lock):
            pass
        # Some versions of filelock empty the file at an attempt.
        with pytest.raises(HeldError, match=f"^(process {process.pid}|another process)$"), locked(lock):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert names(tmp_path) == [".x.lock"]
    with locked(lock):
        assert lock.read_text().split()[0] == str(os.getpid())
    assert names(tmp_path) == []


def test_a_lock_whose_file_names_nobody_is_held_by_another_process(tmp_path: Path) -> None:
    with locked(tmp_path / ".x.lock"):
        (tmp_path / ".x.lock").write_text("../../etc/passwd 1")
        with pytest.raises(HeldError, match=r"^another process$"), locked(tmp_path / ".x.lock"):
            pass


def test_a_new_run_removes_what_has_no_living_owner(tmp_path: Path) -> None:
    with other_process(holding("new_run(Path('.'), 'net')"), tmp_path) as living:
        with other_process(holding("new_run(Path('.'), 'net')"), tmp_path):
            assert names(tmp_path) == [".net-001.lock", ".net-001.partial", ".net-002.lock", ".net-002.partial"]
        (tmp_path / ".mine.lock").write_text("a lock of another program")
        (tmp_path / ".net-009.partial").write_text("a file, not a run")
        with new_run(tmp_path, "other"):
            assert ".net-002.partial" not in names(tmp_path)
            assert {".net-001.lock", ".net-001.partial", ".mine.lock", ".net-009.partial"} <= set(names(tmp_path))
        assert living.poll() is None
    with new_run(tmp_path, "other"):
        pass
    assert names(tmp_path) == [".mine.lock", ".net-009.partial", "other-001", "other-002"]


def test_what_can_be_continued_stays_and_is_continued_by_one(tmp_path: Path) -> None:
    partial = tmp_path / ".net-001.partial"
    partial.mkdir()
    (partial / "checkpoint.json").write_text("{}")
    run = tmp_path / "net-001"
    with other_process(holding("interrupted_run(Path('net-001'))"), tmp_path) as process:
        held = pytest.raises(RunFolderError, match=f"net-001: process {process.pid} is at work there; wait until")
        with held, interrupted_run(run):
            pass
    with new_run(tmp_path, "net") as folder:
        assert folder.path.name == ".net-002.partial"
    with interrupted_run(run) as folder:
        folder.remove("checkpoint*")
    assert names(tmp_path) == ["net-001", "net-002"]


def test_a_link_in_an_interrupted_run_is_not_followed(tmp_path: Path) -> None:
    partial = tmp_path / ".net-001.partial"
    partial.mkdir()
    (partial / "checkpoint.json").write_text("{}")
    (partial / "log.txt").symlink_to(tmp_path / "victim")
    with pytest.raises(RunFolderError, match=r"log.txt: is no regular file"), interrupted_run(tmp_path / "net-001"):
        pass


def test_a_study_and_an_export_have_a_folder_for_themselves(tmp_path: Path) -> None:
    with other_process(holding("shared_folder(Path('study'))"), tmp_path) as process:
        held = pytest.raises(RunFolderError, match=f"study: process {process.pid} is at work")
        with held, shared_folder(tmp_path / "study"):
            pass
    (tmp_path / "study/.a.json.1.tmp").write_text("what a kill left")
    with shared_folder(tmp_path / "study") as folder:
        folder.write("a.json", "{}")
    assert names(tmp_path) == ["study"]
    assert names(tmp_path / "study") == ["a.json"]


def test_files_are_added_to_a_run_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_run(tmp_path, "net") as folder:
        folder.write("a.txt", "a")
        folder.seal({})
    monkeypatch.setattr("calibquant.runfolder.files.WAIT", 0.1)
    with alone(tmp_path / "net-001"), pytest.raises(RunFolderError, match=f"process {os.getpid()} is at work there"):
        open_run(tmp_path / "net-001").add({"b.txt": b"b"})
    open_run(tmp_path / "net-001").add({"b.txt": b"b"})
    assert open_run(tmp_path / "net-001").read("b.txt") == b"b"


def test_a_file_of_several_writers_is_cleared_of_what_killed_ones_left(tmp_path: Path) -> None:
    for left in (".m[1].csv.77.tmp", ".m[1].csv.lock", ".other.csv.77.tmp"):
        (tmp_path / left).write_text("")
    write_alone(tmp_path / "m[1].csv", b"new")
    assert names(tmp_path) == [".other.csv.77.tmp", "m[1].csv"]
