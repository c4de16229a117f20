"""Every loader accepts its good files, and accepts or refuses every damaged one as it should."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from calibquant.errors import CalibQuantError, DataError

from . import LOADERS, Loader, Site
from .loaders import MUTATORS, RECIPE, WrongExitError, command
from .mutators import PLACES
from .running import BYTES, SECONDS

# Cases of each loader; those that run a command take a tenth of a second each.
CASES = {"evaluate RECIPE": 50, "inspect RUN": 60, "export RUN": 40, "inspect ONNX": 40}
MOST = 250


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files_are_accepted_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    site = Site(LOADERS[name], tmp_path / "site")
    good = site.good()
    assert good.word == "accepted", good
    outcomes = {seed: site.run(seed) for seed in range(CASES.get(name, MOST))}
    faults = {seed: outcome for seed, outcome in outcomes.items() if outcome.word == "fault"}
    assert not faults, faults
    assert any(outcome.word == "refused" for outcome in outcomes.values()) or name == "predictions of a study"
    assert site.good().word == "accepted"


@pytest.mark.parametrize("kind", MUTATORS)
def test_mutators_are_seeded_and_take_anything(kind: str) -> None:
    for mutate in MUTATORS[kind]:
        for data in (b"", b"\0", b"x: 1\n", RECIPE.encode(), b'{"a": [1, {"b": null}]}', bytes(range(256)) * 4):
            for seed in range(5):
                assert mutate(data, Random(seed)) == mutate(data, Random(seed))


def _faulty(name: str) -> Loader:
    """A loader of text that does what no loader may."""

    def load(folder: Path) -> object:
        (folder / "a.txt").read_bytes()
        if name == "raises":
            raise KeyError("x")
        if name == "two lines":
            error = DataError("a.txt", "x", "y")
            error.args = ("a.txt: x\ny",)
            raise error
        if name == "no file":
            raise DataError("b.txt", "is wrong", "correct it")
        if name == "hangs":
            while True:
                pass
        if name == "memory":
            return bytearray(b"x") * (BYTES + (64 << 20))
        raise DataError("a.txt", "is wrong", "correct it")

    def make(folder: Path) -> list[Path]:
        (folder / "a.txt").write_text("1")
        return [folder / "a.txt"]

    return Loader(name, ("bytes",), make, load, places=False)


@pytest.mark.parametrize(
    ("name", "word", "said"),
    [
        ("refuses", "refused", "is wrong"),
        ("raises", "fault", "KeyError"),
        ("two lines", "fault", "not one line"),
        ("no file", "fault", "names no file"),
        ("hangs", "fault", "hang"),
        ("memory", "fault", "memory: 1.1 GiB"),
    ],
)
def test_the_fuzzer_sees_each_kind_of_fault(
    name: str, word: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuzz.running.SECONDS", 0.2 if name == "hangs" else SECONDS)
    outcome = Site(_faulty(name), tmp_path / "site").run(0)
    assert outcome.word == word
    assert said in outcome.text


def test_a_command_that_ends_otherwise_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibQuantError, match="No such command"):
        command("quantise")
    monkeypatch.setattr("calibquant.cli.main", lambda _: 2)
    with pytest.raises(WrongExitError, match="exit code 2"):
        command("quantise")


def test_a_case_is_the_same_each_time(tmp_path: Path) -> None:
    runs = [Site(LOADERS["recipe"], tmp_path / str(i) / "site") for i in range(2)]
    for seed in range(30):
        first, second = (site.run(seed) for site in runs)
        assert (first.word, first.damage) == (second.word, second.damage)


def test_places_are_put_back(tmp_path: Path) -> None:
    site = Site(LOADERS["manifest"], tmp_path / "site")
    seen = {outcome.damage[-1] for outcome in map(site.run, range(800))} & set(PLACES)
    assert seen == set(PLACES)
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["manifest.csv"]
    assert site.good().word == "accepted"


def test_the_table_is_whole() -> None:
    names = " ".join(LOADERS)
    for word in ("recipe", "override", "graph", "safetensors", "receipt", "manifest", "CSV", "class list", "tar",
                 "image", "weights", "CIFAR", "onnx", "checkpoint"):  # fmt: skip
        assert word in names
