"""Run one worker task on the ranks at hand, or on the nodes of a testbed, and bring its report home."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.registry import choose, launcher_name, probe, worker_environment
from .combinations import ConfigError
from .launch import WORKER, Job, JobFailedError, check_local, free_port, run_job
from .run_folder import LOGS, SUMMARY
from .testbed import Shape, Testbed, run_ranks
from .worker import Order

LINKS = ("nvlink", "shared_memory", "socket")
"""Classes of links between GPUs of one host: the last two stand for InfiniBand and Ethernet between nodes."""
DEFAULT_RANKS = 4
_PORT = 29640


@dataclass(frozen=True)
class Where:
    """nproc local ranks ('auto': one a device, else 4) of a backend, or the ranks of a testbed's shape.

    link: over which link the GPUs of this host talk (LINKS); the fastest by default.
    """

    nproc: str = "auto"
    backend: str | None = None
    testbed: str | None = None
    rate: str | None = None
    timeout_s: float = 1800.0
    link: str | None = None

    @property
    def shape(self) -> Shape | None:
        if self.testbed is None and self.rate is not None:
            raise ConfigError("--rate shapes the links of a testbed; add --testbed 2x2 or leave --rate out")
        return None if self.testbed is None else Shape.parse(self.testbed, self.rate)


class _Silent:
    def poll(self) -> None:
        """Nothing is shown while ranks measure."""


def ranks_of(where: Where) -> int:
    """How many ranks a task will have. ConfigError where the machine has fewer devices."""
    shape = where.shape
    if shape is not None:
        return shape.ranks
    devices = probe(choose(where.backend).name).devices
    if where.nproc == "auto":
        return devices or DEFAULT_RANKS
    if not where.nproc.isdecimal() or int(where.nproc) < 1:
        raise ConfigError(f"--nproc {where.nproc} is not a number of processes; for example --nproc 4")
    if devices is not None and int(where.nproc) > devices:
        raise ConfigError(f"--nproc {where.nproc} is more than the {devices} devices here; use at most {devices}")
    return check_local(int(where.nproc))


def run_task(task: str, options: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """The task's report. Raises ConfigError, BackendError, JobFailedError (its logs stay then)."""
    choice = choose("cpu" if where.testbed else where.backend)
    _check_link(where.link, choice.name)
    ranks = ranks_of(where)
    with _folder(task) as folder:
        order = Order(task, folder, choice.name, choice.decided_by, options)
        shape = where.shape
        if shape is not None:
            return _on_testbed(order, shape, where.timeout_s)
        settings = {"link": where.link} if where.link else {}
        return run_job(Job(order, ranks, launcher_name(choice.name), free_port(), settings), _Silent())


def _check_link(link: str | None, backend: str) -> None:
    if link is not None and link not in LINKS:
        raise ConfigError(f"--link {link} is unknown; choose one of {', '.join(LINKS)}")
    if link is not None and backend != "cuda":
        raise ConfigError(f"--link {link} chooses between links of NVIDIA GPUs, not of {backend}; leave --link out")


@contextmanager
def _folder(task: str) -> Iterator[Path]:
    """A run folder that is removed unless the task fails."""
    folder = Path(tempfile.mkdtemp(prefix=f"twinmoe_{task}_"))
    (folder / LOGS).mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _on_testbed(order: Order, shape: Shape, timeout_s: float) -> dict[str, Any]:
    words = [sys.executable, "-m", WORKER, *order.words()]
    logs = order.run_dir / LOGS
    with Testbed(shape) as testbed:
        try:
            environment = worker_environment(str(Path(sys.executable).parent))
            statuses = run_ranks(testbed, words, environment, _PORT, logs / "launcher.log", timeout_s)
        except TimeoutError as error:
            raise JobFailedError(f"{error}; see {logs}") from None
    return report_of(order.run_dir, statuses)


def report_of(run_dir: Path, statuses: list[int]) -> dict[str, Any]:
    """What rank 0 wrote. JobFailedError with what the first failing rank said."""
    logs, summary = run_dir / LOGS, run_dir / SUMMARY
    failures = sorted((json.loads(p.read_text()) for p in logs.glob("rank_*.error.json")), key=lambda f: f["time"])
    if failures:
        first = failures[0]
        told = first["sentence"] if first["request"] else f"rank {first['rank']} failed\n{first['traceback'].rstrip()}"
        raise JobFailedError(told, request=bool(first["request"]))
    if any(statuses) or not summary.exists():
        raise JobFailedError(f"the ranks ended with statuses {statuses}; see {logs}")
    return json.loads(summary.read_text(encoding="utf-8"))
