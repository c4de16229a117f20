"""Bad inputs: each ends with exit code 1 and one line that names the place and the mend, and leaves nothing behind."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input_cases import TABLE, Case
from bad_site import DIGITS, Site
from torch import Tensor, nn

import calibquant
from calibquant.cli import main
from calibquant.errors import CalibQuantError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of the digits."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "digits.yaml").write_text(DIGITS)
    recipe = calibquant.load_recipe(folder / "digits.yaml", [f"runs={folder / 'runs'}"])
    return calibquant.quantize(recipe).folder


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != "runs"}


@pytest.mark.parametrize("case", TABLE.values(), ids=TABLE)
def test_a_bad_input_is_one_line(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path, monkeypatch, finished)
    site.prepare()
    case.arrange(site)
    before = files_below(tmp_path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        code = main(case.command.split())
    monkeypatch.undo()
    output = capsys.readouterr()
    assert code == 1
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("error: ")
    assert re.search(case.error, output.err.rstrip("\n")), output.err
    assert "Traceback" not in output.out
    assert [str(warning.message) for warning in warned] == []
    assert files_below(tmp_path) == before


def test_the_table_is_long_and_its_names_are_unique() -> None:
    assert len(TABLE) >= 100
    assert len({case.command + case.error + name for name, case in TABLE.items()}) == len(TABLE)


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def diverged() -> nn.Module:
    network = convolution()
    nn.init.constant_(next(network.parameters()), float("nan"))
    return network


def spoiled(value: float) -> Tensor:
    images = torch.rand(8, 1, 8, 8)
    images[5, 0, 2, 2] = value
    return images


LIVE: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "NaN image": (convolution(), {"images": spoiled(float("nan"))}, "tensor#5: holds NaN or infinity; repair"),
    "Inf image": (convolution(), {"images": spoiled(float("inf"))}, "tensor#5: holds NaN or infinity; repair"),
    "no images": (convolution(), {"images": torch.zeros(0, 1, 8, 8)}, "the calibration set is empty; give at least 2"),
    "one image": (convolution(), {"images": torch.rand(1, 1, 8, 8)}, "is a single image; give at least 2"),
    "three dimensions": (convolution(), {"images": torch.rand(8, 8, 8)}, "images: are float32 of shape .*; pass"),
    "bytes": (convolution(), {"images": torch.zeros(8, 1, 8, 8, dtype=torch.uint8)}, "images: are uint8 .*; pass"),
    "too few labels": (convolution(), {"images": torch.rand(8, 1, 8, 8), "labels": [1]}, "labels: are 1 for 8 images"),
    "label out of range": (
        convolution(), {"images": torch.rand(8, 1, 8, 8), "labels": [0, 1, 2, 3, 0, 0, 0, 0]},
        r"tensor#3: label 3 is outside 0\.\.2; correct",
    ),
    "nothing to quantize": (
        nn.Flatten(), {"images": torch.rand(8, 1, 8, 8)}, "network: holds no convolution or linear to quantize; check",
    ),
    "other channels": (convolution(), {"images": torch.rand(8, 3, 8, 8)}, "expected input.*to have 1 channels.*; "),
    "NaN weights": (
        diverged(), {"images": torch.rand(8, 1, 8, 8)}, "parameter '0.weight': holds NaN or infinite values; give",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIVE)
def test_a_bad_live_network_or_tensor_is_a_calibquant_error(name: str, tmp_path: Path) -> None:
    network, data, message = LIVE[name]
    recipe = {"runs": str(tmp_path / "runs"), "calibration": {"count": 8}}
    with pytest.raises(CalibQuantError, match=message):
        calibquant.quantize(
            recipe | {"calibration": {"count": max(1, len(data["images"]))}}, network, calibquant.TensorImages(**data)
        )
    assert files_below(tmp_path) == set()
