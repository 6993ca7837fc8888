"""What a rank was doing when a job stuck: its collectives, numbered, with sizes and the part of the model that called.

A communicator keeps one `CallLog` as its attribute `calls`; it costs about a microsecond a call.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from .protocol import Group


class CollectiveError(RuntimeError):
    """A collective that did not end well. The message names rank, place in the model, collective and sizes."""


@dataclass(frozen=True)
class Call:
    """One collective as this rank meant it. sizes: (shape,), or (shape, send splits, receive splits)."""

    number: int
    name: str
    group: str
    ranks: tuple[int, ...]
    place: str
    sizes: tuple[Any, ...] = ()

    def told(self) -> str:
        """In one line."""
        where = f" in {self.place}" if self.place else ""
        return f"{self.name} (call {self.number} of this rank) over {self.group}, ranks {_short(self.ranks)}{where}" + (
            f", {self._meant()}" if self.sizes else ""
        )

    def _meant(self) -> str:
        shape, *splits = self.sizes
        if not splits or splits[0] is None:
            return f"{tuple(shape)}"
        return f"sends rows {list(splits[0])}, expects {list(splits[1])}, of shape {tuple(shape[1:])}"


def _short(ranks: Sequence[int]) -> str:
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]} ... {ranks[-1]} ({len(ranks)} ranks)"


@dataclass
class CallLog:
    """The last collective of a rank, and whether it is still inside. place: set by whoever runs the model."""

    rank: int
    place: str = ""
    last: Call | None = None
    inside: bool = False
    since: float = field(default_factory=time.monotonic)
    rows: dict[str, int] = field(default_factory=dict)
    number: int = 0

    def call(self, name: str, group: Group | None, sizes: tuple[Any, ...] = (), place: str | None = None) -> _Inside:
        """`with log.call(...)`: around one collective. A RuntimeError in it (a peer that left, a timeout) becomes a
        CollectiveError; what refuses arguments passes as it is."""
        self.number += 1
        ranks = () if group is None else group.ranks
        where = self.place if place is None else place
        call = Call(self.number, name, "all ranks" if group is None else group.name, ranks, where, sizes)
        if len(sizes) == 3 and sizes[2] is not None:
            self.rows[where] = max(self.rows.get(where, 0), sum(sizes[2]))
        return _Inside(self, call)

    def forget_rows(self) -> None:
        """Before a new step."""
        self.rows.clear()

    def told(self) -> str:
        """What this rank does now, in one line; for how long stands beside it."""
        waited = f"for {time.monotonic() - self.since:.0f} s"
        if self.last is None:
            return f"has come to no collective {waited}"
        if self.inside:
            return f"waits {waited} in {self.last.told()}"
        return f"has come to no collective {waited}; its last was {self.last.told()}"


class _Inside:
    __slots__ = ("call", "log")

    def __init__(self, log: CallLog, call: Call) -> None:
        self.log, self.call = log, call

    def __enter__(self) -> None:
        self.log.last, self.log.inside, self.log.since = self.call, True, time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, CollectiveError):
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CollectiveError(f"rank {self.log.rank}: {self.call.told()} failed: {first}") from error
        self.log.inside, self.log.since = False, time.monotonic()
