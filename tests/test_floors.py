"""The house is as DESIGN §2 draws it, the package's face is light and lazy, and every docstring's example runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from floors import FLOORS, architectures, climbing, distributed, eager_imports_of_the_face, module_name, room_of

import calibquant

PACKAGE = Path(calibquant.__file__).parent
SOURCES = {module_name(path, PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
FACE = inspect.getsource(calibquant)


@pytest.mark.parametrize("module", SOURCES)
def test_no_import_climbs_a_floor_or_knocks_at_a_neighbour(module: str) -> None:
    path = SOURCES[module]
    assert climbing(path.read_text(encoding="utf-8"), module, path.name == "__init__.py") == []


@pytest.mark.parametrize("rule", [architectures, distributed])
def test_no_room_does_what_another_is_for(rule: Callable[[str, str], list[str]]) -> None:
    assert [line for name, path in SOURCES.items() for line in rule(path.read_text(encoding="utf-8"), name)] == []


def test_every_room_is_on_a_floor() -> None:
    assert {room_of(name) for name in SOURCES} - {None} <= set(FLOORS)


PLANTED: list[tuple[Callable[[str, str], list[str]], str, str, str]] = [
    (climbing, "calibquant.errors", "import calibquant.recipe", "(floor 0) imports calibquant.recipe (floor 1)"),
    (climbing, "calibquant.data.files", "from calibquant.graph import capture", "calibquant.graph.capture (floor 3)"),
    (climbing, "calibquant.data.files", "def f():\n    from calibquant import pipeline", ":2 (floor 3)"),
    (
        climbing,
        "calibquant.data.files",
        "from ..export.artifact import load",
        "calibquant.export.artifact.load",
    ),
    (climbing, "calibquant.data.files", "from .. import quantization", "imports calibquant.quantization (floor 4)"),
    (climbing, "calibquant.export.record", "from calibquant.evaluation import evaluate", "(floor 5)"),
    (climbing, "calibquant.pipeline", "from calibquant.studies import digits", "(floor 6)"),
    (climbing, "calibquant.cli.demo", "import calibquant", "imports the face"),
    (climbing, "calibquant.attic", "", "is on no floor"),
    (architectures, "calibquant.graph.units", "if type(m).__name__ == 'BasicBlockResNet': pass", ":1 names"),
    (architectures, "calibquant.graph.units", "from torchvision.models import vgg16", "vgg16"),
    (architectures, "calibquant.recipe", "class MobileNetRecipe: ...", "MobileNetRecipe"),
    (architectures, "calibquant.recipe", "def f(resnet): return resnet.layer1", "resnet"),
    (distributed, "calibquant.evaluation.evaluate", "import torch\nn = torch.distributed.get_world_size()", ":2 asks"),
    (distributed, "calibquant.evaluation.evaluate", "import torch.distributed as dist", ":1 asks"),
    (distributed, "calibquant.evaluation.evaluate", "from torch import distributed", ":1 asks"),
]


@pytest.mark.parametrize(("rule", "module", "text", "expected"), PLANTED)
def test_the_checks_see_a_planted_breach(
    rule: Callable[[str, str], list[str]], module: str, text: str, expected: str
) -> None:
    found = rule(text, module)
    assert found
    assert expected in found[0]


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        (climbing, "calibquant.studies.digits", "from calibquant.pipeline import quantize"),
        (climbing, "calibquant.data.files", "from calibquant.data.imageset import ImageSet\nimport torch"),
        (climbing, "calibquant", "from calibquant.pipeline import quantize"),
        (architectures, "calibquant.zoo.registry", "from calibquant.zoo.mobilenet import MobileNetV2"),
        (architectures, "calibquant.recipe", '"""A ResNet, say."""\nx = Field(description="e.g. resnet18")'),
        (distributed, "calibquant.parallel", "import torch.distributed"),
    ],
)
def test_the_checks_let_pass_what_is_allowed(rule: Callable[[str, str], list[str]], module: str, text: str) -> None:
    assert rule(text, module) == []


def test_the_face_imports_lazily() -> None:
    assert eager_imports_of_the_face(FACE) == []
    assert eager_imports_of_the_face("from calibquant.data import batches") == ["line 1: calibquant.data.batches"]


def test_import_calibquant_loads_nothing_heavy_and_prints_nothing() -> None:
    program = "import sys; before = set(sys.modules); import calibquant; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "calibquant" in loaded
    assert loaded <= {"calibquant"} | set(sys.stdlib_module_names)
    assert done.stderr == ""


@pytest.mark.parametrize("name", calibquant.__all__)
def test_every_name_of_the_face_is_there_and_explained(name: str) -> None:
    value = getattr(calibquant, name)
    assert name in dir(calibquant)
    documentation = inspect.getdoc(value)
    assert documentation
    assert not inspect.isfunction(value) or ">>>" in documentation


def test_an_unknown_name_of_the_face_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'calibquant' has no attribute 'quantise'"):
        calibquant.quantise  # noqa: B018


@pytest.mark.parametrize("module", SOURCES)
def test_examples_in_docstrings_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
