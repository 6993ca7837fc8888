"""What HCCL lacks, in three processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from twinmoe.ascend.torch_npu import comm
from twinmoe.backends.protocol import Group, Launch
from twinmoe.backends.torch_shared.comm import TorchCommunicator
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


@pytest.mark.parametrize(("visible", "index"), [(8, 3), (1, 0)])
def test_a_rank_takes_its_own_device_and_waits_longer_than_hccl(
    monkeypatch: pytest.MonkeyPatch, visible: int, index: int
) -> None:
    taken: list[int] = []

    class Npu:
        @staticmethod
        def device_count() -> int:
            return visible

        @staticmethod
        def set_device(index: int) -> None:
            taken.append(index)

    made: list[Any] = []
    monkeypatch.setattr(torch, "npu", Npu, raising=False)
    monkeypatch.setattr(torch, "device", lambda *words: words)
    monkeypatch.setattr(comm, "NpuCommunicator", lambda *given: made.append(given))
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "1800")
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "1200")
    comm.connect(Launch(rank=3, size=8, local_rank=3, local_size=8, timeout_s=120))
    launch, backend, device = made[0]
    assert (taken, launch.timeout_s, backend, device) == ([index], 1890, "hccl", ("npu", index))


def test_float64_of_the_host_travels_as_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def gather(_: Any, x: np.ndarray, group: Group) -> np.ndarray:
        seen.append(x)
        return np.stack([x, x])

    monkeypatch.setattr(TorchCommunicator, "gather_to_host", gather)
    alone = comm.NpuCommunicator(Launch(), "gloo", torch.device("cpu"))
    found = alone.gather_to_host(np.array([0.1, -1e300]), Group("world", (0, 1), 0, None))
    assert seen[0].dtype == np.int64
    assert found.tolist() == [[0.1, -1e300]] * 2
