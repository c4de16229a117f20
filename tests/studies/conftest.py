"""A comparison small enough to run, and one that has run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_study import Study, Told, study_fields

from calibquant.studies.compare import Comparison, cells, compare


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    """A recipe's fields, in the test's own folder."""
    return study_fields(tmp_path)


@pytest.fixture
def study(fields: dict[str, Any]) -> Study:
    """study(...) -> a comparison of nearest and qdrop at W2A2 with two seeds, or what the arguments say instead."""
    return lambda **change: compare(
        **{"recipe": fields, "methods": ["nearest", "qdrop"], "bits": ["w2a2"], "seeds": 2} | change
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Told]:
    """The same at W4A4 and W2A2, run once; not to be changed."""
    heard = Told()
    fields = study_fields(tmp_path_factory.mktemp("finished"))
    return compare(fields, ["nearest", "qdrop"], ["w4a4", "w2a2"], 2, reporter=heard), heard


@pytest.fixture
def copied(finished: tuple[Comparison, Told], tmp_path: Path) -> Path:
    """Its folder, to be changed."""
    return Path(shutil.copytree(finished[0].folder, tmp_path / "copied"))


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cell may quantize."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a cell was run")

    monkeypatch.setattr(cells, "quantize", refuse)
    monkeypatch.setattr(cells, "resume", refuse)
