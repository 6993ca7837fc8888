"""Virtual ranks: threads of one process that meet at every collective, with timeouts instead of hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


class AbortedError(RuntimeError):
    """Another rank failed first; its exception is the one to read."""


@dataclass
class _Meeting:
    """One collective of one group: who came, what each brought."""

    call: str
    brought: dict[int, Any] = field(default_factory=dict)
    left: int = 0


class World:
    """`size` virtual ranks. All waiting happens in `meet`."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self.error: BaseException | None = None
        self._changed = threading.Condition()
        self._meetings: dict[Any, _Meeting] = {}
        self._gone: set[int] = set()

    def meet(self, key: Any, ranks: Sequence[int], rank: int, call: str, brought: Any) -> list[Any]:
        """What every rank of `ranks` brought to the meeting `key`, in their order.

        RuntimeError when ranks call different things or one ended without coming; TimeoutError when one is late.
        """
        with self._changed:
            self._raise_if_aborted(rank, call)
            meeting = self._meetings.setdefault(key, _Meeting(call))
            if meeting.call != call:
                raise RuntimeError(
                    f"rank {rank} calls {call} where another rank calls {meeting.call}; "
                    "every rank of a group must make the same calls in the same order"
                )
            meeting.brought[rank] = brought
            self._changed.notify_all()
            self._wait(meeting, ranks, rank)
            result = [meeting.brought[r] for r in ranks]
            meeting.left += 1
            if meeting.left == len(ranks):
                del self._meetings[key]
            return result

    def abort(self, error: BaseException) -> None:
        """End every rank that waits or will wait; the first error is kept."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def leave(self, rank: int) -> None:
        """`rank` comes to no more meetings."""
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()

    def _wait(self, meeting: _Meeting, ranks: Sequence[int], rank: int) -> None:
        deadline = time.monotonic() + self.timeout_s
        while len(meeting.brought) < len(ranks):
            self._raise_if_aborted(rank, meeting.call)
            missing = [r for r in ranks if r not in meeting.brought]
            gone = sorted(self._gone.intersection(missing))
            if gone:
                raise RuntimeError(f"rank {rank} waits in {meeting.call} for ranks {gone}, which have ended")
            if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                raise TimeoutError(f"rank {rank} waited {self.timeout_s} s in {meeting.call} for ranks {missing}")

    def _raise_if_aborted(self, rank: int, call: str) -> None:
        if self.error is not None:
            raise AbortedError(f"rank {rank} stops in {call} because another rank failed") from self.error


def run_threads(world: World, body: Callable[[int], Any]) -> list[Any]:
    """body(rank) on one thread per rank; results in rank order. The first failure is raised, with its own type."""
    results: list[Any] = [None] * world.size

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank)
        except BaseException as error:
            world.abort(error)
        finally:
            world.leave(rank)

    threads = [threading.Thread(target=run, args=(r,), name=f"rank {r}", daemon=True) for r in range(world.size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + world.timeout_s
    for rank, thread in enumerate(threads):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            world.abort(TimeoutError(f"rank {rank} did not finish within {world.timeout_s} s"))
    for thread in threads:
        thread.join(1.0)
    if world.error is not None:
        raise world.error
    return results
