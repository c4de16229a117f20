"""The run folder: it appears complete or not at all, under a number of its own, and damage is noticed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from calibquant.errors import RunFolderError
from calibquant.runfolder import (
    FORMAT_VERSION,
    RunFolder,
    final_path,
    make_folder,
    new_run,
    newest_run,
    open_run,
    sha256,
    write_atomic,
)


def make(root: Path, stem: str = "net-w4a4", **files: str) -> Path:
    """A sealed run."""
    with new_run(root, stem) as folder:
        for name, content in files.items():
            folder.write(name, content)
        folder.seal({"seed": 1})
        final = final_path(folder.path)
    return final


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


@pytest.mark.parametrize("target", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_that_fails_leaves_the_old_content(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_atomic(tmp_path / "a.json", b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(target, full)
    with pytest.raises(RunFolderError, match=r"a.json: .*No space left .*; free space"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]
    assert write_atomic(path, b"new").read_bytes() == b"new"


def test_text_is_utf8_and_json_keeps_its_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("a.json", {"z": "größe", "a": [1, 2.5]})
    assert list(folder.read_json("a.json").items()) == [("z", "größe"), ("a", [1, 2.5])]
    assert "größe".encode() in folder.read("a.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("b.json", float("nan"))


def test_a_run_appears_when_it_is_complete(tmp_path: Path) -> None:
    with new_run(tmp_path / "new/runs", "net") as folder:
        folder.write("a.txt", "a")
        assert names(tmp_path / "new/runs") == [".net-001.lock", ".net-001.partial"]
    assert names(tmp_path / "new/runs") == ["net-001"]
    assert (tmp_path / "new/runs/net-001/a.txt").read_text() == "a"


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), RunFolderError("a", "b", "c")])
def test_an_error_removes_the_partial_run(error: BaseException, tmp_path: Path) -> None:
    def stop(folder: RunFolder) -> None:
        folder.write("a.txt", "a")
        assert names(tmp_path) == [".net-001.lock", ".net-001.partial"]
        raise error

    with pytest.raises(type(error)), new_run(tmp_path, "net") as folder:
        stop(folder)
    assert names(tmp_path) == []


def test_runs_are_numbered_by_stem(tmp_path: Path) -> None:
    (tmp_path / "net-w4a4-007").mkdir()
    (tmp_path / ".net-w4a4-009.partial").mkdir()  # a run that was killed and can be continued
    (tmp_path / ".net-w4a4-009.partial" / "checkpoint.json").write_text("{}")
    (tmp_path / "net-w4a4-notes").mkdir()
    assert make(tmp_path).name == "net-w4a4-010"
    assert make(tmp_path).name == "net-w4a4-011"
    assert make(tmp_path, "net-w4a").name == "net-w4a-001"
    assert make(tmp_path, "net+w4a4").name == "net+w4a4-001"


def test_two_runs_at_once_have_their_own_numbers(tmp_path: Path) -> None:
    with new_run(tmp_path, "net") as first, new_run(tmp_path, "net") as second:
        first.write("a.txt", "first")
        second.write("a.txt", "second")
        assert first.path != second.path
    assert {p.name: (p / "a.txt").read_text() for p in tmp_path.iterdir()} == {"net-001": "first", "net-002": "second"}


def test_a_number_taken_since_the_folder_was_listed_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = Path.iterdir
    (tmp_path / ".net-001.partial").mkdir()
    (tmp_path / "net-002").mkdir()
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))
    with new_run(tmp_path, "net") as folder:
        assert folder.path.name == ".net-003.partial"
    monkeypatch.setattr(Path, "iterdir", listing)
    assert names(tmp_path) == [".net-001.partial", "net-002", "net-003"]


def test_the_newest_run_is_the_last_completed(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run yet"):
        newest_run(tmp_path / "nowhere")
    first, second, third = make(tmp_path, "b"), make(tmp_path, "a"), make(tmp_path, "c")
    (tmp_path / ".d-001.partial").mkdir()
    (tmp_path / ".d-001.partial/receipt.json").write_text("{}")
    (tmp_path / "no-run").mkdir()
    for age, run in enumerate((third, second, first)):  # the last named is the oldest
        os.utime(run / "receipt.json", ns=(0, 10**18 - age))
    assert newest_run(tmp_path) == third
    os.utime(second / "receipt.json", ns=(0, 2 * 10**18))
    assert newest_run(tmp_path) == second


def test_the_receipt_holds_every_file_but_the_log_and_itself(tmp_path: Path) -> None:
    run = make(tmp_path, **{"a.txt": "a", "b.json": "{}", "log.txt": "x"})
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt == {
        "format_version": FORMAT_VERSION,
        "seed": 1,
        "files": {"a.txt": sha256(b"a"), "b.json": sha256(b"{}")},
    }
    assert open_run(run).read("a.txt") == b"a"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "b", "a.txt: is damaged .*its hash"),
        ("a.txt", "", "a.txt: is damaged .*its hash"),
        ("receipt.json", "{", "receipt.json: is damaged .*no valid JSON"),
        ("receipt.json", "[]", "receipt.json: format version None"),
        ("receipt.json", '{"format_version": 1, "files": []}', "receipt.json: format version None"),
        ("receipt.json", '{"format_version": 2, "files": {}}', "receipt.json: format version 2 is not 1"),
        ("receipt.json", '{"format_version": 1, "files": {"gone": ""}}', "gone: cannot be read"),
    ],
)
def test_a_damaged_run_is_not_opened(name: str, content: str, message: str, tmp_path: Path) -> None:
    run = make(tmp_path, **{"a.txt": "a"})
    (run / name).write_text(content)
    with pytest.raises(RunFolderError, match=message):
        open_run(run)


def test_an_edited_log_is_no_damage(tmp_path: Path) -> None:
    run = make(tmp_path, **{"a.txt": "a", "log.txt": "x"})
    (run / "log.txt").unlink()
    assert open_run(run).path == run


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot be written \(Not a directory\)"):
        make_folder(tmp_path / "file/runs")
    make_folder(tmp_path / "a/b")
    make_folder(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()


class Killed(BaseException):
    """Stands for a kill: nothing but the process's own clean-up by the file system follows."""


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """End the process, as it were, at the n-th renaming."""
    replace, done = Path.replace, iter(range(call))

    def killed(self: Path, target: Path) -> Path:
        if next(done, None) is None:
            raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)


def test_files_are_added_to_a_run_and_replaced(tmp_path: Path) -> None:
    first, run = make(tmp_path, **{"a.txt": "a"}), make(tmp_path, **{"a.txt": "a", "b.txt": "b"})
    os.utime(first / "receipt.json", ns=(0, 10**18))
    os.utime(run / "receipt.json", ns=(0, 9 * 10**17))
    open_run(run).add({"c.txt": b"c", "a.txt": b"new"})
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["seed"] == 1
    assert receipt["files"] == {n: sha256(d) for n, d in (("a.txt", b"new"), ("b.txt", b"b"), ("c.txt", b"c"))}
    assert [open_run(run).read(f"{n}.txt") for n in "abc"] == [b"new", b"b", b"c"]
    assert newest_run(tmp_path) == first, "an export makes no run newer"
    before = (run / "receipt.json").stat().st_ino
    open_run(run).add({"c.txt": b"c"})
    assert (run / "receipt.json").stat().st_ino == before, "what is there already is not written again"
    assert names(run) == ["a.txt", "b.txt", "c.txt", "receipt.json"]


@pytest.mark.parametrize("call", range(6))
def test_a_run_is_accepted_whenever_adding_is_killed(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, **{"a.txt": "a", "b.txt": "b"})
    kill_at(monkeypatch, call)
    with pytest.raises(Killed):
        open_run(run).add({"a.txt": b"new", "c.txt": b"c"})
    monkeypatch.undo()
    folder = open_run(run)
    listed = folder.read_json("receipt.json")["files"]
    assert "b.txt" in listed
    if "c.txt" in listed:
        assert (folder.read("a.txt"), folder.read("c.txt")) == (b"new", b"c")
    folder.add({"a.txt": b"new", "c.txt": b"c"})
    if "c.txt" not in listed:
        assert names(run) == ["a.txt", "b.txt", "c.txt", "receipt.json"], "what the kill left is gone"
    assert open_run(run).read("c.txt") == b"c"


@pytest.mark.parametrize("call", range(6))
def test_a_full_disk_leaves_no_added_file(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, **{"b.txt": "b"})
    fsync, done = os.fsync, iter(range(call))

    def full(descriptor: int) -> None:
        if next(done, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    if call > 2:  # two files and the receipt
        open_run(run).add({"a.txt": b"a", "c.txt": b"c"})
        return
    with pytest.raises(RunFolderError, match="No space left on device"):
        open_run(run).add({"a.txt": b"a", "c.txt": b"c"})
    monkeypatch.undo()
    assert names(run) == ["b.txt", "receipt.json"]
    open_run(run)


def test_a_folder_inside_a_run_is_not_sealed(tmp_path: Path) -> None:
    with new_run(tmp_path, "net") as folder:
        (folder.path / "vectors").mkdir()
        folder.write("a.txt", "a")
        folder.seal({})
    assert list(open_run(tmp_path / "net-001").read_json("receipt.json")["files"]) == ["a.txt"]
