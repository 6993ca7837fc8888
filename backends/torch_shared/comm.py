"""Collectives over torch.distributed, each with its gradient. One `TorchCommunicator` per process."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..calls import CallLog
from ..protocol import Group, Launch
from . import direct, flight
from .line import Line

# torch 2.13 renames the flat collectives; the older names warn there
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int] | None, recv: list[int] | None, line: Line, far: bool) -> Tensor:
        ctx.meta = (send, recv, line.back(), far)
        return _all_to_all(x, send, recv, line, far)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        send, recv, line, far = ctx.meta
        return _all_to_all(grads[0], recv, send, line, far), None, None, None, None


def _all_to_all(x: Tensor, send: list[int] | None, recv: list[int] | None, line: Line, far: bool) -> Tensor:
    rows = x.shape[0] if recv is None else sum(recv)
    y = x.new_empty((rows, *x.shape[1:]))
    x = x.contiguous()
    with line.call("all_to_all", x, send, recv):
        if far and dist.get_backend(line.handle) == "gloo":
            direct.exchange(x, y, send, recv, line.handle)
        else:
            dist.all_to_all_single(y, x, recv, send, group=line.handle)
    return y


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        ctx.line = line.back()
        return _gather(x, line)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scatter(grads[0], ctx.line), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        ctx.line = line.back()
        return _scatter(x, line)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.line), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        ctx.line = line.back()
        return _reduce(x, line)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce(grads[0], ctx.line), None


def _gather(x: Tensor, line: Line) -> Tensor:
    with line.call("all_gather", x):
        return _gather_unnamed(x, line)


def _gather_unnamed(x: Tensor, line: Line) -> Tensor:
    y = x.new_empty((x.shape[0] * line.group.size, *x.shape[1:]))
    _all_gather_single(y, x.contiguous(), group=line.handle)
    return y


def _scatter(x: Tensor, line: Line) -> Tensor:
    y = x.new_empty((x.shape[0] // line.group.size, *x.shape[1:]))
    with line.call("reduce_scatter", x):
        _reduce_scatter_single(y, x.contiguous(), group=line.handle)
    return y


def _reduce(x: Tensor, line: Line) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    with line.call("all_reduce", x):
        dist.all_reduce(y, group=line.handle)
    return y


def _store(launch: Launch, timeout: timedelta) -> Store:
    """The job's key-value store: torchrun's own when its agent serves one, else rank 0's."""
    serve = launch.rank == 0 and not launch.agent_store
    store = TCPStore(launch.address, launch.port, launch.size, serve, timeout, wait_for_workers=False)
    return PrefixStore(f"twinmoe_{launch.attempt}", store) if launch.agent_store else store


class TorchCommunicator:
    """protocol.Communicator over one process group per `Group`. `device` holds the tensors of the collectives."""

    no_overlap = None

    def __init__(self, launch: Launch, backend: str, device: torch.device) -> None:
        self.rank, self.size = launch.rank, launch.size
        self.calls = CallLog(launch.rank)
        self._device = device
        self._node_size = launch.local_size
        self._timeout = timedelta(seconds=launch.timeout_s)
        self._owner = self.size > 1 and not dist.is_initialized()
        if self._owner:
            dist.init_process_group(
                backend,
                store=_store(launch, self._timeout),
                rank=launch.rank,
                world_size=launch.size,
                timeout=self._timeout,
            )

    def group(self, name: str, partition: Sequence[Sequence[int]]) -> Group:
        mine = next(tuple(p) for p in partition if self.rank in p)
        handle = None
        if len(mine) > 1 or any(len(p) > 1 for p in partition):
            for ranks in partition:
                made = dist.new_group(list(ranks), timeout=self._timeout)
                handle = made if self.rank in ranks else handle
        return Group(name, mine, mine.index(self.rank), handle)

    def _line(self, group: Group) -> Line:
        return Line(self.calls, group, self.calls.place)

    def _spans_nodes(self, group: Group) -> bool:
        return len({rank // self._node_size for rank in group.ranks}) > 1

    def all_to_all(
        self,
        x: Tensor,
        group: Group,
        send_splits: Sequence[int] | None = None,
        recv_splits: Sequence[int] | None = None,
    ) -> Tensor:
        if group.size == 1:
            return x
        send, recv = (None if s is None else [int(v) for v in s] for s in (send_splits, recv_splits))
        return _AllToAll.apply(x, send, recv, self._line(group), self._spans_nodes(group))  # type: ignore[no-any-return]

    def all_to_all_start(
        self,
        x: Tensor,
        group: Group,
        send_splits: Sequence[int] | None = None,
        recv_splits: Sequence[int] | None = None,
    ) -> Any:
        if group.size == 1:
            return x
        send, recv = (None if s is None else [int(v) for v in s] for s in (send_splits, recv_splits))
        return flight.start(x, flight.Flight(self._line(group), send, recv, self._spans_nodes(group)))

    def all_to_all_finish(self, started: Any) -> Tensor:
        return started if isinstance(started, Tensor) else flight.finish(started)

    def all_gather(self, x: Tensor, group: Group) -> Tensor:
        return x if group.size == 1 else _AllGather.apply(x, self._line(group))  # type: ignore[no-any-return]

    def reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        return x if group.size == 1 else _ReduceScatter.apply(x, self._line(group))  # type: ignore[no-any-return]

    def all_reduce(self, x: Tensor, group: Group) -> Tensor:
        return x if group.size == 1 else _AllReduce.apply(x, self._line(group))  # type: ignore[no-any-return]

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], group: Group
    ) -> list[Tensor]:
        results = [torch.empty_like(template) for _, template in receives]
        waiting = [
            dist.P2POp(dist.irecv, out, group.ranks[peer], group=group.handle)
            for (peer, _), out in zip(receives, results, strict=True)
            if peer != group.index
        ]
        waiting += [
            dist.P2POp(dist.isend, x.detach().contiguous(), group.ranks[peer], group=group.handle)
            for peer, x in sends
            if peer != group.index
        ]
        own = iter([x for peer, x in sends if peer == group.index])
        for (peer, _), out in zip(receives, results, strict=True):
            if peer == group.index:
                out.copy_(next(own).detach())
        with self.calls.call("exchange", group, ([(p, tuple(x.shape)) for p, x in sends],)):
            for work in dist.batch_isend_irecv(waiting) if waiting else []:
                work.wait()
        return results

    def gather_to_host(self, x: Tensor | np.ndarray, group: Group) -> np.ndarray:
        value = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x.detach()
        if group.size == 1:
            return value.cpu().numpy()[None]
        line = self._line(group)
        with line.call("gather_to_host", value):
            return _gather_unnamed(value.to(self._device)[None], line).cpu().numpy()

    def broadcast(self, x: Tensor, root: int, group: Group) -> Tensor:
        y = x.detach().clone(memory_format=torch.contiguous_format)
        if group.size > 1:
            with self._line(group).call("broadcast", x):
                dist.broadcast(y, group.ranks[root], group=group.handle)
        return y

    def barrier(self) -> None:
        if self.size > 1:
            with self.calls.call("barrier", None):
                dist.barrier()

    def close(self) -> None:
        if self._owner and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
