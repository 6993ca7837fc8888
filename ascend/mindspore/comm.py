"""Collectives with gradients. What moves the bytes (`Wire`) is gloo on the host and HCCL on NPUs.

A collective's adjoint is another collective, so every rank of a group meets the same sequence in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from mindspore import Tensor

from ...backends.calls import CallLog
from ...backends.protocol import Group
from .autograd import primitive
from .wire import Logged, Splits, Wire

__all__ = ["MindSporeCommunicator", "Splits", "Wire"]


class MindSporeCommunicator:
    """protocol.Communicator over a wire; a group of one rank moves nothing."""

    no_overlap = "a gradient that waits elsewhere has no place in MindSpore's functional differentiation"

    def __init__(self, rank: int, size: int, wire: Wire) -> None:
        self.rank, self.size, self._wire = rank, size, wire
        self.calls: CallLog = getattr(wire, "calls", None) or CallLog(rank)

    def group(self, name: str, partition: Sequence[Sequence[int]]) -> Group:
        mine = next(tuple(ranks) for ranks in partition if self.rank in ranks)
        alone = all(len(ranks) == 1 for ranks in partition)
        handle = None if alone else self._wire.open_group(name, partition)
        return Group(name, mine, mine.index(self.rank), handle)

    @property
    def _line(self) -> Logged:
        """The wire as a call from here uses it."""
        return Logged(self._wire, self.calls, self.calls.place)

    def all_to_all(
        self,
        x: Tensor,
        group: Group,
        send_splits: Sequence[int] | None = None,
        recv_splits: Sequence[int] | None = None,
    ) -> Tensor:
        """ValueError where the splits don't fit the group or the rows: HCCL would hang or move other rows."""
        send, recv = _host(send_splits), _host(recv_splits)
        _check_splits(x.shape[0], group, send, recv)
        return x if group.size == 1 else _all_to_all_op(x, self._line, group, send, recv)

    all_to_all_start = all_to_all  # all of it at once, as `no_overlap` says

    def all_to_all_finish(self, started: Tensor) -> Tensor:
        return started

    def all_gather(self, x: Tensor, group: Group) -> Tensor:
        return x if group.size == 1 else _all_gather_op(x, self._line, group)

    def reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        _check_splits(x.shape[0], group, None, None)
        return x if group.size == 1 else _reduce_scatter_op(x, self._line, group)

    def all_reduce(self, x: Tensor, group: Group) -> Tensor:
        return x if group.size == 1 else _all_reduce_op(x, self._line, group)

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], group: Group
    ) -> list[Tensor]:
        """Blocks to oneself stay; blocks without elements are known to be empty on both sides and don't travel."""
        own = [x for peer, x in sends if peer == group.index]
        results: list[Tensor] = [template for _, template in receives]
        for place, x in zip([n for n, (peer, _) in enumerate(receives) if peer == group.index], own, strict=True):
            results[place] = x
        away = [n for n, (peer, template) in enumerate(receives) if peer != group.index and template.size]
        leaving = [(peer, x) for peer, x in sends if peer != group.index and x.size]
        if group.size > 1 and (away or leaving):
            for place, x in zip(away, self._line.exchange(leaving, [receives[n] for n in away], group), strict=True):
                results[place] = x
        return results

    def gather_to_host(self, x: Tensor | np.ndarray, group: Group) -> np.ndarray:
        if group.size > 1:
            return self._line.gather_to_host(x, group)
        return np.array(x.asnumpy() if isinstance(x, Tensor) else x)[None]

    def broadcast(self, x: Tensor, root: int, group: Group) -> Tensor:
        return x if group.size == 1 else self._line.broadcast(x, root, group)

    def barrier(self) -> None:
        if self.size > 1:
            self._line.barrier()

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Inside, a wait for the device is watched, where the wire watches (HCCL's does)."""
        watch = getattr(self._wire, "waiting", None) if self.size > 1 else None
        return nullcontext() if watch is None else watch(what)

    def close(self) -> None:
        if self.size > 1:
            self._wire.close()


def _host(splits: Sequence[int] | None) -> Splits:
    return None if splits is None else [int(s) for s in splits]


def _check_splits(rows: int, group: Group, send: Splits, recv: Splits) -> None:
    if (send is None) != (recv is None):
        raise ValueError("give send_splits and recv_splits together, or neither for equal splits")
    if send is None or recv is None:
        if rows % group.size:
            raise ValueError(f"{rows} rows do not divide over the {group.size} ranks of {group.name!r}; give splits")
    elif len(send) != group.size or len(recv) != group.size or sum(send) != rows:
        raise ValueError(
            f"splits {send} and {recv} do not fit {rows} rows and the {group.size} ranks of {group.name!r}; "
            "one entry per rank, send_splits summing to the rows"
        )


def _all_to_all(x: Tensor, wire: Logged, group: Group, send: Splits, recv: Splits) -> tuple[Tensor, tuple[Tensor, ...]]:
    return wire.all_to_all(x, group, send, recv), ()


def _all_to_all_backward(gradient: Tensor, _saved: Any, inputs: Any, _needs: Any) -> tuple[Any, ...]:
    _, wire, group, send, recv = inputs
    return (wire.back().all_to_all(gradient, group, recv, send),)


def _all_gather(x: Tensor, wire: Logged, group: Group) -> tuple[Tensor, tuple[Tensor, ...]]:
    return wire.all_gather(x, group), ()


def _all_gather_backward(gradient: Tensor, _saved: Any, inputs: Any, _needs: Any) -> tuple[Any, ...]:
    return (inputs[1].back().reduce_scatter(gradient, inputs[2]),)


def _reduce_scatter(x: Tensor, wire: Logged, group: Group) -> tuple[Tensor, tuple[Tensor, ...]]:
    return wire.reduce_scatter(x, group), ()


def _reduce_scatter_backward(gradient: Tensor, _saved: Any, inputs: Any, _needs: Any) -> tuple[Any, ...]:
    return (inputs[1].back().all_gather(gradient, inputs[2]),)


def _all_reduce(x: Tensor, wire: Logged, group: Group) -> tuple[Tensor, tuple[Tensor, ...]]:
    return wire.all_reduce(x, group), ()


def _all_reduce_backward(gradient: Tensor, _saved: Any, inputs: Any, _needs: Any) -> tuple[Any, ...]:
    return (inputs[1].back().all_reduce(gradient, inputs[2]),)


_all_to_all_op = primitive(_all_to_all, _all_to_all_backward)
_all_gather_op = primitive(_all_gather, _all_gather_backward)
_reduce_scatter_op = primitive(_reduce_scatter, _reduce_scatter_backward)
_all_reduce_op = primitive(_all_reduce, _all_reduce_backward)
