"""A run folder is data: hostile ones execute nothing, read and write nothing outside, and do not hang."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import calibquant
from calibquant.cli import main
from calibquant.errors import ModelError, RecipeError, RunFolderError
from calibquant.pipeline.measuring import run_recipe
from calibquant.reading import read_regular
from calibquant.recipe import load_recipe, make_recipe
from calibquant.runfolder import RunFolder, open_run
from calibquant.strangers import in_run_folder
from calibquant.zoo import build_model
from calibquant.zoo.external import unsafe

CODE = """
from pathlib import Path
Path("ran").write_text("ran")
import torch
def make():
    body = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    return torch.nn.Sequential(body, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))
"""
DATA = {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}}
FIELDS: dict[str, Any] = {
    "data": DATA, "calibration": {"count": 16}, "evaluation": {"count": 16}, "threads": 1, "runs": "made",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a network that a Python file makes: whole, of a part, and a training; the file lies in each."""
    folder = tmp_path_factory.mktemp("runs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        Path("nets.py").write_text(CODE)
        torch.manual_seed(0)
        model = {"name": "nets.py:make"}
        whole = calibquant.quantize({**FIELDS, "model": model})
        part = calibquant.quantize({**FIELDS, "model": model | {"submodule": "0"}, "export": {"onnx": False}})
        train = {"epochs": 1, "batch_size": 256, "lr": 0.01}
        trained = calibquant.train({**FIELDS, "model": model, "train": train})
        for name, run in (("whole", whole.folder), ("part", part.folder), ("trained", trained.folder)):
            shutil.move(run, name)
            Path(name, "evil.py").write_text(CODE)
            _edit_recipe(Path(name), {"model.name": f"{name}/evil.py:make", "runs": str(folder / "elsewhere")})
        Path("ran").unlink()
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def strange(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of those runs, as the working directory."""
    copy = Path(shutil.copytree(runs, tmp_path / "strange"))
    monkeypatch.chdir(copy)
    return copy


def _edit_recipe(run: Path, changes: dict[str, Any]) -> None:
    """Change fields of a run's recipe, and its receipt with it, as its author can."""
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    for key, value in changes.items():
        inner = tree
        *sections, last = key.split(".")
        for section in sections:
            inner = inner[section]
        inner[last] = value
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    _list(run, "recipe.yaml")


def _list(run: Path, name: str, digest: str | None = None) -> None:
    receipt = json.loads((run / "receipt.json").read_text())
    receipt["files"][name] = digest or hashlib.sha256((run / name).read_bytes()).hexdigest()
    (run / "receipt.json").write_text(json.dumps(receipt))


def _unlist(run: Path, *names: str) -> None:
    receipt = json.loads((run / "receipt.json").read_text())
    receipt["files"] = {k: v for k, v in receipt["files"].items() if names and k not in names}
    (run / "receipt.json").write_text(json.dumps(receipt))


REFUSED = [
    "evaluate part", "evaluate trained", "finetune whole finetune.epochs=1", "evaluate whole/recipe.yaml",
    "evaluate part/model.onnx", "quantize whole/recipe.yaml", "analyze whole/recipe.yaml", "train trained/recipe.yaml",
    "select whole/recipe.yaml calibration.strategy=herding", "judge whole/recipe.yaml whole",
    "compare thin/recipe.yaml --methods nearest,qdrop --bits w4a4", "quantize including.yaml",
    "study selection whole/recipe.yaml --strategies 'random class-balanced' --sizes 8 --draws 1",
]  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_code_that_a_run_names_is_not_run(line: str, strange: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("whole/deploy.onnx", "part/model.onnx")
    _list(Path("part"), "model.onnx")
    Path("including.yaml").write_text("include: [whole/recipe.yaml]\nseed: 7\n")
    Path("thin").mkdir()
    shutil.copy("whole/receipt.json", "thin")
    Path("thin/recipe.yaml").write_text(yaml.safe_dump({**FIELDS, "model": {"name": "whole/evil.py:make"}}))
    assert main(shlex.split(line)) == 1
    said = capsys.readouterr().err
    assert not Path("ran").exists()
    assert said.count("\n") == 1
    assert "evil.py" in said
    assert "--trust-code" in said
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize("command", ["export whole", "bench whole --rounds 1", "evaluate whole", "inspect whole"])
def test_what_needs_no_network_does_without_the_code(command: str, strange: Path) -> None:
    assert main(command.split()) == 0
    assert not Path("ran").exists()


def test_an_export_tells_what_it_left_out_and_keeps_the_file(strange: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("whole/float.onnx").read_bytes()
    assert main(["export", "whole", "--json"]) == 0
    left_out = json.loads(capsys.readouterr().out)["left_out"]["float.onnx"]
    assert "whole/evil.py" in left_out
    assert "--trust-code" in left_out
    assert Path("whole/float.onnx").read_bytes() == before
    assert main(["export", "whole", "--trust-code"]) == 0
    assert Path("ran").exists()


@pytest.mark.parametrize(
    "line", ["evaluate part --trust-code", "evaluate trained --trust-code", "evaluate whole/recipe.yaml --trust-code",
             "evaluate trained model.name=nets.py:make"]
)  # fmt: skip
def test_trusted_code_and_the_users_own_is_run(line: str, strange: Path) -> None:
    assert main(line.split()) == 0
    assert Path("ran").exists()


def test_a_recipe_without_a_receipt_beside_an_onnx_file_is_not_the_users(
    strange: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plain").mkdir()
    for name in ("deploy.onnx", "recipe.yaml"):
        shutil.copy(f"part/{name}" if name == "recipe.yaml" else f"whole/{name}", f"plain/{name}")
    assert main(["evaluate", "plain/deploy.onnx"]) == 1
    assert "--trust-code" in capsys.readouterr().err
    assert not Path("ran").exists()
    assert main(["evaluate", "plain/deploy.onnx", "--recipe", "plain/recipe.yaml"]) in (0, 1)
    assert Path("ran").exists(), "a recipe that the user names is his own"


def test_a_run_does_not_say_where_the_next_is_written(strange: Path) -> None:
    assert main(["finetune", "whole", "finetune.epochs=1", "finetune.batch_size=512", "--trust-code"]) == 0
    assert not Path("elsewhere").exists()
    assert (strange / "nets.py-make-w4a4-qat-001" / "receipt.json").exists() or list(strange.glob("*-qat-001"))
    assert load_recipe("whole/recipe.yaml").runs == Path("runs")
    assert load_recipe("whole/recipe.yaml", ["runs=mine"]).runs == Path("mine")
    assert run_recipe(open_run(Path("whole")), ["runs=mine"]).runs == Path("mine")


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("x.py:f", {}, "name"), ("a/b.py:f", {"n": 1}, "name"), ("x.py", {}, "name"),
        ("timm:resnet18", {"num_classes": 3}, None), ("timm:resnet18", {"checkpoint_path": "evil.pth"},
        "options.checkpoint_path"), ("timm:resnet18", {"pretrained": True}, "options.pretrained"),
        ("torchvision:vgg11", {"weights": "DEFAULT"}, "options.weights"), ("resnet18", {"num_classes": 3}, None),
    ],
)  # fmt: skip
def test_what_runs_code(name: str, options: dict[str, Any], field: str | None) -> None:
    assert unsafe(name, options) == field
    tree = {"model": {"name": name, "options": options}}
    own = make_recipe(tree).model
    assert own.strangers == {}
    stranger = make_recipe(tree, None, "RUN/recipe.yaml", stranger=True).model
    assert make_recipe(tree, None, "RUN/recipe.yaml", stranger=True, trust_code=True).model.strangers == {}
    if field is None:
        return
    with pytest.raises(ModelError, match=rf"RUN/recipe.yaml, model.{field}: would run .* add --trust-code"):
        build_model(stranger.model_copy(update={"submodule": "x"}))


def test_options_of_a_run_are_none_of_a_users_own_package() -> None:
    tree = {"model": {"name": "resnet18", "options": {"checkpoint_path": "evil.pth"}}}
    mixed = make_recipe(tree, ["model.name=timm:resnet18"], "RUN/recipe.yaml", stranger=True)
    with pytest.raises(ModelError, match=r"model.options.checkpoint_path: would run"):
        build_model(mixed.model)


def _fifo(run: Path) -> None:
    (run / "metrics.json").unlink()
    os.mkfifo(run / "metrics.json")


def _link(run: Path) -> None:
    (run / "metrics.json").rename(run / "kept")
    (run / "metrics.json").symlink_to("kept")


def _folder(run: Path) -> None:
    (run / "vectors").mkdir()
    _list(run, "vectors", "0" * 64)


def _huge(run: Path) -> None:
    with (run / "big").open("wb") as file:
        file.truncate(1 << 40)
    _list(run, "big", "0" * 64)


def _named(name: str) -> Callable[[Path], None]:
    return lambda run: _list(run, name, "0" * 64)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a device": (_named("/dev/zero"), "receipt.json: lists '/dev/zero', which is no plain name"),
    "a file outside": (_named("../nets.py"), "receipt.json: lists '../nets.py', which is no plain name"),
    "a file in a folder": (_named("a/b"), "lists 'a/b', which is no plain name"),
    "the folder": (_named("."), "lists '.', which is no plain name"),
    "a NUL byte": (_named("a\0b"), "which is no plain name"),
    "a long name": (_named("a" * 5000), "cannot be read .File name too long."),
    "a pipe": (_fifo, "metrics.json: cannot be read .it is not a regular file."),
    "a link": (_link, "metrics.json: cannot be read .it is a link."),
    "a folder as a file": (_folder, "vectors: cannot be read .it is a folder."),
    "a huge file": (_huge, "big: cannot be read .it has [0-9,]+ bytes, more than the limit"),
    "a missing file": (lambda run: (run / "graph.json").unlink(), "graph.json: cannot be read .No such file"),
    "a wrong hash": (lambda run: _list(run, "graph.json", "0" * 64), "graph.json: is damaged"),
    "no files listed": (_unlist, "is not listed in receipt.json, so its hash is unknown"),
    "the network not listed": (lambda run: _unlist(run, "graph.json"), "graph.json: is not listed in receipt.json"),
    "the recipe not listed": (lambda run: _unlist(run, "recipe.yaml"), "recipe.yaml: is not listed in receipt.json"),
    "another kind": (
        lambda run: (run / "receipt.json").write_text('{"format_version": 1, "kind": "x", "files": {}}'),
        "names an unknown kind of run, 'x'",
    ),
    "huge numbers": (
        lambda run: (run / "receipt.json").write_text('{"format_version": ' + "9" * 4000 + ', "files": {}}'),
        "receipt.json: is damaged .a number of 4,000 digits has more than 64 bits",
    ),
    "deep nesting": (lambda run: (run / "receipt.json").write_text("[" * 100_000), "receipt.json: is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_run_is_refused_in_one_line(case: str, strange: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, expected = HOSTILE[case]
    spoil(Path("whole"))
    assert main(["evaluate", "whole"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(expected, said), said


@pytest.mark.parametrize("name", ["../nets.py", "/dev/zero", "evil.pt"])
def test_a_checkpoint_names_files_of_its_own_folder(name: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match=r"which is outside it|cannot be read"):
        folder.read(name)


def test_an_unlisted_file_of_a_run_is_not_read(strange: Path) -> None:
    run = open_run(Path("whole"))
    assert run.has("graph.json")
    assert not run.has("evil.py")
    with pytest.raises(RunFolderError, match=r"evil.py: is not listed in receipt.json"):
        run.read("evil.py")
    with pytest.raises(RunFolderError, match=r"nothing: is missing"):
        run.read("nothing")


@pytest.mark.parametrize("kind", ["device", "pipe", "huge", "folder"])
def test_a_recipe_includes_regular_files_only(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if kind == "device":
        target = Path("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(target)
    elif kind == "huge":
        with target.open("wb") as file:
            file.truncate(1 << 40)
    else:
        target.mkdir()
    (tmp_path / "r.yaml").write_text(f"include: [{target}]\n")
    with pytest.raises(
        RecipeError, match=r"cannot be read \(it (is not a regular file|has [\d,]+ bytes, more than|is a folder)"
    ):
        load_recipe(tmp_path / "r.yaml")


def test_a_recipe_that_never_ends_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"/dev/zero: cannot be read \(it is not a regular file\)"):
        load_recipe("/dev/zero")


def test_a_file_is_in_a_run_folder_by_its_path_or_by_its_link(strange: Path) -> None:
    Path("link.yaml").symlink_to("whole/recipe.yaml")
    Path("way").symlink_to("whole")
    assert in_run_folder(Path("whole/recipe.yaml"))
    assert in_run_folder(Path("link.yaml"))
    assert in_run_folder(Path("way/recipe.yaml"))
    assert in_run_folder(Path("runs/.net-001.partial/recipe.yaml"))
    assert not in_run_folder(Path("nets.py"))
    Path("checkpoint.json").write_text("of another tool")
    assert not in_run_folder(Path("nets.py"))


def test_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert read_regular(tmp_path / "a") == b"abc"
    with pytest.raises(OSError, match="more than"):
        read_regular(tmp_path / "a", 2)


def test_a_temporary_name_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("kept")
    (tmp_path / f".a.{os.getpid()}.tmp").symlink_to("victim")
    RunFolder(tmp_path).write("a", "new")
    assert (tmp_path / "victim").read_text() == "kept"
    assert (tmp_path / "a").read_text() == "new"
