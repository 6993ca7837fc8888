"""`twinmoe train` with real processes: what it prints, what it leaves behind, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from twinmoe.moe_core.metrics import METRICS, read_metrics
from twinmoe.testing.end_to_end.command import command, gone, prepare, report, workers
from twinmoe.testing.end_to_end.command import train as run_train

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

KEYS = {
    "steps",
    "losses",
    "loss_first",
    "loss_last",
    "validation_loss",
    "bigram_loss",
    "tokens_per_second",
    "world_size",
    "backend",
    "scheme",
    "peak_memory_bytes",
    "data_hash",
    "model_hash",
    "run_dir",
}
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


@pytest.fixture
def train(folder: Path) -> Command:
    return partial(run_train, folder)


@pytest.fixture
def started(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a long run and wait for its first steps."""
    running: list[subprocess.Popen[str]] = []

    def call(*words: str) -> subprocess.Popen[str]:
        words = ("--run-dir", "run", *words)
        child = subprocess.Popen(command(*words), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(child)
        deadline = time.monotonic() + 120
        while len(read_metrics(folder / "run")) < 3:
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return child

    yield call
    for child in running:
        child.kill()
        child.communicate()


def test_json_keys_and_run_folder(train: Command, folder: Path) -> None:
    summary = report(train("--nproc", "2", "--run-dir", "run", "--json"))
    assert set(summary) >= KEYS
    assert (summary["steps"], summary["world_size"], summary["backend"], summary["scheme"]) == (4, 2, "cpu", "ep")
    assert len(summary["losses"]) == 4
    assert (summary["loss_first"], summary["loss_last"]) == (summary["losses"][0], summary["losses"][-1])
    run = folder / "run"
    assert {"config.yaml", "environment.json", METRICS, "tensorboard", "logs"} <= {p.name for p in run.iterdir()}
    assert {"rank_0.log", "rank_1.log"} <= {p.name for p in (run / "logs").iterdir()}
    environment = json.loads((run / "environment.json").read_text())
    assert {"versions", "command", "commit", "config_hash", "model_hash", "backend", "reason"} <= set(environment)
    assert [r["step"] for r in read_metrics(run)] == [1, 2, 3, 4]
    again = train("--nproc", "2", "--run-dir", "run")
    assert again.returncode == 2
    assert "--resume auto" in again.stderr


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_losses_do_not_depend_on_the_number_of_ranks(train: Command, dtype: str, tolerance: float) -> None:
    words = [f"train.dtype={dtype}", "--json", "--nproc"]
    one, four = (report(train(*words, n, "--run-dir", f"run{n}")) for n in ("1", "4"))
    assert one["losses"] == pytest.approx(four["losses"], rel=tolerance, abs=0)
    assert one["data_hash"] == four["data_hash"]


def test_a_launcher_around_is_joined(folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    joined = [*torchrun, "-m", "twinmoe.moe_core.cli", "train", "small.yaml", "--run-dir", "run", "--json"]
    done = subprocess.run(joined, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, "only rank 0 prints"
    assert json.loads(lines[0])["world_size"] == 2


def test_interrupted_and_resumed_is_the_unbroken_run_bitwise(
    train: Command, started: Callable[..., subprocess.Popen[str]], folder: Path
) -> None:
    words = ["train.steps=150", "--nproc", "2", "--json"]
    child = started(*words)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    stopped = json.loads(out.splitlines()[-1])
    assert stopped["stopped_early"]
    assert 3 <= stopped["steps"] < 150
    assert gone(folder)
    resumed = report(train(*words, "--run-dir", "run", "--resume", "auto"))
    unbroken = report(train(*words, "--run-dir", "unbroken"))
    assert resumed["losses"] == unbroken["losses"]
    assert [r["loss"] for r in read_metrics(folder / "run")] == unbroken["losses"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_ends_the_job(started: Callable[..., subprocess.Popen[str]], folder: Path, victim: int) -> None:
    child = started("train.steps=100000", "--nproc", "2")
    began = time.monotonic()
    os.kill(workers(folder)[victim], signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert f"rank {victim} was ended by SIGKILL" in err
    assert "Traceback" not in err
    assert time.monotonic() - began < 30, "the timeout of train.timeout_s"
    assert gone(folder)


def test_a_killed_supervisor_takes_its_workers_along(
    started: Callable[..., subprocess.Popen[str]], folder: Path
) -> None:
    child = started("train.steps=100000", "--nproc", "2")
    child.kill()
    child.communicate(timeout=20)
    assert gone(folder)


def test_a_request_that_only_a_worker_can_judge_exits_2(train: Command, folder: Path) -> None:
    (folder / "text.txt").unlink()
    done = train("--nproc", "2", "--run-dir", "run")
    assert done.returncode == 2
    assert "no file matches 'text.txt'" in done.stderr
    assert done.stderr.count("\n") == 1
    (folder / "text.txt").write_text("and then it works in the same folder " * 200)
    assert train("--nproc", "2", "--run-dir", "run").returncode == 0


def test_a_worker_that_raises_shows_its_traceback_once(train: Command, folder: Path) -> None:
    """A checkpoint folder that can't be written: rank 0 raises, the others wait for it."""
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("")
    (folder / "run" / "checkpoints").write_text("a file where a folder should be")
    done = train("train.save_every=2", "--nproc", "2", "--run-dir", "run")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert "rank 0 failed; all ranks have ended" in done.stderr
    assert gone(folder)
