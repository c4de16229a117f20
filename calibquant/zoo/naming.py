"""Key names that other authors gave the networks of the zoo: tables from their names to ours.

A name is that of a module, without the tensor's own (`weight`, `running_mean`, …), which is the same everywhere.
BRECQ's ResNets and MNASNet, and timm's ResNets, have torchvision's names and need no table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from calibquant.zoo.mnasnet import MNASNet
from calibquant.zoo.mobilenet import MobileNetV2
from calibquant.zoo.regnet import RegNetX

Match = re.Match[str]
Rules = Mapping[str, str | Callable[[Match], str]]


@dataclass(frozen=True)
class Naming:
    """How other authors name the modules of a family.

    Args:
        authors: who they are, in words.
        rules: by a pattern of their whole name, ours: a template as of `re.Match.expand`, or a function of the match.
        wrappers: keys of the file around the state_dict by which these authors are known; none means any file.
        reversed_input: our name of the convolution whose input channels are in the order blue, green, red there.
    """

    authors: str
    rules: Rules
    wrappers: tuple[str, ...] = ()
    reversed_input: str | None = None

    def translate(self, keys: Iterable[str]) -> dict[str, str] | None:
        """Our key for each of theirs; None where a key is not of this naming.

        Example:
            >>> BRECQ_MOBILENET_V2.translate(["features.2.conv.6.weight", "classifier.1.bias"])
            {'features.2.conv.6.weight': 'features.2.conv.2.weight', 'classifier.1.bias': 'classifier.1.bias'}
        """
        found = {key: self._ours(key) for key in keys}
        translated = {theirs: ours for theirs, ours in found.items() if ours is not None}
        return translated if len(translated) == len(found) else None

    def _ours(self, key: str) -> str | None:
        module, _, tensor = key.rpartition(".")
        for pattern, name in self.rules.items():
            if match := re.fullmatch(pattern, module):
                return f"{match.expand(name) if isinstance(name, str) else name(match)}.{tensor}"
        return None


def naming_of(network: nn.Module, keys: Iterable[str], wrapper: str | None) -> tuple[Naming, dict[str, str]] | None:
    """The naming by which a file's keys become the network's, and our key for each; None where there is none.

    Args:
        network: of the zoo.
        keys: of the file's state_dict.
        wrapper: the file's key around it, if it had one.
    """
    known, wanted = list(keys), set(_lasting(network.state_dict()))
    for naming in _NAMINGS.get(type(network), ()):
        if not naming.wrappers or wrapper in naming.wrappers:
            translated = naming.translate(known)
            if translated is not None:
                ours = _lasting(translated.values())
                if len(ours) == len(wanted) and set(ours) == wanted:  # no two of theirs are one of ours
                    return naming, translated
    return None


def _lasting(keys: Iterable[str]) -> list[str]:
    """Keys but for BatchNorm's counters, which older files do not have."""
    return [key for key in keys if not key.endswith("num_batches_tracked")]


def _regnet(step: str) -> Callable[[Match], str]:
    """Of block j of stage i, both counted from 1."""
    return lambda m: f"trunk_output.block{m[1]}.block{m[1]}-{int(m[2]) - 1}.{m.expand(step)}"


_PYCLS_REGNET: Rules = {
    r"stem\.conv": "stem.0",
    r"stem\.bn": "stem.1",
    r"s(\d+)\.b(\d+)\.f\.([abc])": _regnet(r"f.\3.0"),
    r"s(\d+)\.b(\d+)\.f\.([abc])_bn": _regnet(r"f.\3.1"),
    r"s(\d+)\.b(\d+)\.proj": _regnet("proj.0"),
    r"s(\d+)\.b(\d+)\.bn": _regnet("proj.1"),
    r"head\.fc": "fc",
}
_TIMM_REGNET: Rules = {
    r"stem\.conv": "stem.0",
    r"stem\.bn": "stem.1",
    **{
        rf"s(\d+)\.b(\d+)\.{theirs}\.{kind}": _regnet(f"{ours}.{place}")
        for theirs, ours in {"conv1": "f.a", "conv2": "f.b", "conv3": "f.c", "downsample": "proj"}.items()
        for place, kind in enumerate(("conv", "bn"))
    },
    r"head\.fc": "fc",
}

# timm's names within a block, in the order of computation: with expansion, and of the first block, which has none.
_EXPANDED = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
_SEPARABLE = ("conv_dw", "bn1", "conv_pw", "bn2")
_MOBILENET_V2_STARTS = (1, 2, 4, 7, 11, 14, 17)  # index in `features` of each stage's first block


def _mobilenet_v2(step: str) -> Callable[[Match], str]:
    """Of block j of timm's stage i, both counted from 0."""
    return lambda m: f"features.{_MOBILENET_V2_STARTS[int(m[1])] + int(m[2])}.conv.{step}"


def _mnasnet(place: int) -> Callable[[Match], str]:
    """The same of MNASNet, whose stages stand behind seven layers of the stem and the first block."""
    return lambda m: f"layers.{7 + int(m[1])}.{m[2]}.layers.{place}"


_TIMM_MOBILENET_V2: Rules = {
    r"conv_stem": "features.0.0",
    r"bn1": "features.0.1",
    **{
        rf"blocks\.(0)\.(0)\.{theirs}": _mobilenet_v2(ours)
        for theirs, ours in zip(_SEPARABLE, ("0.0", "0.1", "1", "2"), strict=True)
    },
    **{
        rf"blocks\.([1-6])\.(\d)\.{theirs}": _mobilenet_v2(ours)
        for theirs, ours in zip(_EXPANDED, ("0.0", "0.1", "1.0", "1.1", "2", "3"), strict=True)
    },
    r"conv_head": "features.18.0",
    r"bn2": "features.18.1",
    r"classifier": "classifier.1",
}
# One flat Sequential a block: convolution, BatchNorm, ReLU6, and so on.
BRECQ_MOBILENET_V2 = Naming("BRECQ", {
    r"features\.(0|18)\.([01])": r"features.\1.\2",
    **{
        rf"features\.1\.conv\.{theirs}": f"features.1.conv.{ours}"
        for theirs, ours in {0: "0.0", 1: "0.1", 3: "1", 4: "2"}.items()
    },
    **{
        rf"features\.([2-9]|1[0-7])\.conv\.{theirs}": rf"features.\1.conv.{ours}"
        for theirs, ours in {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1", 6: "2", 7: "3"}.items()
    },
    r"classifier\.1": "classifier.1",
})  # fmt: skip
_TIMM_MNASNET: Rules = {
    r"conv_stem": "layers.0",
    r"bn1": "layers.1",
    **{rf"blocks\.0\.0\.{theirs}": f"layers.{ours}" for theirs, ours in zip(_SEPARABLE, (3, 4, 6, 7), strict=True)},
    **{
        rf"blocks\.([1-6])\.(\d)\.{theirs}": _mnasnet(ours)
        for theirs, ours in zip(_EXPANDED, (0, 1, 3, 4, 6, 7), strict=True)
    },
    r"conv_head": "layers.14",
    r"bn2": "layers.15",
    r"classifier": "classifier.1",
}

# pycls trains on images whose channels are blue, green, red, which only its own files tell: BRECQ's RegNets have the
# same names and take red, green, blue, and so do timm's, which were turned when they were converted.
_NAMINGS: Mapping[type[nn.Module], tuple[Naming, ...]] = {
    RegNetX: (
        Naming("pycls", _PYCLS_REGNET, ("model_state", "ema_state"), reversed_input="stem.0.weight"),
        Naming("BRECQ", _PYCLS_REGNET),
        Naming("timm", _TIMM_REGNET),
    ),
    MobileNetV2: (Naming("timm", _TIMM_MOBILENET_V2), BRECQ_MOBILENET_V2),
    MNASNet: (Naming("timm", _TIMM_MNASNET),),
}
