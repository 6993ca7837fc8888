"""compare, eval and report on the command line: files written, exit statuses, one sentence for a wrong request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from twinmoe.backends import registry
from twinmoe.moe_core import cli, compare
from twinmoe.moe_core.compose import dump
from twinmoe.moe_core.launch import JobFailedError
from twinmoe.testing.moe_core.run_folders import WORDS, write_run

COMPARE = ("compare", "quickstart", *WORDS, "backend=cpu", "train.global_batch_size=4", "--nproc", "2", "--seeds", "1")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and jobs that leave a run behind at once; those of laer fail."""
    monkeypatch.chdir(tmp_path)
    for variable in (registry.FLAG, "RANK", "WORLD_SIZE", "MS_ROLE"):
        monkeypatch.delenv(variable, raising=False)

    def start(job: Any, console: Any) -> dict[str, Any]:
        if job.config.parallel.scheme == "laer":
            raise JobFailedError("rank 0 failed")
        write_run(job.run_dir)
        (job.run_dir / "config.yaml").write_text(dump(job.config))
        return {}

    monkeypatch.setattr(compare, "start", start)
    return tmp_path


def test_compare_writes_its_table_in_three_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*COMPARE, "--csv", "t.csv", "--latex", "t.tex"]) == 0
    assert "validation loss" in capsys.readouterr().out
    assert Path("t.csv").read_text().count("\n") == 3
    assert r"\toprule" in Path("t.tex").read_text()
    assert cli.run([*COMPARE, "--beside", "runs/compare/ep-seed0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["scheme"] for row in report["rows"]] == ["ep", "llep", "runs/compare/ep-seed0"]


def test_a_failed_run_is_exit_status_1_and_a_wrong_request_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*COMPARE, "--schemes", "ep,laer"]) == 1
    for words, told in (
        ([*COMPARE, "--schemes", "nosuch"], "nosuch"),
        ([*COMPARE, "--csv", "none/t.csv"], "name another file"),
        (["eval", "nowhere"], "there is no folder nowhere"),
        (["report", "nowhere"], "no run folder"),
    ):
        assert cli.run(words) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]


def test_report_writes_where_it_is_told(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    pytest.importorskip("plotly", reason="the extra report is not installed")
    write_run(here / "run")
    assert cli.run(["report", "run", "--out", "page.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == Path("page.html").stat().st_size
