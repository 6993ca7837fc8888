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


@pytest.mark.processes
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_torchrun_text_trains_on_two_nodes(tmp_path: Path):
    run_dir, script = tmp_path / "run", tmp_path / "launch.sh"
    script.write_text(launch_text("torchrun", Cluster(2, 2), ["quickstart", *SMALL], str(run_dir)))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with Testbed(Shape(2, 1)) as testbed:
        words = ["sh", "-c", f"NODE_RANK=$RANK exec sh {script}"]
        statuses = run_ranks(testbed, words, environment, 29670, tmp_path / "log", 200)
    assert statuses == [0, 0], (tmp_path / "log").read_text()[-3000:]
    assert json.loads((run_dir / "summary.json").read_text())["world_size"] == 4
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert set(steps[-1]["bytes"]) == {"node", "node rails"}
