"""The command where output, disk, memory or time is short: no run is lost, and each failure is one line."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from calibquant.cli import console, main
from calibquant.cli.output import SPELLING, Output, prepare_streams
from calibquant.cli.signals import heard
from calibquant.cli.waiting import wait_briefly
from calibquant.errors import OutOfMemoryError, RunFolderError
from calibquant.pipeline import stages
from calibquant.pipeline.reporting import enough_memory
from calibquant.recipe import loading
from calibquant.runfolder import check_file, check_place
from calibquant.zoo import build, save_weights

RECIPE = """
model: {name: digits_resnet, weights: weights.safetensors}
data: {kind: digits, preprocess: {resize: 16, mean: [0.5], std: [0.5]}}
calibration: {count: 16}
evaluation: {count: 32}
export: {onnx: false}
"""
QUANTIZE = "quantize recipe.yaml"
RUN = Path("runs/digits_resnet-w4a4-001")
SHORT = ("reconstruct.method=adaround", "reconstruct.iterations=2", "reconstruct.batch_size=4")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe and random weights."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_weights(build("digits_resnet"), "weights.safetensors")
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def in_shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of the shell, in which $C is the command."""
    variables = os.environ | {"C": f"{sys.executable} -m calibquant"} | environment
    return subprocess.run(["bash", "-c", line], capture_output=True, env=variables, timeout=300, check=False)


def complete_log() -> str:
    assert (RUN / "receipt.json").is_file()
    text = (RUN / "log.txt").read_text(encoding="utf-8")
    assert "[6/6] Write the run folder" in text
    return text


# --- output that lacks characters, a reader or room -------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="sets the locale and redirects as a Unix shell does")
@pytest.mark.parametrize(
    ("line", "environment", "code", "told"),
    [
        (f"$C {QUANTIZE}", {"LC_ALL": "C", "PYTHONUTF8": "0"}, 0, ""),
        (f"$C {QUANTIZE} | head -1; exit ${{PIPESTATUS[0]}}", {}, 0, ""),
        (f"$C {QUANTIZE} > /dev/full", {}, 1, r"error: standard output: cannot be written \(No space left on device\)"),
        (f"$C {QUANTIZE} <&- >&- 2>&-", {}, 0, ""),
    ],
    ids=["ascii", "pipe", "full", "closed"],
)
def test_a_run_is_finished_whatever_becomes_of_its_output(
    line: str, environment: dict[str, str], code: int, told: str, site: Path
) -> None:
    done = in_shell(line, **environment)
    assert (done.returncode, re.match(told, done.stderr.decode()) is not None) == (code, True), done.stderr
    assert bool(done.stderr) == bool(told)
    complete_log()
    if environment:
        text = done.stdout.decode("ascii")
        assert re.search(r"float +\| +32 \| +309.7 kB \| +[0-9.]+ \| +- \| +- \|", text)
        assert text.rstrip().endswith(f"Run folder: {RUN}")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "92.5 +- 0.3 - 3x8 -> ... Muller \\u56fe"),
        ("cp437", "92.5 ± 0.3 - 3x8 -> ... Müller \\u56fe"),
        ("cp1252", "92.5 ± 0.3 – 3×8 -> … Müller \\u56fe"),
        ("utf-8", "92.5 ± 0.3 – 3×8 → … Müller 图"),
    ],
)
def test_characters_that_an_encoding_lacks_are_spelled(encoding: str, expected: str) -> None:
    prepare_streams()
    assert "92.5 ± 0.3 – 3×8 → … Müller 图".encode(encoding, SPELLING).decode(encoding) == expected


def test_the_bytes_of_a_name_that_is_no_text_stay() -> None:
    prepare_streams()
    name = os.fsdecode(b"caf\xe9.png")
    assert name.encode("utf-8", SPELLING) == b"caf\xe9.png"
    with pytest.raises(UnicodeDecodeError):
        codecs.lookup_error(SPELLING)(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"))


def test_json_keeps_its_values_where_output_lacks_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp437"))
    prepare_streams()
    console.print_json({"run": "größe – 图"})
    assert json.loads(written.getvalue().decode("cp437")) == {"run": "größe – 图"}


class Broken:
    """A stream whose buffer cannot be passed on, with a file descriptor of its own."""

    encoding = "utf-8"

    def __init__(self, place: Path, number: int) -> None:
        self.file, self.number, self.flushed = place.open("w", encoding="utf-8"), number, 0

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        self.flushed += 1
        if os.fstat(self.file.fileno()).st_rdev != Path(os.devnull).stat().st_rdev:
            raise OSError(self.number, os.strerror(self.number))

    def fileno(self) -> int:
        return self.file.fileno()


@pytest.mark.parametrize(("number", "kept"), [(errno.EPIPE, False), (errno.EIO, False), (errno.ENOSPC, True)])
def test_output_that_fails_is_dropped_and_only_a_lack_of_room_is_told(
    number: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, output = Broken(tmp_path / "out", number), Output("stdout")
    monkeypatch.setattr(sys, "stdout", stream)
    Console(file=output, force_terminal=False).print("one")  # type: ignore[arg-type]
    output.flush()
    assert stream.flushed == 2  # the second time into the null device
    assert (output.failure is not None and output.failure.errno == errno.ENOSPC) is kept
    stream.file.close()
    monkeypatch.setattr(sys, "stdout", None)
    assert (output.write("two"), output.isatty(), output.encoding) == (3, False, "utf-8")


# --- standard input ---------------------------------------------------------------------------------------------------


def test_a_recipe_comes_from_standard_input(site: Path) -> None:
    (site / "parts").mkdir()
    Path("parts/seed.yaml").write_text("seed: 3", encoding="utf-8")
    Path("recipe.yaml").write_text("include: [parts/seed.yaml]\nruns: größe" + RECIPE, encoding="utf-8")
    done = in_shell("cat recipe.yaml | $C quantize - quant.weights.bits=3")
    assert (done.returncode, done.stderr) == (0, b"")
    assert "seed: 3" in Path("größe/digits_resnet-w3a4-001/recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "given", "told"),
    [
        ("quantize", b"model: [\n", "standard input: is not valid YAML (line 2: "),
        ("quantize", b"modle: {}", "standard input, modle: this key is unknown"),
        ("train", None, "standard input: is not a recipe"),
        ("finetune", b"model: \xff", "standard input: is not valid YAML (it is not UTF-8 text)"),
        ("analyze", b"include: 3", "standard input, include: is no list of files"),
    ],
)
def test_errors_name_standard_input(
    command: str, given: bytes | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None if given is None else io.TextIOWrapper(io.BytesIO(given)))
    loading._standard_input.cache_clear()
    assert main([command, "-"]) == 1
    loading._standard_input.cache_clear()
    assert capsys.readouterr().err.startswith(f"error: {told}")


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def signal_after_a_unit(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """After the first unit's checkpoint this process gets the signal that is put in here."""
    save, chosen = stages.save_checkpoint, dict[str, Any]()

    def saving(*arguments: Any) -> None:
        save(*arguments)
        if arguments[3].reports and "number" in chosen:
            os.kill(os.getpid(), chosen["number"])

    monkeypatch.setattr(stages, "save_checkpoint", saving)
    return chosen


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signals")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_run_so_that_it_can_be_resumed(
    name: str, code: int, site: Path, signal_after_a_unit: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(getattr(signal, name))
    signal_after_a_unit["number"] = getattr(signal, name)
    assert main([*QUANTIZE.split(), *SHORT]) == code
    told = capsys.readouterr().err
    assert told == f"error: {RUN}: was interrupted; go on with calibquant quantize --resume {RUN}\n"
    assert signal.getsignal(getattr(signal, name)) == before
    log = Path("runs/.digits_resnet-w4a4-001.partial/log.txt").read_text(encoding="utf-8")
    assert log.rstrip().endswith("ERROR interrupted")
    signal_after_a_unit.clear()
    assert main(["quantize", "--resume", str(RUN)]) == 0
    assert "going on after 1 reconstructed units" in (RUN / "log.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signals")
def test_a_signal_before_a_checkpoint_leaves_nothing(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "calibrate_weights", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(QUANTIZE.split()) == 143
    assert capsys.readouterr().err == "error: interrupted; nothing was left behind\n"
    assert list(Path("runs").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_an_ignored_signal_stays_ignored_and_a_second_one_does_not_disturb() -> None:
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with heard() as told:
            os.kill(os.getpid(), signal.SIGHUP)
            assert (told.number, told.code) == (None, 1)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (told.number, told.code) == (15, 143)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# --- places that cannot be written ------------------------------------------------------------------------------------

COMMANDS = {
    "quantize": "quantize recipe.yaml runs={}",
    "finetune": "finetune recipe.yaml runs={}",
    "train": "train recipe.yaml train.epochs=1 train.lr=0.1 runs={}",
    "demo": "demo --runs {}",
    "analyze": "analyze recipe.yaml --out {}",
    "analyze runs": "analyze recipe.yaml runs={}",
    "compare": "compare recipe.yaml --methods nearest --bits w4a4 --seeds 2 --out {}",
    "select": "select recipe.yaml --out {}/manifest.csv",
    "study": "study selection recipe.yaml --strategies random --baseline random --out {}",
    "evaluate": "evaluate recipe.yaml --confusion {}/confusion.csv",
}
LONG = "n" * 300


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("recipe.yaml/sub", r"recipe.yaml: is a file, not a folder; choose another folder"),
        (f"new/{LONG}", rf"new/{LONG}(/analysis)?: cannot be written \(File name too long\); choose a shorter name"),
        ("full", r"full(/analysis)?: cannot be written \(No space left on device\); free space there"),
        ("read-only", r"read-only(/analysis)?: cannot be written \(Read-only file system\); choose another folder"),
    ],
    ids=["file", "long", "full", "read-only"],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    command: str, place: str, told: str, site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    for name in ("preparing.build", "training.build", "measuring.evaluate"):
        monkeypatch.setattr(f"calibquant.pipeline.{name}", work)
    monkeypatch.setattr("calibquant.studies.digits.open_training", work)
    number = {"full": errno.ENOSPC, "read-only": errno.EROFS}.get(place)
    if number is not None:
        Path(place).mkdir()

        def fails(_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fails)
    before = sorted(site.rglob("*"))
    assert main(command.format(place).split()) == 1
    error = capsys.readouterr().err
    assert re.match(rf"error: (\S*/)?{told}", error), error
    assert error.count("\n") == 1
    assert [path for path in sorted(site.rglob("*")) if path.name != "runs"] == before


def test_a_target_of_export_is_checked_before_the_run_is_loaded(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(QUANTIZE.split()) == 0
    monkeypatch.setattr("calibquant.pipeline.exporting.load_artifact", None)
    assert main(["export", str(RUN), "--out", "recipe.yaml/sub"]) == 1
    assert capsys.readouterr().err.endswith("recipe.yaml: is a file, not a folder; choose another folder\n")


def test_check_place_leaves_nothing_and_check_file_wants_a_file(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "deeper")
    check_file(tmp_path / "new" / "file.csv")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunFolderError, match="is a folder, not a file; give the name of a file"):
        check_file(tmp_path)
    with pytest.raises(RunFolderError, match=r"File name too long.*; choose a shorter name"):
        check_file(tmp_path / ("n" * 250))  # it has a longer name while it is written
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="link: is a file, not a folder"):
        check_place(tmp_path / "link" / "sub")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_missing_memory_is_told_with_what_to_lower(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError, match=r"^memory: .*; lower a or b$"), enough_memory("a", "b"):
        raise error
    wrapped = RunFolderError("network", "fails when run", "report it")
    wrapped.__context__ = error
    with pytest.raises(OutOfMemoryError), enough_memory("a"):
        raise wrapped


def test_other_errors_pass_as_they_are() -> None:
    for error in (
        RuntimeError("could not create a primitive descriptor for convolution"),
        RunFolderError("a", "b", "c"),
    ):
        with pytest.raises(type(error)) as caught, enough_memory("a"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("function", "field"),
    [("stages.measure", "evaluation.batch_size"), ("stages.calibrate_activations", "calibration.batch_size")],
)
def test_a_run_without_memory_names_the_step_s_field(
    function: str, field: str, site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(f"calibquant.pipeline.{function}", fails)
    assert main(QUANTIZE.split()) == 1
    assert re.fullmatch(rf"error: memory: there is less than .* \(could not create a primitive\); lower {field}.*\n",
                        capsys.readouterr().err)  # fmt: skip


# --- threads that wait ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_waiting_is_short_unless_the_user_has_said_otherwise(own: dict[str, str], expected: dict[str, str]) -> None:
    wait_briefly(own)
    assert own == expected


def test_the_command_decides_how_threads_wait_before_torch_is_imported() -> None:
    code = (
        "import os, sys, runpy\nsys.argv = ['calibquant', 'recipes']\n"
        "class Watch:\n    def find_spec(self, name, *_):\n        if name == 'torch':\n"
        "            print('torch', os.environ.get('GOMP_SPINCOUNT'), file=sys.stderr)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "try:\n    runpy.run_module('calibquant', run_name='__main__')\n"
        "finally:\n    import torch\n"
    )
    free = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=free, check=False)
    assert done.returncode == 0
    assert done.stderr == "torch 1000\n"


def test_the_tests_themselves_wait_briefly() -> None:
    assert {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ)


def test_the_busy_benchmark_ends_what_it_starts(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "busy.py"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, script, "--busy", "0", "1", "--limit", "0.5", "--", "sleep", "60"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert time.perf_counter() - start < 30
    assert [line.split(": ")[1] for line in done.stdout.splitlines()] == ["over 0 s", "over 0 s"]
