"""Networks of other packages and of the user's own files; the packages are stood in for by small ones."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import calibquant
from calibquant import zoo
from calibquant.errors import ModelError
from calibquant.pipeline import evaluate_run
from calibquant.recipe import ModelRecipe

TIMM = """
import torch
from torch import nn

def list_models():
    return ["resnet18", "mobilenetv2_100"]

def create_model(name, pretrained=False, **options):
    if "drop" in options and not 0 <= options["drop"] < 1:
        raise ValueError("drop is a share\\nand more")
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(options.get("num_classes", 1000)))
    network(torch.zeros(1, 3, 8, 8))
    network.asked = (name, pretrained, options)
    return network
"""
TORCHVISION = """
from torch import nn

def list_models():
    return ["resnet18", "mobilenet_v2"]

def get_model(name, **options):
    network = nn.Linear(2, options.get("num_classes", 1000))
    network.asked = (name, options)
    return network
"""
NETS = """
from dataclasses import dataclass

import torch
from torch import nn

from layers import block


@dataclass
class Shape:
    classes: int = 10


class Net(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.body = block(1, 8)
        self.head = nn.Linear(8, shape.classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def net(num_classes=10):
    return Net(Shape(num_classes))


def wrong():
    return [1, 2]


def fails(depth=1):
    if depth:
        return fails(depth - 1)
    raise RuntimeError("out of ideas\\nsecond line")


def leaves():
    raise SystemExit("bye")
"""
LAYERS = """
from torch import nn


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU())
"""


STOOD_IN = ("timm", "torchvision", "torchvision.models", "layers")


@pytest.fixture(autouse=True)
def _own_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's folder is the working directory, its packages come first, and imports leave with it."""
    monkeypatch.chdir(tmp_path)
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(str(packages))
    real = {name: sys.modules.pop(name) for name in STOOD_IN if name in sys.modules}
    importlib.invalidate_caches()
    yield
    for name in STOOD_IN:
        sys.modules.pop(name, None)
    sys.modules.update(real)


def install(name: str, source: str) -> None:
    """A package or a part of one; what is above it is empty."""
    folder = Path("packages")
    for part in name.split("."):
        folder /= part
        folder.mkdir()
        (folder / "__init__.py").touch()
    (folder / "__init__.py").write_text(source)
    importlib.invalidate_caches()


def line_of(text: str) -> int:
    """Where NETS has a text."""
    return next(i for i, line in enumerate(NETS.split("\n"), start=1) if text in line)


def write_nets() -> None:
    Path("nets").mkdir()
    Path("nets/mine.py").write_text(NETS)
    Path("nets/layers.py").write_text(LAYERS)


def test_timm_gets_name_and_options() -> None:
    install("timm", TIMM)
    network: Any = zoo.build("timm:resnet18.a1_in1k", num_classes=7)
    assert network.asked == ("resnet18.a1_in1k", False, {"num_classes": 7})
    network = zoo.build_model(ModelRecipe(name="timm:mobilenetv2_100"))
    assert not network.training


def test_torchvision_gets_name_and_options() -> None:
    install("torchvision.models", TORCHVISION)
    network: Any = zoo.build("torchvision:mobilenet_v2", num_classes=3)
    assert network.asked == ("mobilenet_v2", {"num_classes": 3})


def test_weights_load_into_other_packages_networks() -> None:
    install("timm", TIMM)
    torch.manual_seed(0)
    source = zoo.build("timm:resnet18", num_classes=3)
    torch.save({"state_dict": source.state_dict()}, "w.pth")
    network = zoo.build_model(ModelRecipe(name="timm:resnet18", options={"num_classes": 3}, weights=Path("w.pth")))
    assert torch.equal(network[0].weight, source[0].weight)  # type: ignore[index, arg-type]


def test_a_function_of_a_file_gets_the_options_and_its_folders_modules() -> None:
    write_nets()
    before = list(sys.path)
    network = zoo.build("nets/mine.py:net", num_classes=4)
    assert network(torch.zeros(1, 1, 8, 8)).shape == (1, 4)
    assert (
        zoo.build("nets/mine.py:Net", shape=network.__class__.__init__.__globals__["Shape"](2)).head.out_features == 2
    )  # type: ignore[union-attr]
    assert sys.path == before


def broken(source: str) -> Callable[[], None]:
    return lambda: install("timm", source)


ERRORS: list[tuple[str, dict[str, Any], Callable[[], Any], str]] = [
    ("timm:resnet18", {}, broken("import no_such_package"),
     r"model.name, timm:resnet18: timm cannot be imported \(ModuleNotFoundError: No module named 'no_such_package'\); "
     "install timm in a version made for PyTorch"),
    ("timm:resnet18", {}, broken("raise RuntimeError('operator torchvision::nms does not exist')"),
     r"timm cannot be imported \(RuntimeError: operator torchvision::nms does not exist\); install timm"),
    ("timm:resnet81", {}, broken(TIMM), "timm:resnet81: timm has no such network; did you mean 'timm:resnet18'"),
    ("timm:zzz", {}, broken(TIMM), "timm has no such network; timm.list_models.. lists the names"),
    ("timm:resnet18", {"drop": 2}, broken(TIMM), r"timm cannot build it \(ValueError: drop is a share\); check"),
    ("timn:resnet18", {}, lambda: None, "model.name: 'timn:resnet18' has no known form; use a network of the zoo, "),
    ("nets/mine.py", {}, write_nets, "'nets/mine.py' names no function; write nets/mine.py:FUNCTION"),
    ("nets/mine.py:", {}, write_nets, "'nets/mine.py:' names no function; write nets/mine.py:FUNCTION"),
    ("nets/yours.py:net", {}, write_nets, r"nets/yours.py: cannot be read \(No such file or directory\); give"),
    ("nets/mine.py:nett", {}, write_nets, "nets/mine.py: defines no function 'nett'; did you mean 'net'"),
    ("nets/mine.py:net", {"classes": 3}, write_nets,
     r"model.options: net does not take them \(.*argument 'classes'\); it is net\(num_classes=10\)"),
    ("nets/mine.py:wrong", {}, write_nets, "nets/mine.py:wrong: gives a list, not an nn.Module; return the network"),
    ("nets/mine.py:fails", {}, write_nets,
     f"nets/mine.py, line {line_of('raise Run')}: RuntimeError: out of ideas; correct the code"),
    ("nets/mine.py:leaves", {}, write_nets,
     f"nets/mine.py, line {line_of('raise Sys')}: SystemExit: bye; correct the code"),
    ("net.py:net", {}, lambda: Path("net.py").write_text("import torch\ndef net(:\n"), "net.py, line 2: SyntaxError: "),
    ("net.py:net", {}, lambda: Path("net.py").write_text("import torch\n\nimport no_such_package\n"),
     "net.py, line 3: ModuleNotFoundError: No module named 'no_such_package'; correct"),
    ("net.py:net", {}, lambda: Path("net.py").write_text(""), "net.py: defines no function 'net'; define it there"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "arrange", "message"), ERRORS)
def test_errors_are_one_line(name: str, options: dict[str, Any], arrange: Callable[[], Any], message: str) -> None:
    arrange()
    with pytest.raises(ModelError, match=message) as error:
        zoo.build(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_package_that_is_not_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModelError, match=f"{package} .*; install {package} in a version made for PyTorch {torch.__version__[0]}"
    ):
        zoo.build(f"{package}:resnet18")


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("mobilenet_v2", 0.1), ("mnasnet2_0", 0.2), ("regnet_x_600mf", 0.01), ("resnet18", 0.01),
        ("timm:mobilenetv2_100.ra_in1k", 0.1), ("timm:mnasnet_100", 0.2), ("torchvision:mobilenet_v2", 0.1),
        ("torchvision:mnasnet1_0", 0.2), ("timm:mobilenetv3_large_100", 0.01), ("mobilenet_v2.py:net", 0.01),
        ("unknown", 0.01), (None, 0.01),
    ],
)  # fmt: skip
def test_the_regularizers_weight_is_looked_up(name: str | None, weight: float) -> None:
    assert zoo.regularizer_of(name) == weight


def test_a_run_does_not_need_the_file_that_made_its_network(tmp_path: Path) -> None:
    """Its folder is named after the function, its log says how the weights were read, and it loads without the file."""
    write_nets()
    weights = zoo.build("nets/mine.py:net").state_dict()
    torch.save({"state_dict": weights, "state_dict_ema": weights}, "w.pth")
    run = calibquant.quantize({
        "model": {"name": "nets/mine.py:net", "options": {"num_classes": 10}, "weights": "w.pth"},
        "data": {"kind": "digits", "preprocess": {"resize": 16, "mean": [0.5], "std": [0.5]}},
        "calibration": {"count": 16}, "evaluation": {"count": 20}, "runs": "runs", "threads": 1,
        "quant": {"weights": {"observer": "minmax"}, "activations": {"observer": "minmax"}},
    })  # fmt: skip
    assert run.folder.name == "mine.py-net-w4a4-001"
    assert "w.pth: of its weights 'state_dict' are taken; it also holds state_dict_ema" in (
        run.folder / "log.txt"
    ).read_text(encoding="utf-8")
    x = torch.randn(4, 1, 16, 16)
    Path("nets/mine.py").unlink()
    Path("nets/layers.py").unlink()
    for name in ("calibquant_user_mine", "layers"):
        sys.modules.pop(name)
    with torch.no_grad():
        assert torch.equal(calibquant.load(run.folder)(x), run.model(x))
    again = evaluate_run(run.folder, [])
    assert again["quantized"]["top1"] == run.metrics["quantized"]["top1"]
