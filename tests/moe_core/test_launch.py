"""Local workers end together, however one of them ends, and the first failure is told once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from twinmoe.moe_core import launch, worker
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.launch import Job, JobFailedError, free_port, run_job
from twinmoe.moe_core.worker import Order, note_failure

_BEFORE = "import json, os, sys, time\nrun = sys.argv[1]\n"


@dataclass(frozen=True)
class ScriptJob(Job):
    """A job whose launcher is a Python script that finds its run folder in argv[1]."""

    script: str = ""

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.script, str(self.order.run_dir)]


class Silent:
    def poll(self) -> None:
        pass


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str], ScriptJob]:
    (tmp_path / "logs").mkdir()
    order = Order("train", tmp_path, "cpu", "a test")
    return lambda script: ScriptJob(order, 2, "torchrun", 1, script=_BEFORE + script)


def fail(rank: int, moment: float, sentence: str, request: bool = False) -> str:
    told = {
        "rank": rank,
        "time": moment,
        "request": request,
        "sentence": sentence,
        "traceback": f"Traceback\n{sentence}",
    }
    return f"open(run + '/logs/rank_{rank}.error.json', 'w').write({json.dumps(told)!r})\n"


SUMMARY = "open(run + '/summary.json', 'w').write('{\"steps\": 3}')\n"


def test_the_summary_of_rank_0_is_the_result(job: Callable[[str], ScriptJob]) -> None:
    assert run_job(job(SUMMARY), Silent()) == {"steps": 3}


def test_the_rank_that_failed_first_is_told(job: Callable[[str], ScriptJob]) -> None:
    script = fail(1, 20.0, "Connection reset by peer") + fail(3, 10.0, "the cause") + "sys.exit(1)"
    with pytest.raises(JobFailedError) as caught:
        run_job(job(script), Silent())
    assert str(caught.value) == "rank 3 failed; all ranks have ended\nTraceback\nthe cause"
    assert not caught.value.request


def test_a_wrong_request_is_told_without_a_traceback(job: Callable[[str], ScriptJob]) -> None:
    with pytest.raises(JobFailedError) as caught:
        run_job(job(fail(0, 1.0, "data.paths names no file", request=True) + "sys.exit(1)"), Silent())
    assert str(caught.value) == "data.paths names no file"
    assert caught.value.request


def test_a_rank_that_a_signal_ended_is_the_cause_of_what_others_saw(job: Callable[[str], ScriptJob]) -> None:
    report = "  rank      : 2 (local_rank: 2)\n  exitcode  : -9 (pid: 7)\n"
    script = fail(0, 1.0, "Connection closed by peer") + f"print({report!r})\nsys.exit(1)"
    with pytest.raises(JobFailedError, match=r"rank 2 was ended by SIGKILL \(often: out of memory\)"):
        run_job(job(script), Silent())


def test_a_launcher_that_dies_without_a_word_shows_its_last_lines(job: Callable[[str], ScriptJob]) -> None:
    with pytest.raises(JobFailedError, match=r"status 3.*\nno such module"):
        run_job(job("print('no such module')\nsys.exit(3)"), Silent())


def test_workers_that_hang_after_a_failure_are_ended(
    job: Callable[[str], ScriptJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_ORDERLY", 0.5)
    monkeypatch.setattr(launch, "_HARD", 0.5)
    stubborn = (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + fail(0, 1.0, "the cause") + "time.sleep(600)"
    )
    started = time.monotonic()
    with pytest.raises(JobFailedError, match="the cause"):
        run_job(job(stubborn), Silent())
    assert time.monotonic() - started < 20


def test_an_earlier_attempt_is_forgotten(job: Callable[[str], ScriptJob], tmp_path: Path) -> None:
    note_failure(tmp_path, 0, RuntimeError("of yesterday"))
    assert run_job(job(SUMMARY), Silent()) == {"steps": 3}


def after(seconds: float, *names: int) -> None:
    for name in names:
        threading.Timer(seconds, os.kill, (os.getpid(), name)).start()
        seconds += 0.3


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_save_and_end(job: Callable[[str], ScriptJob], name: int) -> None:
    after(0.5, name)
    assert run_job(job("assert os.read(0, 1) == b's'\n" + SUMMARY), Silent()) == {"steps": 3}


def test_the_second_signal_ends_at_once(job: Callable[[str], ScriptJob], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_HARD", 0.5)
    after(0.5, signal.SIGINT, signal.SIGINT)
    with pytest.raises(JobFailedError, match="stopped before the run could save"):
        run_job(job("time.sleep(600)"), Silent())


def test_signal_handlers_are_put_back(job: Callable[[str], ScriptJob]) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run_job(job(SUMMARY), Silent())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_workers_follow_the_line_to_their_supervisor() -> None:
    """A byte is SIGTERM, the end of the line is the end."""
    script = (
        "import signal, threading, time\nfrom twinmoe.moe_core import worker\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
        "threading.Thread(target=worker._listen, daemon=True).start()\nprint('ready', flush=True)\n"
        "while True: time.sleep(0.1)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin
    assert child.stdout
    assert child.stdout.readline() == b"ready\n"
    os.write(child.stdin.fileno(), b"s")
    assert child.stdout.readline() == b"asked\n"
    child.stdin.close()
    assert child.wait(20) == 1


def test_an_order_survives_the_command_line() -> None:
    order = Order("verify", Path("runs/a b"), "cpu", "environment (X)", {"level": "quick", "resume": None})
    assert Order.parse(order.words()) == order


def test_a_failure_is_noted_with_its_own_traceback(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    try:
        raise ConfigError("say it otherwise")
    except ConfigError as error:
        note_failure(tmp_path, 4, error)
    told = json.loads((tmp_path / "logs" / "rank_4.error.json").read_text())
    assert (told["rank"], told["request"], told["sentence"]) == (4, True, "say it otherwise")
    assert "ConfigError" in told["traceback"]


def test_torchrun_and_msrun_start_the_same_worker(tmp_path: Path) -> None:
    order = Order("train", tmp_path, "ascend", "file")
    torchrun = Job(order, 4, "torchrun", 1234).command()
    assert torchrun[1:4] == ["-m", "torch.distributed.run", "--nproc-per-node=4"]
    msrun = Job(order, 4, "msrun", 1234).command()
    assert {"--worker_num=4", "--local_worker_num=4", "--master_port=1234", "--join=True"} <= set(msrun)
    tail = ["-m", launch.WORKER, *order.words()]
    assert torchrun[-len(tail) :] == tail
    assert msrun[-len(tail) - 1 :] == ["python", *tail]
    assert worker.__name__ == launch.WORKER


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.skipif(find_spec("mindspore") is None, reason="mindspore is not installed")
def test_msrun_starts_ranks_and_a_scheduler_and_hands_on_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process writes who it is; workers then wait for the supervisor's byte."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "told.py").write_text(
        "import os, pathlib\nfrom twinmoe.backends.registry import is_scheduler, read_launch\n"
        "launch = read_launch()\nname = 'scheduler' if is_scheduler() else f'rank_{launch.rank}'\n"
        "heard = b'' if is_scheduler() else os.read(0, 1)\n"
        "pathlib.Path('told_' + name).write_text(f'{launch.size} {launch.local_rank} {heard}')\n"
        "pathlib.Path('summary.json').write_text('{}')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(launch, "WORKER", "told")
    monkeypatch.setattr(launch, "_STOP", b"ss")
    after(8, signal.SIGTERM)
    assert run_job(Job(Order("train", tmp_path, "ascend", "a test"), 2, "msrun", free_port()), Silent()) == {}
    told = {path.name: path.read_text() for path in tmp_path.glob("told_*")}
    assert told == {"told_scheduler": "2 0 b''", "told_rank_0": "2 0 b's'", "told_rank_1": "2 1 b's'"}


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is not free .*leave --port out"):
            free_port(port)
    with pytest.raises(ConfigError, match="port 70000 does not exist"):
        free_port(70000)
    assert free_port() != 0
