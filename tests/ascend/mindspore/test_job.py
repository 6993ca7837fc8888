"""Three processes: HCCL's wire (over gloo, call by call like the real one) against gloo's, and sharded training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.contract.test_comm import free_port

load_or_skip("mindspore-cpu")

RANKS = 3
SECONDS = 120
CHECKS = ("uneven", "equal", "gathers", "reductions", "exchanges", "hosts", "refusals", "sharded")
WORKER = Path(__file__).with_name("job_worker.py")


@pytest.fixture(scope="module")
def outputs() -> list[str]:
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(RANKS), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(RANKS)
    ]
    try:
        return [worker.communicate(timeout=SECONDS)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@pytest.mark.parametrize("check", CHECKS)
def test_check_holds_on_every_rank(outputs: list[str], check: str) -> None:
    for rank, output in enumerate(outputs):
        assert check in output.splitlines(), f"rank {rank}:\n{output[-2000:]}"
