"""Collectives of the reference: virtual ranks are threads, adjoints live on the tape, every call is logged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..protocol import Group, Launch
from .tape import Var, Vjp, apply, lift
from .world import World, run_threads

_this_thread = threading.local()
"""The Communicator of a virtual rank, so that `connect` inside `run_ranks` finds its world."""


class Call(NamedTuple):
    """One collective as this rank saw it; bytes that it handed to other ranks."""

    name: str
    group: str
    bytes_sent: int


def connect(launch: Launch) -> Communicator:
    """The Communicator of this thread in `run_ranks`, or of a world of one.

    ValueError when `launch` asks for more ranks than this thread belongs to.
    """
    current = getattr(_this_thread, "communicator", None)
    if current is None:
        current = Communicator(World(1, launch.timeout_s), 0)
    if (launch.rank, launch.size) != (current.rank, current.size):
        raise ValueError(
            f"rank {launch.rank} of {launch.size} is not this thread, which is rank {current.rank} of {current.size}; "
            "start virtual ranks with reference.comm.run_ranks"
        )
    return current


def run_ranks(size: int, fn: Callable[[Communicator], Any], timeout_s: float = 60) -> list[Any]:
    """fn(communicator) on `size` virtual ranks; results by rank.

    A rank that raises ends all of them with its exception; TimeoutError after timeout_s.
    """
    world = World(size, timeout_s)

    def body(rank: int) -> Any:
        _this_thread.communicator = Communicator(world, rank)
        return fn(_this_thread.communicator)

    return run_threads(world, body)


class Communicator:
    """Collectives of one virtual rank. `log` lists every collective in order, adjoints included."""

    no_overlap = None

    def __init__(self, world: World, rank: int) -> None:
        self.rank = rank
        self.size = world.size
        self.log: list[Call] = []
        self._world = world
        self._calls: dict[Any, int] = {}
        self._everyone = Group("world", tuple(range(world.size)), rank)

    def group(self, name: str, partition: Sequence[Sequence[int]]) -> Group:
        """ValueError unless the partition names every rank once; RuntimeError unless all ranks pass the same."""
        parts = tuple(tuple(int(r) for r in p) for p in partition)
        if sorted(r for p in parts for r in p) != list(range(self.size)):
            raise ValueError(f"group {name}: {parts} does not name each of {self.size} ranks once; pass a partition")
        self._meet(self._everyone, f"group({name}, {parts})", None)
        mine = next(p for p in parts if self.rank in p)
        return Group(name, mine, mine.index(self.rank))

    def all_to_all(
        self, x: Var, group: Group, send_splits: Sequence[int] | None = None, recv_splits: Sequence[int] | None = None
    ) -> Var:
        """ValueError when splits do not fit the rows, or do not fit what the other ranks send."""
        rows = x.shape[0]
        send, receive = self._splits(send_splits, rows, group), self._splits(recv_splits, rows, group)
        if sum(send) != rows:
            raise ValueError(f"rank {self.rank}, all_to_all over {group.name}: send splits {send} are not {rows} rows")

        def raw(value: np.ndarray) -> tuple[np.ndarray, Vjp]:
            return self._all_to_all(value, group, send, receive), lambda g: (self._all_to_all(g, group, receive, send),)

        return apply(raw, x)

    def all_to_all_start(
        self, x: Var, group: Group, send_splits: Sequence[int] | None = None, recv_splits: Sequence[int] | None = None
    ) -> Var:
        """All of it: virtual ranks have nothing to do meanwhile."""
        return self.all_to_all(x, group, send_splits, recv_splits)

    def all_to_all_finish(self, started: Var) -> Var:
        return started

    def all_gather(self, x: Var, group: Group) -> Var:
        """ValueError when blocks differ in shape."""
        return apply(lambda v: (self._all_gather(v, group), lambda g: (self._reduce_scatter(g, group),)), x)

    def reduce_scatter(self, x: Var, group: Group) -> Var:
        """ValueError when axis 0 is not a multiple of the group's size."""
        return apply(lambda v: (self._reduce_scatter(v, group), lambda g: (self._all_gather(g, group),)), x)

    def all_reduce(self, x: Var, group: Group) -> Var:
        return apply(lambda v: (self._all_reduce(v, group), lambda g: (self._all_reduce(g, group),)), x)

    def exchange(
        self, sends: Sequence[tuple[int, Var]], receives: Sequence[tuple[int, Var]], group: Group
    ) -> list[Var]:
        """ValueError when what arrives is not what the templates say."""
        parcels = [(to, np.array(lift(x).value)) for to, x in sends]
        self._record("exchange", group, sum(a.nbytes for to, a in parcels if to != group.index))
        brought = self._meet(group, "exchange", parcels)
        inboxes = [[a for to, a in parcels if to == group.index] for parcels in brought]
        wanted = [(source, lift(template).value.shape) for source, template in receives]
        for source, inbox in enumerate(inboxes):
            shapes = [shape for s, shape in wanted if s == source]
            if shapes != [a.shape for a in inbox]:
                raise ValueError(
                    f"rank {self.rank}, exchange over {group.name}: expects {shapes} from index {source}, "
                    f"which sends {[a.shape for a in inbox]}"
                )
        queues = [iter(inbox) for inbox in inboxes]
        return [Var(next(queues[source])) for source, _ in wanted]

    def gather_to_host(self, x: Var | np.ndarray, group: Group) -> np.ndarray:
        value = lift(x).value
        self._record("gather_to_host", group, value.nbytes * (group.size - 1))
        return np.stack(self._same_shapes("gather_to_host", value, group))

    def broadcast(self, x: Var, root: int, group: Group) -> Var:
        value = lift(x).value
        self._record("broadcast", group, value.nbytes * (group.size - 1) if group.index == root else 0)
        return Var(self._same_shapes("broadcast", value, group)[root])

    def barrier(self) -> None:
        self._record("barrier", self._everyone, 0)
        self._meet(self._everyone, "barrier", None)

    def close(self) -> None:
        """Leave the world: a rank that still waits for this one fails at once."""
        self._world.leave(self.rank)

    def _all_to_all(self, x: np.ndarray, group: Group, send: list[int], receive: list[int]) -> np.ndarray:
        parts = np.split(np.array(x), np.cumsum(send)[:-1])
        self._record("all_to_all", group, sum(p.nbytes for i, p in enumerate(parts) if i != group.index))
        arrived = [theirs[group.index] for theirs in self._meet(group, "all_to_all", parts)]
        if [len(a) for a in arrived] != receive:
            raise ValueError(
                f"rank {self.rank}, all_to_all over {group.name}: receive splits {receive}, "
                f"but the other ranks send {[len(a) for a in arrived]}"
            )
        return np.concatenate(arrived)

    def _all_gather(self, x: np.ndarray, group: Group) -> np.ndarray:
        self._record("all_gather", group, x.nbytes * (group.size - 1))
        return np.concatenate(self._same_shapes("all_gather", x, group))

    def _reduce_scatter(self, x: np.ndarray, group: Group) -> np.ndarray:
        if len(x) % group.size:
            raise ValueError(
                f"rank {self.rank}, reduce_scatter over {group.name}: {len(x)} rows are not a multiple of {group.size}"
            )
        self._record("reduce_scatter", group, x.nbytes // group.size * (group.size - 1))
        return np.split(_sum(self._same_shapes("reduce_scatter", x, group)), group.size)[group.index]

    def _all_reduce(self, x: np.ndarray, group: Group) -> np.ndarray:
        self._record("all_reduce", group, x.nbytes * (group.size - 1))
        return _sum(self._same_shapes("all_reduce", x, group))

    def _same_shapes(self, name: str, x: np.ndarray, group: Group) -> list[np.ndarray]:
        brought = self._meet(group, name, np.array(x))
        shapes = [b.shape for b in brought]
        if len(set(shapes)) > 1:
            raise ValueError(f"rank {self.rank}, {name} over {group.name}: shapes differ by rank: {shapes}")
        return brought

    def _meet(self, group: Group, call: str, brought: Any) -> list[Any]:
        who = (group.name, group.ranks)
        number = self._calls[who] = self._calls.get(who, 0) + 1
        label = f"{call} over {group.name} {group.ranks}"
        return self._world.meet((who, number), group.ranks, self.rank, label, brought)

    def _splits(self, splits: Sequence[int] | None, rows: int, group: Group) -> list[int]:
        if splits is None:
            if rows % group.size:
                raise ValueError(
                    f"rank {self.rank}, all_to_all over {group.name}: {rows} rows do not split equally in {group.size}"
                )
            return [rows // group.size] * group.size
        if len(splits) != group.size:
            raise ValueError(
                f"rank {self.rank}, all_to_all over {group.name}: {len(splits)} splits for {group.size} ranks"
            )
        return [int(n) for n in splits]

    def _record(self, name: str, group: Group, bytes_sent: int) -> None:
        self.log.append(Call(name, group.name, bytes_sent))


def _sum(parts: Sequence[np.ndarray]) -> np.ndarray:
    """In rank order, so that every rank gets the same bits."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
