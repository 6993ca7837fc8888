"""MindSpore's own launcher on the host: our reading of its variables is its own numbering, and groups work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from twinmoe.backends.registry import worker_environment
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.contract.test_comm import free_port

load_or_skip("mindspore-cpu")

SECONDS = 100
WORKER = Path(__file__).with_name("msrun_worker.py")


@pytest.mark.slow
def test_ranks_and_groups_of_a_job_of_two(tmp_path: Path) -> None:
    folder = Path(sys.executable).parent
    command = ["--worker_num=2", "--local_worker_num=2", "--node_rank=0", "--master_addr=127.0.0.1"]
    command += [
        f"--master_port={free_port()}",
        "--bind_core=False",
        f"--log_dir={tmp_path}",
        "--join=True",
        str(WORKER),
    ]
    job = subprocess.Popen(
        [str(folder / "msrun"), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=worker_environment(str(folder)),
        start_new_session=True,
    )
    try:
        output = job.communicate(timeout=SECONDS)[0]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, 9)
            job.wait()
    logs = "\n".join(p.read_text() for p in sorted(tmp_path.glob("worker_*.log")))
    for line in ("rank 0", "rank 1", "collectives 0", "collectives 1"):
        assert line in logs.splitlines(), f"{output[-1500:]}\n{logs[-3000:]}"
