"""MindSpore's own launcher on the host: our reading of its variables is its own numbering, groups work, and our
supervisor ends a job that msrun alone would wait for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from twinmoe.backends.registry import worker_environment
from twinmoe.moe_core import launch
from twinmoe.moe_core.launch import Job, JobFailedError, run_job
from twinmoe.moe_core.worker import Order
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
    for line in ("rank 0", "rank 1", "collectives 0", "collectives 1", "point to point 0", "point to point 1"):
        assert line in logs.splitlines(), f"{output[-1500:]}\n{logs[-3000:]}"


class Silent:
    def poll(self) -> None:
        pass


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_a_killed_rank_ends_an_msrun_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 dies after `init`; rank 0 and the scheduler, which wait for it, are ended within seconds."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(launch, "WORKER", "twinmoe.testing.ascend.mindspore.msrun_victim")
    began = time.monotonic()
    with pytest.raises(JobFailedError, match="rank 1 was ended from outside"):
        run_job(Job(Order("train", tmp_path, "mindspore-cpu", "a test"), 2, "msrun", free_port()), Silent())
    assert time.monotonic() - began < 60
    assert running("msrun_victim") == []


def running(word: str) -> list[str]:
    """Command lines of processes with that word."""
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if word in line]
