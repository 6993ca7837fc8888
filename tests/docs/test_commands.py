"""What the pages tell people to type: every command is parsed and its settings resolved, the cheap ones are run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from twinmoe.backends import registry
from twinmoe.moe_core import cli
from twinmoe.moe_core.bench_job import Where
from twinmoe.moe_core.bench_schemes_request import SchemesRequest, scheme_config
from twinmoe.moe_core.compare import entries
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import Config
from twinmoe.testing.moe_core.run_folders import write_run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").rglob("*.md"))]
DEVICES = {"cuda": "cpu", "ascend": "mindspore-cpu", "ascend-torch": "cpu"}
"""Backends that pages name -> one that every machine has."""
PLACEHOLDERS = ("MODEL", "DIR", "CONFIG", "NAME", "/shared", "router=closest")
"""What a page has its reader bring: folders, or the package that it has just written."""
RUN_HERE = ("doctor", "configs list", "configs show", "launch", "train", "report")
"""Commands that run here as they stand (train as a dry run)."""
RUN_ELSEWHERE = {
    "train": "tests/end_to_end/test_train_command.py",
    "compare": "tests/moe_core/test_compare.py",
    "eval": "tests/moe_core/test_evaluate.py",
    "verify": "tests/exactness/test_reference.py",
    "acceptance": "tests/moe_core/test_acceptance.py",
    "bench planner": "tests/moe_core/test_bench_planner.py",
    "bench router": "tests/moe_core/test_bench_router.py",
    "bench layer": "tests/moe_core/test_bench_layer.py",
    "bench comm": "tests/moe_core/test_bench_comm.py",
    "bench schemes": "tests/moe_core/test_bench_schemes.py",
    "data export": "tests/moe_core/test_data.py",
    "configs copy": "tests/moe_core/test_cli.py",
    "trace record": "tests/moe_core/test_cli_trace.py",
    "trace import": "tests/moe_core/test_cli_trace.py",
    "trace synth": "tests/moe_core/test_cli_trace.py",
    "trace show": "tests/moe_core/test_cli_trace.py",
    "simulate": "tests/moe_core/test_cli_trace.py",
    "plan": "tests/moe_core/test_cli_trace.py",
    "convert from-hf": "tests/end_to_end/test_huggingface_page.py",
    "convert to-hf": "tests/end_to_end/test_finetune.py",
}
"""Commands that take long or need what a page can't bring: where they are run."""


def blocks(text: str) -> Iterator[str]:
    """Fenced blocks that hold command lines, and indented ones."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if kind in ("", "sh", "bash", "console"):
            yield block
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield "\n".join(line.strip() for line in plain.splitlines() if line.startswith("    "))


def lines(page: Path) -> list[str]:
    """Command lines of a page: continued lines joined, comments and assignments in front left out."""
    found = []
    for block in blocks(page.read_text(encoding="utf-8")):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = re.sub(r"^(\$ )?([A-Z_]+=\S+ )*", "", re.split(r"\s#", line)[0].strip())
            if re.match(r"(twinmoe|python|make|pip) ", line):
                found.append(re.split(r"\s[>|&]", line)[0].strip())
    return found


LINES = sorted({(page.name, line) for page in PAGES for line in lines(page)})
OURS = sorted({line for _, line in LINES if line.startswith("twinmoe ") and "..." not in line})


def command_of(line: str) -> tuple[str, list[str], Any]:
    """Name, words and click command of a line."""
    words, command, name = shlex.split(line)[1:], typer.main.get_command(cli.app), []
    while hasattr(command, "commands"):
        assert set(words[:1]) & set(command.commands), f"{line}: no such command"  # type: ignore[attr-defined]
        name.append(words[0])
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    return " ".join(name), words, command


def values_of(line: str) -> tuple[str, dict[str, Any]]:
    name, words, command = command_of(line)
    return name, command.make_context(name, list(words)).params


def test_pages_have_commands_and_each_of_ours_is_shown() -> None:
    shown = {command_of(line)[0] for line in OURS}
    assert len(OURS) > 40
    assert {"train", "compare", "eval", "report", "doctor", "verify", "launch"} <= shown
    untold = sorted(shown - set(RUN_HERE) - set(RUN_ELSEWHERE))
    assert untold == [], "say where these are run"
    assert [path for path in RUN_ELSEWHERE.values() if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("line", OURS)
def test_every_command_is_understood(line: str) -> None:
    name, values = values_of(line)
    if any(mark in line for mark in PLACEHOLDERS):
        return
    for config in configs(name, values):
        assert config.train.steps > 0


def configs(name: str, values: dict[str, Any]) -> list[Config]:
    """What the settings of a command come to."""
    words = tuple(values.get("overrides") or ())
    if name == "compare":
        made = entries(values["schemes"].split(","))
        return [load_config(values["config"], (*words, *entry.words)) for entry in made]
    if name == "bench schemes":
        request = SchemesRequest(Where(), num_experts=values["experts"], top_ks=tuple(values["top_k"] or (2,)))
        return [scheme_config(scheme, request) for scheme in values["scheme"] or ("ep",)]
    named = name in ("train", "launch", "data export")
    return [load_config(values["config"], words)] if named and Path(values["config"]).suffix == "" else []


def cheap() -> list[str]:
    """Each command line that runs here, a dry run of each `train` that needs no other file."""
    found = []
    for line in OURS:
        name = command_of(line)[0]
        if name in RUN_HERE and not any(mark in line for mark in PLACEHOLDERS) and ".yaml" not in line:
            found.append(line)
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the runs that pages speak of."""
    monkeypatch.chdir(tmp_path)
    for variable in (registry.FLAG, "RANK", "WORLD_SIZE", "MS_ROLE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.mark.parametrize("line", cheap())
def test_cheap_commands_run(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = command_of(line)[0]
    words = [_on_this_machine(word) for word in shlex.split(line)[1:]]
    if name == "train":
        words = [*_without(words, "--resume"), *(["--dry-run"] if "--dry-run" not in words else [])]
    for run in re.findall(r"(?<!-dir )\bruns/\S+", line) if name == "report" else ():
        write_run(here / run)
    assert cli.run(words) == 0, capsys.readouterr().err


def _on_this_machine(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}={DEVICES.get(value, value)}" if key == "backend" else word


def _without(words: list[str], option: str) -> list[str]:
    place = words.index(option) if option in words else None
    return words if place is None else [*words[:place], *words[place + 2 :]]


def test_scripts_targets_and_extras_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    extras = set(re.findall(r"^([\w-]+) =$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE))
    wrong = []
    for page, line in LINES:
        words = shlex.split(line)
        if words[0] == "make":
            named = [w for w in words[1:] if "=" not in w and not w.startswith("-")]
            wrong += [(page, line)] if not set(named) <= targets else []
        elif words[0] == "python":
            scripts = [w for w in words[1:] if w.endswith(".py") or w.startswith("tests/")]
            wrong += [(page, line)] if not all((ROOT / script.split("::")[0]).exists() for script in scripts) else []
        elif words[0] == "pip":
            wanted = {e for w in words for names in re.findall(r"\[([\w,-]+)\]", w) for e in names.split(",")}
            wrong += [(page, line)] if not wanted <= extras else []
    assert wrong == []


def python_blocks() -> list[tuple[str, str]]:
    """Python of the pages; that of routers.md and README is run by their own tests."""
    found = []
    for page in PAGES:
        if page.name not in ("routers.md", "README.md", "README.zh-CN.md"):
            found += [(page.name, b) for b in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    return found


@pytest.mark.parametrize(("page", "code"), python_blocks(), ids=lambda value: str(value)[:20])
def test_python_of_the_pages_runs(page: str, code: str) -> None:
    if not registry.probe("cpu").available:
        pytest.skip("torch is not installed")
    run: Callable[..., None] = exec
    run(code, {"__name__": page})
