"""What README, docs and examples show runs as it stands; links inside the project lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic.fields import FieldInfo

from calibquant.recipe import Recipe, load_recipe
from calibquant.recipe.section import Section, leaves, section_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> str:
    """The page's Python blocks in order; they share one namespace."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    _run(["-c", blocks(page)], tmp_path)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    assert _run([str(example)], tmp_path).strip()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_tables_of_the_readme_are_those_of_the_results(tmp_path: Path) -> None:
    _run([str(ROOT / "benchmarks" / "readme.py"), "--check"], tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_are_valid_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.model.name is not None
    assert recipe.data.kind is not None


def _rows() -> dict[str, list[str]]:
    """The guide's table of fields: by field the cells of its row, of which the first names it."""
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    table = guide.split("## The recipe")[1].split("## Recipes that come along")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if line[:1] == "|"]
    return {field: row for row in rows for field in re.findall(r"`([a-z_.]+)`", row[0])}


def _field(path: str) -> FieldInfo:
    section: type[Section] = Recipe
    *outer, last = path.split(".")
    for name in outer:
        section = section_of(section.model_fields[name]) or section
    return section.model_fields[last]


FIELDS = list(leaves(Recipe))


def test_the_guide_lists_every_field_of_the_recipe_and_no_other() -> None:
    sections = {"data.augment", "data.calibration_preprocess", "quant.mixed", "finetune", "train"}  # that may be absent
    assert len(FIELDS) >= 160
    assert set(_rows()) == {*FIELDS, *sections}


@pytest.mark.parametrize("path", FIELDS)
def test_the_guide_gives_the_default_and_the_values_of_a_field(path: str) -> None:
    row, field = _rows()[path], _field(path)
    if "as under" not in row[1]:
        default = "none" if field.default is None else str(field.default)
        told = {"by kind": "none", "`[0.75, 1.333…]`": str((3 / 4, 4 / 3))}.get(row[1], row[1].strip("`"))
        if default != told:
            assert yaml.safe_load(told) == (list(field.default) if isinstance(field.default, tuple) else field.default)
        for value in _literals(field.annotation):
            assert f"`{value}`" in " ".join(row), value


def _literals(annotation: Any) -> list[str]:
    return [p for part in get_args(annotation) for p in ([part] if isinstance(part, str) else _literals(part))]


def _run(arguments: list[str], cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
