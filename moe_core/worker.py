"""One rank of a job. Its supervisor starts it through a launcher: `python -m twinmoe.moe_core.worker TASK RUN_DIR ...`.

It writes to logs/rank_N.log only. How it ended stands in the run folder: summary.json from rank 0, or
logs/rank_N.error.json from a rank that failed. Its standard input is a line to the supervisor: a byte asks
the job to save and end, the end of the line means that the supervisor is gone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..backends.protocol import Launch
from ..backends.registry import Backend, BackendError, LaunchError, explained, is_scheduler, load, read_launch
from .alive import alive
from .checkpoint import CheckpointError
from .combinations import ConfigError
from .compose import load_config
from .config import ClusterConfig, Config
from .run_folder import CONFIG, LOGS, SUMMARY, write_environment

REQUEST_ERRORS = (ConfigError, BackendError, LaunchError, CheckpointError)
"""What a user can mend by asking differently: one sentence, exit status 2."""

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Order:
    """What a worker is told. options: the task's own, of JSON's types."""

    task: str
    run_dir: Path
    backend: str
    decided_by: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def words(self) -> list[str]:
        """The order as command-line words."""
        words = [self.task, str(self.run_dir), "--backend", self.backend, "--decided-by", self.decided_by]
        return [*words, "--options", json.dumps(self.options)]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Order:
        parser = argparse.ArgumentParser(prog="twinmoe worker")
        parser.add_argument("task", choices=TASKS)
        parser.add_argument("run_dir", type=Path)
        parser.add_argument("--backend", required=True)
        parser.add_argument("--decided-by", required=True)
        parser.add_argument("--options", type=json.loads, default={})
        return cls(**vars(parser.parse_args(words)))


def train_rank(config: Config, order: Order, backend: Backend, launch: Launch) -> dict[str, Any]:
    """Train as one rank; rank 0 leaves environment.json behind. Raises what training raises."""
    from .train import run

    launch = replace(launch, timeout_s=config.train.timeout_s)
    if launch.rank == 0:
        write_environment(order.run_dir, config, backend, {"world_size": launch.size})
    return run(config, backend, launch, order.run_dir, order.options.get("resume"))


def _train(order: Order, backend: Backend, launch: Launch) -> dict[str, Any]:
    return train_rank(load_config(order.run_dir / CONFIG), order, backend, launch)


def _verify(order: Order, backend: Backend, launch: Launch) -> dict[str, Any]:
    from .verify import run

    return run(backend, launch, order.options["level"], order.options["dtype"])


def _bench_comm(order: Order, backend: Backend, launch: Launch) -> dict[str, Any]:
    from .bench_comm import measure_rank

    o = order.options
    cluster = ClusterConfig.model_validate(o["cluster"])
    return measure_rank(backend, launch, cluster, o["sizes"], o["repeats"], o["collectives"])


def _bench_schemes(order: Order, backend: Backend, launch: Launch) -> dict[str, Any]:
    from .bench_schemes import measure_rank

    return measure_rank(backend, launch, order.options)


def _eval(order: Order, backend: Backend, launch: Launch) -> dict[str, Any]:
    from .evaluate import run_rank

    return run_rank(backend, launch, order.options, order.run_dir)


def _acceptance(order: Order, backend: Backend, launch: Launch) -> dict[str, Any]:
    from .acceptance_checks import run_rank

    return run_rank(backend, replace(launch, timeout_s=order.options["timeout_s"]))


TASKS: Mapping[str, Callable[[Order, Backend, Launch], dict[str, Any]]] = {
    "train": _train,
    "verify": _verify,
    "bench_comm": _bench_comm,
    "bench_schemes": _bench_schemes,
    "acceptance": _acceptance,
    "eval": _eval,
}
"""What local workers can do: each returns its report, the same on every rank."""


def note_failure(run_dir: Path, rank: int, error: BaseException, backend: str = "cpu") -> None:
    """Leave logs/rank_N.error.json, whole or not at all: the error and what its code means on that backend."""
    meaning = explained(backend, str(error))
    code = [] if meaning is None else [meaning]
    told = {
        "rank": rank,
        "time": time.time(),
        "request": isinstance(error, REQUEST_ERRORS),
        "sentence": "\n".join([str(error).strip() or type(error).__name__, *code]),
        "traceback": "\n".join(["".join(traceback.format_exception(error)), *code]),
    }
    path = run_dir / LOGS / f"rank_{rank}.error.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(told), encoding="utf-8")
    temporary.replace(path)


def main(words: Sequence[str] | None = None) -> None:
    """Run one rank and leave without Python's shutdown, in which gloo's threads sometimes abort."""
    order = Order.parse(sys.argv[1:] if words is None else words)
    _die_with_parent()
    if is_scheduler():
        load(order.backend, order.decided_by).comm.connect(read_launch())
        return
    launch = read_launch()
    _log_to(order.run_dir / LOGS / f"rank_{launch.rank}.log")
    threading.Thread(target=_listen, daemon=True).start()
    status = 0
    with alive(order.run_dir / LOGS, launch.rank):
        try:
            report = TASKS[order.task](order, load(order.backend, order.decided_by), launch)
            if launch.rank == 0:
                (order.run_dir / SUMMARY).write_text(json.dumps(report), encoding="utf-8")
        except BaseException as error:
            note_failure(order.run_dir, launch.rank, error, order.backend)
            traceback.print_exc()
            status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status or load(order.backend, order.decided_by).launcher == "torchrun":
        os._exit(status)


def _log_to(path: Path) -> None:
    """Everything this process prints, frameworks included, goes to its log."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


def _die_with_parent() -> None:
    """Where the system offers it, a launcher that is killed takes its workers along."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _listen() -> None:
    """Follow the supervisor's line."""
    while True:
        if os.read(0, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            os._exit(1)


if __name__ == "__main__":
    main()
