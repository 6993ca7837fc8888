"""What README says is there is there, and its Python runs."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from twinmoe.backends import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_path_that_pages_name_exists() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests|moe_core|backends|configs|cuda|ascend|docs)/[\w/.]*)`", text))
    named |= set(re.findall(r"\]\(([\w/.]+)\)", text))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def file_map() -> list[str]:
    """Paths of the file map, patterns included."""
    block = next(b for b in re.findall(r"```\w*\n(.*?)```", README, re.DOTALL) if b.startswith("moe_core/"))
    paths, folder = [], ""
    for line in block.splitlines():
        words = list(itertools.takewhile(re.compile(r"[\w*]+(\.\w+|/)$").match, line.split()))
        folder = words[0] if not line.startswith(" ") else folder
        paths += [folder] if not line.startswith(" ") else [folder + word for word in words]
    return paths


def test_the_file_map_is_the_tree() -> None:
    """Every entry exists, and every file of the core stands in it (folders below it in one line)."""
    listed = {path for entry in file_map() for path in ROOT.glob(entry)}
    assert [entry for entry in file_map() if not list(ROOT.glob(entry))] == []
    core = {path for path in (ROOT / "moe_core").glob("*.py") if path.name != "__init__.py"}
    assert sorted(path.name for path in core - listed) == []


def test_the_python_example_runs() -> None:
    if not registry.probe("cpu").available:
        pytest.skip("torch is not installed")
    import torch

    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    names: dict[str, object] = {"x": torch.ones(3, 512)}
    exec(code, names)
    out = names["out"]
    assert out.y.shape == (3, 512)  # type: ignore[attr-defined]
    assert "load_balance" in out.losses  # type: ignore[attr-defined]
