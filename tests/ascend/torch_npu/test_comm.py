"""What HCCL lacks, in three processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from twinmoe.testing.contract.test_comm import free_port

RANKS = 3
SECONDS = 90
WORKER = Path(__file__).with_name("comm_worker.py")


def test_collectives_keep_to_hccl_s_rules() -> None:
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(RANKS), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [worker.communicate(timeout=SECONDS)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for rank, output in enumerate(outputs):
        assert {"exchanges", "norms"} <= set(output.splitlines()), f"rank {rank}:\n{output[-2000:]}"
