"""The commands of the first pages in a row, for real, on a small text: train, resume, evaluate, compare, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from twinmoe.testing.end_to_end.command import prepare

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_first_hour(tmp_path: Path) -> None:
    prepare(tmp_path)

    def twinmoe(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "twinmoe.moe_core.cli", *words, "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first = twinmoe("train", "small.yaml", "train.save_every=2", "--run-dir", "runs/a", "--nproc", "2")
    assert first["steps"] == 4
    words = (
        "train.steps=6",
        "train.save_every=2",
        "parallel.scheme=llep",
        "--run-dir",
        "runs/a",
        "--resume",
        "auto",
        "--nproc",
        "4",
    )
    further = twinmoe("train", "small.yaml", *words)
    assert (further["steps"], further["losses"][:4]) == (6, first["losses"])
    told = twinmoe("eval", "runs/a", "--batches", "4", "--nproc", "2")
    assert told["loss"] == pytest.approx(further["validation_loss"], rel=1e-5)
    assert told["model_hash"] == further["model_hash"]
    table = twinmoe("compare", "small.yaml", "--schemes", "ep,llep", "--seeds", "1", "--nproc", "2", "--csv", "t.csv")
    assert [row["marks"] for row in table["rows"]] == [[], []]
    losses = [row["figures"]["validation_loss"]["mean"] for row in table["rows"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    folders = [folder for row in table["rows"] for folder in row["folders"]]
    assert twinmoe("report", "runs/a", *folders, "--out", "report.html")["bytes"] > 1_000_000
    assert (tmp_path / "t.csv").read_text().count("\n") == 3
