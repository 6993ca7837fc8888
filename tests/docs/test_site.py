"""The site builds without a warning, from the pages and from the code."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from twinmoe.moe_core import __all__ as offered
from twinmoe.moe_core.combinations import RULES
from twinmoe.moe_core.keys import valid_keys

ROOT = Path(__file__).parents[2]
pytest.importorskip("mkdocs", reason="mkdocs-material is not installed")


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_and_every_rule_has_its_line(hooks: Any) -> None:
    pages = hooks.pages()
    settings = pages["reference/settings.md"]
    assert [key for key in valid_keys() if f"`{key}`" not in settings and f"## {key}" not in settings] == []
    combinations = pages["reference/combinations.md"]
    assert combinations.count("\n| `") == len(RULES) + combinations.split("## Every rule")[0].count("\n| `")
    assert [n for n in offered if not n.startswith("_") and f"## {n}\n" not in pages["reference/python.md"]] == []
    assert "## twinmoe bench schemes\n" in pages["reference/commands.md"]


def test_routers_and_schemes_are_combined_freely_as_the_page_says() -> None:
    assert [r for r in RULES if "moe.router" in (r.first, r.second) and "parallel" in r.first + r.second] == []


def test_the_grid_counts_the_cases_of_verify(hooks: Any) -> None:
    grid = hooks.grid()
    assert "| `standard` |" in grid
    assert "| scheme | ep (" in grid
    assert "| `float64` | 1e-10 |" in grid


@pytest.mark.slow  # `make docs` does it, too
@pytest.mark.processes
@pytest.mark.timeout(240)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for page in ("index", "get_started", "how_to/report", "reference/settings", "exactness"):
        assert (tmp_path / "site" / f"{page}.html").exists()
    assert "<!-- grid -->" not in (tmp_path / "site" / "exactness.html").read_text(encoding="utf-8")
