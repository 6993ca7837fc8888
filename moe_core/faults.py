"""What ends a step badly, and what is done about it: bad losses, memory that runs out, ranks that wait for one another.

Every decision is taken from numbers that all ranks have alike.
"""

from __future__ import annotations

import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from ..backends.protocol import Communicator

RECENT = 20
"""Losses whose median an exploding one is compared with."""
FEWEST = 5
"""So many of them it takes."""
MOST_IN_A_ROW = 20
"""After so many skipped steps nothing is learned any more: the run stops."""


class LossError(FloatingPointError):
    """A step whose loss or gradient norm is not finite, or has exploded."""


class NotSavedError(RuntimeError):
    """A run that was asked to save and end, and could not save."""


class OutOfMemoryError(RuntimeError):
    """A rank has no memory left. The message names rank, place in the model and rows."""


class MissingOperatorError(RuntimeError):
    """A device without a kernel that the model needs. The message names rank, place and what does without it."""


class StuckError(RuntimeError):
    """A collective that ran into its timeout, with what every rank was doing then."""


@dataclass
class StepGuard:
    """`train.on_nan`: stop the run before the update of a bad step, or skip that update and count.

    factor: `train.explode_factor`, a loss above so many times the median of recent ones is bad too (None: any finite
    loss is good).
    """

    policy: str = "stop"
    factor: float | None = None
    skipped: int = 0
    in_a_row: int = 0
    recent: list[float] = field(default_factory=list)

    def accepts(self, step: int, loss: float, norm: float, bad_norms: float = 0.0) -> bool:
        """Whether the step's update may be made. step: counted from 1; bad_norms: ranks whose norm is not finite.

        LossError under `stop`, and after MOST_IN_A_ROW skipped steps.
        """
        why = self._why(loss, norm, bad_norms)
        if why is None:
            self.in_a_row = 0
            self.recent = [*self.recent, loss][-RECENT:]
            return True
        if self.policy == "stop":
            raise LossError(
                f"step {step}: {why}; nothing was updated. Lower train.learning_rate, look at the data, or set "
                "train.on_nan=skip; --resume auto goes on from the last checkpoint"
            )
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= MOST_IN_A_ROW:
            raise LossError(
                f"step {step}: {why}, as in the {self.in_a_row - 1} steps before, which were skipped too; "
                "resume from an older checkpoint with a lower train.learning_rate"
            )
        return False

    def _why(self, loss: float, norm: float, bad_norms: float) -> str | None:
        if not math.isfinite(loss) or not math.isfinite(norm) or bad_norms:
            return f"the loss is {loss:g} and the gradient norm {norm:g}"
        if self.factor is not None and len(self.recent) >= FEWEST and loss > self.factor * median(self.recent):
            return f"the loss is {loss:g}, more than {self.factor:g} times the recent {median(self.recent):g}"
        return None

    def as_json(self) -> dict[str, Any]:
        """For a manifest."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "recent": self.recent}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.skipped, self.in_a_row = int(saved["skipped"]), int(saved["in_a_row"])
        self.recent = [float(v) for v in saved["recent"]]


# --- memory --------------------------------------------------------------------------------------
_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "unable to allocate",
    "memory not enough",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any framework says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, RuntimeError) and ("outofmemory" in text or any(w in text for w in _MEMORY_WORDS))


def out_of_memory(comm: Communicator, step: int, error: BaseException, rows: int) -> OutOfMemoryError:
    """The error to raise instead. rows: (token, expert) pairs of a micro-batch that would be here if all were equal."""
    calls = getattr(comm, "calls", None)
    place = calls.place if calls is not None and calls.place else "backward or outside the layers"
    told = f"even routing gives it {rows} expert rows a micro-batch and layer"
    if calls is not None and calls.rows:
        most = max(calls.rows, key=lambda name: calls.rows[name])
        here = f"{calls.rows[place]} rows arrived here for its experts, " if place in calls.rows else ""
        told = f"{here}{calls.rows[most]} in {most}, the most in this step; {told}"
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return OutOfMemoryError(
        f"rank {comm.rank} ran out of memory in {place}, step {step}: {told} ({first}). Set "
        "parallel.max_rows_per_rank, a smaller train.micro_batch_size, train.recompute=experts, or "
        "parallel.scheme=llep against skew"
    )


@contextmanager
def errors_explained(comm: Communicator, step: int, rows: int) -> Iterator[None]:
    """OutOfMemoryError or MissingOperatorError, with the place in the model, instead of the framework's own error."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(comm, step, error, rows) from error
        if missing_operator(error) is not None:
            raise _missing(comm, step, error) from error
        raise


# --- operators -------------------------------------------------------------------------------------
_MISSING = (
    r"kernel (\w+) unregistered",
    r"[Uu]nsupported op \[(\w+)",
    r"(aclnn\w+)[^\n]*(?:not in|not found|[Dd]lsym)|[Dd]lsym (aclnn\w+)",
    r"Could not run '([\w:]+)' with arguments",
)
"""How MindSpore, CANN and torch say that a device has no such kernel."""


def missing_operator(error: BaseException) -> str | None:
    """The operator that this device's software lacks, if that is what an error of any framework says."""
    if not isinstance(error, RuntimeError):  # torch's NotImplementedError is one
        return None
    found = next((m for m in (re.search(p, str(error)) for p in _MISSING) if m is not None), None)
    return None if found is None else next(name for name in found.groups() if name)


def _missing(comm: Communicator, step: int, error: BaseException) -> MissingOperatorError:
    calls = getattr(comm, "calls", None)
    place = calls.place if calls is not None and calls.place else "backward or outside the layers"
    first = next(iter(str(error).strip().splitlines()), "")
    return MissingOperatorError(
        f"rank {comm.rank}: this device has no kernel for {missing_operator(error)}, met in {place}, step {step} "
        f"({first}). Set train.plain_ops=true, which does without fused experts and weighted sums, or install newer "
        "device software; a device tells late, and train.synchronous=true makes the place exact"
    )


# --- being asked to end --------------------------------------------------------------------------
@contextmanager
def terminations_noted(note: Callable[..., None]) -> Iterator[None]:
    """SIGTERM calls `note`, here in the main thread; outside nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


# --- ranks that wait -------------------------------------------------------------------------------
class Log(Protocol):
    """What a communicator's `calls` offers."""

    number: int

    def told(self) -> str: ...


def at_place(
    comm: Communicator, name: str, module: Callable[..., Any], settle: Callable[[], None] | None = None
) -> Callable[..., Any]:
    """The module, with its name in the log of calls while it runs; on an error the name stays for the report.

    settle: waits for the device after each call (`train.synchronous`), so that an error appears where it is caused.
    """
    calls = getattr(comm, "calls", None)
    if calls is None:
        return module

    def call(*inputs: Any) -> Any:
        before, calls.place = calls.place, name
        out = module(*inputs)
        if settle is not None:
            settle()
        calls.place = before
        return out

    return call


@contextmanager
def stalls_reported(comm: Communicator, logs: Path, timeout_s: float) -> Iterator[None]:
    """While a rank gets nowhere it leaves word of what it is doing in `logs`; an error after a stall tells of all.

    StuckError in place of the error of a collective that had waited for most of timeout_s.
    """
    calls = getattr(comm, "calls", None)
    if calls is None or comm.size == 1:
        yield
        return
    watch = _StallWatch(calls, logs / f"rank_{comm.rank}.stalled.json", timeout_s)
    watch.start()
    try:
        yield
    except Exception as error:
        waited = time.monotonic() - calls.since
        if calls.inside and waited > 0.8 * timeout_s:
            told = "\n".join(_what_ranks_said(logs, comm.size, comm.rank, calls.told()))
            raise StuckError(f"{error}\nwhat each rank was doing after {waited:.1f} s:\n{told}") from error
        raise
    finally:
        watch.stop()


class _StallWatch(threading.Thread):
    """Looks at the log of calls now and then; writes what this rank is doing once nothing moved for a while."""

    def __init__(self, calls: Log, path: Path, timeout_s: float) -> None:
        super().__init__(daemon=True, name="stall watch")
        self._calls, self._path, self._timeout_s = calls, path, timeout_s
        self._over = threading.Event()

    def run(self) -> None:
        self._path.unlink(missing_ok=True)
        seen, since = -1, time.monotonic()
        while not self._over.wait(min(5.0, self._timeout_s / 10)):
            if self._calls.number != seen:
                seen, since = self._calls.number, time.monotonic()
                self._path.unlink(missing_ok=True)
            elif time.monotonic() - since > self._timeout_s / 3:
                self._leave_word()

    def stop(self) -> None:
        self._over.set()

    def _leave_word(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps({"time": time.time(), "told": self._calls.told()}), encoding="utf-8")
            temporary.replace(self._path)
        except OSError:
            return  # a disk that is full is not this thread's business


def _what_ranks_said(logs: Path, size: int, me: int, mine: str) -> Iterator[str]:
    """One line a rank, of what it wrote in the last minutes."""
    for rank in range(size):
        path = logs / f"rank_{rank}.stalled.json"
        if rank == me:
            yield f"  rank {rank} {mine}"
            continue
        try:
            told = json.loads(path.read_text(encoding="utf-8"))["told"]
        except (OSError, ValueError):
            told = "said nothing: it is stopped, gone, or moved on"
        yield f"  rank {rank} {told}"
