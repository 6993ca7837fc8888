"""Does a rank still run? A lock that the system lets go when a process ends, however it ends.

msrun goes on waiting for a rank that a signal has ended, and so do the other ranks; torchrun notices by itself.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FORM = "rank_{}.alive"


@contextmanager
def alive(logs: Path, rank: int) -> Iterator[None]:
    """logs/rank_N.alive, locked, is there until the rank has ended in order, well or badly."""
    path = logs / _FORM.format(rank)
    made = path.with_suffix(".tmp")
    with made.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        made.replace(path)  # nobody sees it without its lock
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def lost_rank(logs: Path) -> int | None:
    """A rank that is gone and has not said so, or None."""
    for path in sorted(logs.glob(_FORM.format("*"))):
        try:
            with path.open(encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists():
                    return int(path.stem.removeprefix("rank_"))
        except (BlockingIOError, FileNotFoundError):  # it runs; it has just ended in order
            continue
    return None


def forget(logs: Path) -> None:
    """Remove what an earlier attempt left."""
    for path in logs.glob(_FORM.format("*")):
        path.unlink(missing_ok=True)
