"""What README, docs and examples show runs as it stands; links inside the project lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from calibquant.recipe import Recipe, load_recipe

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


def test_the_guide_lists_every_field_of_the_recipe() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    missing = [path for path in _fields(Recipe) if f"`{path}`" not in guide]
    assert missing == []


def _fields(section: type, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in section.model_fields.items():  # type: ignore[attr-defined]
        inner = field.annotation
        if hasattr(inner, "model_fields"):
            found += _fields(inner, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


def _run(arguments: list[str], cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
