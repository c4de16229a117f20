"""Our networks and torchvision's and timm's own, where these can be imported."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from author_networks import randomize

from calibquant import zoo
from calibquant.recipe import ModelRecipe

PAIRS: list[tuple[str, str, dict[str, Any]]] = [
    ("torchvision:resnet18", "resnet18", {}),
    ("torchvision:mobilenet_v2", "mobilenet_v2", {}),
    ("torchvision:regnet_x_400mf", "regnet_x_400mf", {}),
    ("torchvision:mnasnet0_5", "mnasnet0_5", {}),
    ("timm:resnet18", "resnet18", {}),
    ("timm:mobilenetv2_035", "mobilenet_v2", {"width": 0.35}),
    ("timm:mobilenetv2_140", "mobilenet_v2", {"width": 1.4}),
    ("timm:mnasnet_050", "mnasnet0_5", {}),
    ("timm:regnetx_002", "regnet_x_200mf", {}),
    ("timm:regnetx_004", "regnet_x_400mf", {"widths": "pycls"}),
    ("timm:regnetx_004_tv", "regnet_x_400mf", {}),
]


@pytest.mark.parametrize(("theirs", "ours", "options"), PAIRS)
def test_a_file_of_the_package_computes_what_its_network_does(
    theirs: str, ours: str, options: dict[str, Any], tmp_path: Path
) -> None:
    package = theirs.partition(":")[0]
    try:
        importlib.import_module(package)
    except Exception as error:
        pytest.skip(f"{package} cannot be imported: {error}")
    source, path = randomize(zoo.build(theirs, num_classes=7)), tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    network = zoo.build_model(ModelRecipe(name=ours, options={"num_classes": 7, **options}, weights=path))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(x), source(x), rtol=1e-5, atol=1e-5)
