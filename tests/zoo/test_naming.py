"""Files in the naming of other authors: what their network computes, ours computes after loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from author_networks import (
    BrecqMobileNetV2,
    PyclsRegNet,
    TimmRegNet,
    randomize,
    timm_mnasnet_050,
    timm_mobilenetv2_035,
    timm_mobilenetv2_110d,
)
from torch import Tensor, nn

from calibquant import zoo
from calibquant.errors import ModelError
from calibquant.recipe import ModelRecipe

State = dict[str, Tensor]
REGNET_200M = ((1, 1, 4, 7), (24, 56, 152, 368), 8)  # figure 17 of the RegNet paper
REGNET_400M = ((1, 2, 7, 12), (32, 64, 160, 384), 16)


@dataclass(frozen=True)
class Case:
    """A file of other authors: their network, how they wrap its weights, and ours."""

    theirs: Callable[[], nn.Module]
    name: str
    options: dict[str, Any]
    remark: str
    wrap: Callable[[State], Any] = lambda state: state
    reversed_input: bool = False


CASES = {
    "timm MobileNetV2": Case(lambda: timm_mobilenetv2_035(5), "mobilenet_v2", {"width": 0.35}, "names are timm's"),
    "timm MNASNet": Case(lambda: timm_mnasnet_050(5), "mnasnet0_5", {}, "names are timm's"),
    "timm RegNet": Case(lambda: TimmRegNet(*REGNET_200M, 5), "regnet_x_200mf", {}, "names are timm's"),
    "timm RegNet-400M": Case(
        lambda: TimmRegNet(*REGNET_400M, 5), "regnet_x_400mf", {"widths": "pycls"}, "names are timm's"
    ),
    "BRECQ MobileNetV2": Case(
        lambda: BrecqMobileNetV2(5), "mobilenet_v2", {}, "names are BRECQ's", lambda state: {"model": state}
    ),
    "MobileNetV2 in Lightning": Case(
        lambda: timm_mobilenetv2_035(5), "mobilenet_v2", {"width": 0.35},
        "the prefix 'net.' of its keys is taken off; its key names are timm's",
        lambda state: {"state_dict": {f"net.{key}": value for key, value in state.items()}},
    ),
    "BRECQ RegNet": Case(lambda: PyclsRegNet(*REGNET_200M, 5), "regnet_x_200mf", {}, "names are BRECQ's"),
    "pycls RegNet": Case(
        lambda: PyclsRegNet(*REGNET_200M, 5), "regnet_x_200mf", {},
        "names are pycls's; the input channels are turned from blue, green, red to red, green, blue",
        lambda state: {"epoch": 99, "model_state": state, "optimizer_state": {}, "cfg": "MODEL:\n  TYPE: regnet\n"},
        reversed_input=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_other_authors_computes_what_their_network_does(case: str, tmp_path: Path) -> None:
    given = CASES[case]
    theirs, path, told = randomize(given.theirs()), tmp_path / "weights.pth", list[str]()
    torch.save(given.wrap(theirs.state_dict()), path)
    ours = zoo.build_model(
        ModelRecipe(name=given.name, options={"num_classes": 5, **given.options}, weights=path), told.append
    )
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = theirs(x.flip(1) if given.reversed_input else x), ours(x)
    assert float(want.std()) > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(told) == 1
    assert told[0].endswith(given.remark)


def test_a_file_without_counters_is_recognized(tmp_path: Path) -> None:
    theirs = randomize(timm_mnasnet_050(5))
    state = {key: value for key, value in theirs.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pth.tar")
    ours = zoo.build("mnasnet0_5", num_classes=5)
    assert zoo.load_weights(ours, tmp_path / "w.pth.tar").endswith("timm's")
    assert torch.equal(ours.layers[15].running_mean, theirs.bn2.running_mean)  # type: ignore[union-attr, index, arg-type]


def test_an_incomplete_file_is_not_translated_and_leaves_the_network(tmp_path: Path) -> None:
    state = randomize(timm_mnasnet_050(5)).state_dict()
    del state["blocks.3.0.conv_dw.weight"]
    torch.save(state, tmp_path / "w.pth")
    ours = zoo.build("mnasnet0_5", num_classes=5)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(ModelError, match=r"does not fit the network: \d+ missing \(layers.0.weight, .*, …\)"):
        zoo.load_weights(ours, tmp_path / "w.pth")
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_another_depth_or_width_is_not_taken(tmp_path: Path) -> None:
    """pycls's 400M in the network with torchvision's widths: names fit, shapes do not, and the file's name is given."""
    torch.save(PyclsRegNet(*REGNET_400M, 5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"tensor 's4.b1.proj.weight': has shape \(384, 160, 1, 1\), .* \(400, 160"):
        zoo.load_weights(zoo.build("regnet_x_400mf", num_classes=5), tmp_path / "w.pth")
    with pytest.raises(ModelError, match="does not fit the network"):
        zoo.load_weights(zoo.build("regnet_x_200mf", num_classes=5), tmp_path / "w.pth")


def test_more_blocks_are_not_folded_onto_fewer(tmp_path: Path) -> None:
    """Each name of mobilenetv2_110d has a place in the shorter network, but some have the same."""
    torch.save(timm_mobilenetv2_110d(5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"does not fit the network: \d+ missing"):
        zoo.load_weights(zoo.build("mobilenet_v2", num_classes=5), tmp_path / "w.pth")


def test_networks_outside_the_zoo_are_not_translated(tmp_path: Path) -> None:
    torch.save(randomize(timm_mnasnet_050(5)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match="does not fit the network"):
        zoo.load_weights(nn.Sequential(zoo.build("mnasnet0_5", num_classes=5)), tmp_path / "w.pth")
