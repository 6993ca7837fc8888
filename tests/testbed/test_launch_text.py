"""The text that `twinmoe launch --print torchrun` prints trains on two nodes, which the job finds by itself."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from twinmoe.moe_core.launch_text import Cluster, launch_text
from twinmoe.moe_core.testbed import Shape, Testbed, run_ranks, unavailable

REASON = unavailable()
SMALL = [
    "train.steps=2",
    "train.global_batch_size=4",
    "train.sequence_length=32",
    "train.validation_batches=1",
    "train.validate_every=0",
    "train.save_every=0",
    "model.num_layers=1",
    "parallel.scheme=hiermoe",
]


pytestmark = [pytest.mark.processes, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def run_text(nproc: int, run_dir: Path, log: Path, before: str = "") -> list[int]:
    """Statuses of the printed script on two nodes; `before` runs first on each, which sees its number as $RANK."""
    script = log.with_suffix(".sh")
    script.write_text(launch_text("torchrun", Cluster(2, nproc), ["quickstart", *SMALL], str(run_dir)))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with Testbed(Shape(2, 1)) as testbed:
        words = ["sh", "-c", f"{before} NODE_RANK=$RANK exec sh {script}"]
        return run_ranks(testbed, words, environment, 29670, log, 200)


def test_torchrun_text_trains_on_two_nodes(tmp_path: Path):
    run_dir = tmp_path / "run"
    assert run_text(2, run_dir, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()[-3000:]
    assert json.loads((run_dir / "summary.json").read_text())["world_size"] == 4
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert set(steps[-1]["bytes"]) == {"node", "node rails"}


def test_a_run_folder_that_the_second_node_does_not_see_is_refused_before_the_first_step(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    hidden = f"test $RANK = 0 || mount -t tmpfs tmpfs {run_dir};"  # a node's processes have mounts of their own
    statuses = run_text(1, run_dir, tmp_path / "log", hidden)
    assert all(statuses)
    told = (tmp_path / "log").read_text() + "".join(p.read_text() for p in run_dir.rglob("*.json"))
    assert f"ranks 1 do not see the run folder {run_dir} of rank 0" in told
    assert not (run_dir / "metrics.jsonl").exists()
