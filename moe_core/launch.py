"""Start a job's local workers through the framework's launcher, and see to it that they end together."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..backends.registry import Launcher, worker_environment
from .alive import forget, lost_rank
from .combinations import ConfigError
from .run_folder import LOGS, SUMMARY
from .worker import Order

WORKER = __name__.rsplit(".", 1)[0] + ".worker"
_LAUNCHER_LOG = "launcher.log"
_STOP = b"s"  # one rank hears it and tells the others in the next step
_ORDERLY, _HARD = 5.0, 5.0  # seconds that remaining workers and their launcher get to end
_REPORT = 15.0  # torchrun gets longer where a rank is gone: it says by which signal


class JobFailedError(Exception):
    """The work failed: what the first failing rank said, its traceback included. request: asked for wrongly."""

    def __init__(self, told: str, request: bool = False) -> None:
        super().__init__(told)
        self.request = request


class Watcher(Protocol):
    """Called a few times a second while workers run."""

    def poll(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """Local workers of one run. communication: that section of its config, for the backend's variables."""

    order: Order
    nproc: int
    launcher: Launcher
    port: int
    communication: Mapping[str, Any] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        return self.order.run_dir / LOGS

    def command(self) -> list[str]:
        """The launcher's command line."""
        if self.launcher == "msrun":
            words = ["mindspore.parallel.cluster.run", f"--worker_num={self.nproc}", f"--local_worker_num={self.nproc}"]
            words += [
                f"--master_port={self.port}",
                f"--log_dir={self.logs / 'msrun'}",
                "--join=True",
                "--bind_core=False",
            ]
            return [sys.executable, "-m", *words, "python", "-m", WORKER, *self.order.words()]
        words = ["torch.distributed.run", f"--nproc-per-node={self.nproc}"]
        words += ["--master-addr=127.0.0.1", f"--master-port={self.port}", "-m", WORKER]
        return [sys.executable, "-m", *words, *self.order.words()]


def check_local(ranks: int) -> int:
    """The ranks. ConfigError for more processes than a host of so many cores carries."""
    most = max(64, 8 * (os.cpu_count() or 1))
    if ranks > most:
        raise ConfigError(f"{ranks} local processes are too many for this host; use at most {most}, or other nodes")
    return ranks


def free_port(wanted: int | None = None) -> int:
    """A free local port, or the wanted one. ConfigError if that is in use or impossible."""
    if wanted is not None and not 0 < wanted < 65536:
        raise ConfigError(f"port {wanted} does not exist; choose one from 1 to 65535 or leave --port out")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"port {wanted} is not free ({reason}); leave --port out to get a free one") from None
        return int(probe.getsockname()[1])


def run_job(job: Job, watcher: Watcher) -> dict[str, Any]:
    """Run the workers to their end and return the summary of rank 0.

    The first SIGINT or SIGTERM asks the job to save and end after this step, the second ends it at once.
    Raises JobFailedError with the first failing rank's own traceback; by then no worker is left.
    """
    _forget_earlier_ends(job)
    with (job.logs / _LAUNCHER_LOG).open("ab") as log, _Workers(job, log).running() as workers:
        failed_at, lost = None, None
        while workers.alive():
            watcher.poll()
            if failed_at is None:
                failed = any(job.logs.glob("rank_*.error.json"))
                lost = None if failed else lost_rank(job.logs)  # after a failure others are ended for its sake
                failed_at = time.monotonic() if failed or lost is not None else None
            patience = _ORDERLY if lost is None or job.launcher == "msrun" else _REPORT
            if workers.hurry or (failed_at is not None and time.monotonic() - failed_at > patience):
                workers.end()
            time.sleep(0.1)
    watcher.poll()
    return _outcome(job, workers, lost)


class _Workers:
    """The launcher's process and the line to its workers."""

    def __init__(self, job: Job, log: Any) -> None:
        environment = worker_environment(str(Path(sys.executable).parent), job.order.backend, job.communication)
        self._process = subprocess.Popen(
            job.command(),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        self.asked_to_stop = 0

    @property
    def hurry(self) -> bool:
        return self.asked_to_stop > 1

    @property
    def status(self) -> int:
        return self._process.wait()

    def alive(self) -> bool:
        return self._process.poll() is None

    @contextmanager
    def running(self) -> Iterator[_Workers]:
        """Signals go to the job; whatever happens inside, no worker is left afterwards."""
        previous = {name: signal.signal(name, self._stop) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            self.end()
            for name, handler in previous.items():
                signal.signal(name, handler)

    def end(self) -> None:
        """Cut the line, which ends the workers; then the launcher, whose death takes along what is left."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
        for name in (None, signal.SIGTERM, signal.SIGKILL):
            if name is not None and self.alive():
                self._process.send_signal(name)
            try:
                self._process.wait(_HARD)
            except subprocess.TimeoutExpired:
                continue
            return

    def _stop(self, *_: object) -> None:
        self.asked_to_stop += 1
        line = self._process.stdin
        if self.asked_to_stop == 1 and line and not line.closed:
            os.write(line.fileno(), _STOP)


def _forget_earlier_ends(job: Job) -> None:
    """A resumed run's folder tells how the last attempt ended."""
    for path in [*job.logs.glob("rank_*.error.json"), job.order.run_dir / SUMMARY]:
        path.unlink(missing_ok=True)
    forget(job.logs)


def _outcome(job: Job, workers: _Workers, lost: int | None) -> dict[str, Any]:
    summary = job.order.run_dir / SUMMARY
    failures = sorted((json.loads(p.read_text()) for p in job.logs.glob("rank_*.error.json")), key=lambda f: f["time"])
    if summary.exists() and not failures and workers.status == 0:
        return json.loads(summary.read_text(encoding="utf-8"))
    killed = _killed((job.logs / _LAUNCHER_LOG).read_text(encoding="utf-8", errors="replace"))
    if killed is None and lost is not None and not workers.asked_to_stop:
        killed = f"rank {lost} was ended from outside (often: out of memory); all ranks have ended"
    if killed and not (failures and failures[0]["request"]):
        raise JobFailedError(f"{killed}; see {job.logs}")
    if failures and failures[0]["request"]:
        raise JobFailedError(failures[0]["sentence"], request=True)
    if failures:
        first = failures[0]
        raise JobFailedError(f"rank {first['rank']} failed; all ranks have ended\n{first['traceback'].rstrip()}")
    if workers.asked_to_stop:
        raise JobFailedError(f"stopped before the run could save; see {job.logs}")
    tail = (job.logs / _LAUNCHER_LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
    raise JobFailedError("\n".join([f"the workers ended with status {workers.status}; see {job.logs}", *tail]))


def _killed(launcher_log: str) -> str | None:
    """The rank that a signal ended on its own, by the launcher's report; those ended for its sake have SIGTERM."""
    for rank, status in re.findall(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*(-\d+)", launcher_log):
        if int(status) not in (-signal.SIGTERM, -signal.SIGINT):
            name = signal.Signals(-int(status)).name
            hint = " (often: out of memory)" if name == "SIGKILL" else ""
            return f"rank {rank} was ended by {name}{hint}; all ranks have ended"
    return None
