"""`twinmoe` whose workers break at a chosen moment: python -m twinmoe.testing.end_to_end.faulty FAULT train ...

FAULT is JSON: {"rank": 1, "step": 3, "at": "forward", "do": "kill"}. The package knows nothing of this: the supervisor
is told to start this file as its worker, and the worker wraps what it loads.

at   forward, backward: inside an expert layer; save: while rank files are written; rename: files are written, the
     folder still has its temporary name; latest: it has its name, `latest` does not point to it yet
do   kill (SIGKILL), stop (SIGSTOP), term (SIGTERM), raise, sleep (for "seconds"), nan, memory (allocate what the system
     does not give)
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from twinmoe.backends.registry import read_launch
from twinmoe.moe_core import cli, launch, saving, worker

HERE = "twinmoe.testing.end_to_end.faulty"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
Fault = dict[str, Any]


def fault_file(run_dir: Path) -> Path:
    return run_dir.with_name(run_dir.name + ".fault.json")


def stamp_file(run_dir: Path) -> Path:
    """Holds the time at which the fault happened."""
    return run_dir.with_name(run_dir.name + ".fault.time")


class Trigger:
    """Knows the step under way (from 1) and breaks once, in the `call`-th call of its place (from 0)."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.step, self.calls, self.done = fault, 1, 0, False

    def here(self, place: str) -> bool:
        if self.done or place != self.fault["at"] or self.step != self.fault["step"]:
            return False
        self.calls += 1
        self.done = self.calls > self.fault.get("call", 0)
        return self.done

    def act(self) -> None:
        what = self.fault["do"]
        Path(self.fault["stamp"]).write_text(str(time.time()))
        if what in SIGNALS:
            os.kill(os.getpid(), SIGNALS[what])
        elif what == "sleep":
            time.sleep(self.fault["seconds"])
        elif what == "memory":
            _exhaust_memory()
        elif what == "raise":
            raise RuntimeError("the planted failure")


def _exhaust_memory() -> None:
    """The system grants nothing beyond what the process has."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20), resource.RLIM_INFINITY))


class Wrapped:
    """Another object, some of whose attributes are replaced."""

    def __init__(self, inner: Any, **others: Any) -> None:
        self.__dict__.update(others, inner=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


def faulty_ops(ops: Any, trigger: Trigger) -> Any:
    """expert_mlp breaks in forward, or when it is computed again in backward."""

    def expert_mlp(x: Any, *rest: Any) -> Any:
        if trigger.here("forward"):
            trigger.act()
            if trigger.fault["do"] == "nan":
                x = x * float("nan")
            if trigger.fault["do"] == "memory":
                ops.asarray(np.zeros((1 << 16, 1 << 10), np.float32))
        return ops.expert_mlp(twice(x), *rest)

    def twice(x: Any) -> Any:
        if trigger.fault["at"] != "backward":
            return x
        runs: list[int] = []

        def same(y: Any) -> Any:
            runs.append(1)
            if len(runs) == 2 and trigger.here("backward"):
                trigger.act()
            return y * ops.exp(y * 0.0)  # keeps something for backward: else it would not be computed again

        return ops.checkpoint(same, x)

    return Wrapped(ops, expert_mlp=expert_mlp)


def faulty_trainer(trainer: Any, trigger: Trigger) -> Any:
    """Counts steps, skipped ones too."""

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found = function(*arguments)
            trigger.step += 1
            return found

        return call

    return Wrapped(trainer, step=counted(trainer.step), forget_gradients=counted(trainer.forget_gradients))


def break_saving(trigger: Trigger) -> None:
    """Saves happen between steps: trigger.step is then the number of the step to come."""
    write, rename, swap = saving._write, Path.rename, Path.replace

    def broken_write(folder: Path, rank: int, arrays: Any, table: Any) -> None:
        if trigger.here("save"):
            (folder / f"rank_{rank:05d}.safetensors").write_bytes(b"half a file")
            trigger.act()
        write(folder, rank, arrays, table)

    def broken_rename(path: Path, target: Any) -> Any:
        if Path(target).name.startswith("step_") and trigger.here("rename"):
            trigger.act()
        return rename(path, target)

    def broken_replace(path: Path, target: Any) -> Any:
        if Path(target).name == "latest" and trigger.here("latest"):
            trigger.act()
        return swap(path, target)

    saving._write = broken_write
    Path.rename, Path.replace = broken_rename, broken_replace  # type: ignore[method-assign, assignment]


def work() -> None:
    """One rank."""
    order = worker.Order.parse(sys.argv[1:])
    fault = json.loads(fault_file(order.run_dir).read_text())
    if fault["rank"] == read_launch().rank:
        trigger, real = Trigger(fault), worker.load

        def load(name: str, decided_by: str) -> Any:
            backend = real(name, decided_by)
            ops, trainer = faulty_ops(backend.ops, trigger), faulty_trainer(backend.trainer, trigger)
            return replace(backend, ops=ops, trainer=trainer)

        worker.load = load
        break_saving(trigger)
    worker.main()


def supervise() -> None:
    """The command line, with this file as worker."""
    fault, words = json.loads(sys.argv[1]), sys.argv[2:]
    run_dir = Path(words[words.index("--run-dir") + 1])
    fault_file(run_dir).write_text(json.dumps({**fault, "stamp": str(stamp_file(run_dir))}))
    launch.WORKER = HERE
    sys.argv = ["twinmoe", *words]
    cli.main()


if __name__ == "__main__":
    if sys.argv[1].startswith("{"):
        supervise()
    else:
        work()
