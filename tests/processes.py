"""Run a test's function as several local processes: `run_processes(size, "module:function", {...})`.

function(backend, launch, **arguments) -> JSON of rank 0. As a script it is one of the processes.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinmoe.backends import registry
from twinmoe.backends.protocol import Launch

PORTS_OF_A_JOB = 16
"""A target may use this many ports from its own on, one after the other."""


def free_port() -> int:
    """The first of PORTS_OF_A_JOB free ports below those that the system hands out: parallel tests do not meet."""
    mine = random.Random(f"{os.getpid()} {time.monotonic_ns()}")
    for _ in range(100):
        first = mine.randrange(10000, 32000, PORTS_OF_A_JOB)
        if all(_is_free(first + n) for n in range(PORTS_OF_A_JOB)):
            return first
    raise RuntimeError("no run of free local ports was found; end what holds them")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def run_processes(
    size: int, target: str, arguments: Mapping[str, Any], backend: str = "cpu", seconds: float = 240
) -> dict[str, Any]:
    """What rank 0 returned. AssertionError with the first failing rank's output; nothing outlives the call."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        order = {"target": target, "arguments": dict(arguments), "backend": backend, "size": size, "port": free_port()}
        (folder / "order.json").write_text(json.dumps(order))
        logs = [folder / f"{rank}.log" for rank in range(size)]
        workers = [_start(folder, rank, log) for rank, log in enumerate(logs)]
        try:
            _wait(workers, time.monotonic() + seconds)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        failed = [rank for rank, worker in enumerate(workers) if worker.returncode]
        assert not failed, "\n".join(f"rank {r}:\n{logs[r].read_text()[-3000:]}" for r in failed)
        return json.loads((folder / "result.json").read_text())


def _start(folder: Path, rank: int, log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(folder), str(rank)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _wait(workers: list[subprocess.Popen[bytes]], deadline: float) -> None:
    while any(w.poll() is None for w in workers) and not any(w.returncode for w in workers):
        assert time.monotonic() < deadline, "the processes did not end in time"
        time.sleep(0.05)
    grace = time.monotonic() + 5
    while any(w.poll() is None for w in workers) and time.monotonic() < grace:
        time.sleep(0.05)


def main(folder: Path, rank: int) -> None:
    order = json.loads((folder / "order.json").read_text())
    module, function = order["target"].split(":")
    size = order["size"]
    launch = Launch(rank, size, rank, size, port=order["port"], timeout_s=60)
    backend = registry.load(order["backend"], decided_by="test")
    result = getattr(importlib.import_module(module), function)(backend, launch, **order["arguments"])
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # a process that used many gloo features may abort while the interpreter shuts down


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
