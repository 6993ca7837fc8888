"""Whenever a run is killed, a whole checkpoint is left and the run that goes on from it is the unbroken one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from twinmoe.moe_core.checkpoint import LATEST, Checkpoint
from twinmoe.moe_core.metrics import read_metrics
from twinmoe.testing.end_to_end.command import command, gone, prepare, report, train, workers

pytestmark = [pytest.mark.processes]

ROUNDS = 50
WORDS = ("train.save_every=1", "train.learning_rate=0.001", "train.min_learning_rate=0.001", "--nproc", "2")
"""A save after every step; a rate that does not depend on how many there will be."""


def pointer(run_dir: Path) -> str:
    return (run_dir / LATEST).read_text().strip() if (run_dir / LATEST).exists() else ""


def saved(run_dir: Path) -> int:
    """Step of the checkpoint that is left, which is whole; 0 where there is none yet."""
    name = pointer(run_dir)
    return Checkpoint(run_dir / "checkpoints" / name).step if name else 0


def one_round(folder: Path, chance: random.Random, step: int) -> int:
    """Go on, kill a rank, both or the supervisor at a random moment; the step of what is left."""
    run_dir = folder / "run"
    words = command("train.steps=100000", *WORDS, "--run-dir", "run", "--resume", "auto")
    with (folder / "told.txt").open("w") as told:
        child = subprocess.Popen(words, cwd=folder, stdout=told, stderr=told)
    try:
        until = time.monotonic() + 60
        if chance.random() < 0.1:  # while it starts
            until = time.monotonic() + chance.uniform(0, 3)
        before = pointer(run_dir)
        while time.monotonic() < until and pointer(run_dir) == before:
            assert child.poll() is None, (folder / "told.txt").read_text()
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))
        ranks = workers(folder)
        together = ranks and chance.random() < 0.2
        for victim in ranks if together else [chance.choice([*ranks, child.pid])]:
            os.kill(victim, signal.SIGKILL)
        child.wait(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert gone(folder)
    left = saved(run_dir)
    assert left >= step, "a saved step was lost"
    return left


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_at_random_moments_leave_a_whole_checkpoint_each_time(tmp_path: Path) -> None:
    folder, chance, steps = prepare(tmp_path), random.Random(7), [0]
    for _ in range(ROUNDS):
        steps.append(one_round(folder, chance, steps[-1]))
    print("steps saved after each round:", steps)
    last = ("train.steps=" + str(steps[-1] + 2), *WORDS)
    resumed = report(train(folder, *last, "--run-dir", "run", "--resume", "auto", "--json"))
    unbroken = report(train(folder, *last, "--run-dir", "unbroken", "train.save_every=0", "--json"))
    assert resumed["losses"] == unbroken["losses"]
    assert [r["loss"] for r in read_metrics(folder / "run")] == unbroken["losses"]
