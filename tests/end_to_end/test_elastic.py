"""Under torchrun's elastic restart: a worker is killed or a node lost, and all go on from the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from twinmoe.moe_core.metrics import read_metrics
from twinmoe.testing.end_to_end.command import prepare, report, train
from twinmoe.testing.processes import free_port

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

WORDS = ("train.steps=60", "train.save_every=5", "train.dtype=float64", "train.adam_eps=0.001", "--run-dir")
TRAIN = ("-m", "twinmoe.moe_core.cli", "train", "small.yaml", *WORDS, "run", "--resume", "auto", "--json")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--max-restarts=2")


@contextmanager
def agents(folder: Path, *commands: tuple[str, ...]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One launcher each, as on nodes of their own."""
    running = []
    for number, command in enumerate(commands):
        with (folder / f"agent_{number}.txt").open("w") as log:
            running.append(subprocess.Popen([*TORCHRUN, *command, *TRAIN], cwd=folder, stdout=log, stderr=log))
    try:
        yield running
    finally:
        for agent in running:
            for process in (*children(agent.pid), agent.pid):
                if agent.poll() is None:
                    os.kill(process, signal.SIGKILL)
            agent.wait()


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            found += [int(entry.name)] if int(fields[1]) == parent else []
    return sorted(found)


def after_steps(folder: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(folder / "run")) < number:
        assert time.monotonic() < deadline, (folder / "agent_0.txt").read_text()[-3000:]
        time.sleep(0.02)


def ended(folder: Path, agent: subprocess.Popen[bytes]) -> dict[str, object]:
    told = folder / "agent_0.txt"
    assert agent.wait(180) == 0, told.read_text()[-3000:]
    return json.loads([line for line in told.read_text().splitlines() if line.startswith("{")][-1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_starts_all_again_from_the_last_checkpoint(folder: Path, victim: int) -> None:
    with agents(folder, ("--standalone", "--nproc-per-node=2")) as (agent,):
        after_steps(folder, 12)
        os.kill(children(agent.pid)[victim], signal.SIGKILL)
        summary = ended(folder, agent)
    assert summary["resumed"]["bitwise"]  # type: ignore[index]
    unbroken = report(train(folder, *WORDS, "unbroken", "--nproc", "2", "--json"))["losses"]
    assert summary["losses"] == unbroken
    assert [r["loss"] for r in read_metrics(folder / "run")] == unbroken


def test_a_lost_node_leaves_the_others_to_go_on_at_a_smaller_size(folder: Path) -> None:
    """nnodes=1:2: the one that is left is a world of its own; losses stay within rounding."""
    port = free_port()
    node = (
        *("--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job", "--local-addr=127.0.0.1"),
        *(f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=5,keep_alive_interval=1"),
    )
    with agents(folder, (*node, f"--master-port={port + 1}"), (*node, f"--master-port={port + 1}")) as (first, second):
        after_steps(folder, 12)
        assert json.loads((folder / "run" / "environment.json").read_text())["world_size"] == 2
        for process in (second.pid, *children(second.pid)):
            os.kill(process, signal.SIGKILL)
        summary = ended(folder, first)
    assert summary["world_size"] == 1
    assert summary["resumed"]["notes"][0] == "the layout of the run changed: ranks 2 became 1"  # type: ignore[index]
    unbroken = report(train(folder, *WORDS, "unbroken", "--nproc", "1", "--json"))["losses"]
    assert summary["losses"] == pytest.approx(unbroken, rel=1e-9)
