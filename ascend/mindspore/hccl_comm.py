"""`comm` of `ascend`: HCCL through `mindspore.mint.distributed`, one API layer so that one stream orders a group.

HCCL wants the collectives of all communicators issued from one thread, in one order on every rank. Nothing here has
run on an NPU yet; the signatures are bound in tests.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication

from ...backends.launchers import device_index
from ...backends.protocol import Group, Launch
from ...backends.registry import LaunchError, is_scheduler, surrounding_launcher, told_variables
from .. import hccl
from . import runtime
from .comm import MindSporeCommunicator, Splits
from .framework import mint, ops
from .ops import asarray, to_numpy


def connect(launch: Launch) -> MindSporeCommunicator:
    """Take this rank's NPU and join the job. msrun's scheduler joins too, without a device, and computes nothing.

    Joining comes before the first tensor: MindSpore demands it. What HCCL's variables say holds here too: whether
    kernels are deterministic, and waits that outlast HCCL's own.
    """
    variables = told_variables("HCCL_")
    launch = replace(launch, timeout_s=hccl.patience_s(launch.timeout_s, variables))
    if is_scheduler():
        communication.init()
        return MindSporeCommunicator(0, 1, HcclWire(launch, mint.distributed))
    runtime.use_npu(device_index(launch.local_rank, runtime.device_count()), hccl.is_deterministic(variables))
    if launch.size > 1:
        _join(launch)
    return MindSporeCommunicator(launch.rank, launch.size, HcclWire(launch, mint.distributed))


def _join(launch: Launch) -> None:
    """msrun's variables say everything; elsewhere the port may be taken by the launcher's own agent."""
    if surrounding_launcher() == "msrun":
        communication.init()
    else:
        port = launch.port + 1 if launch.agent_store else launch.port
        mint.distributed.init_process_group(
            init_method=f"tcp://{_dotted(launch.address)}:{port}",
            timeout=timedelta(seconds=launch.timeout_s),
            world_size=launch.size,
            rank=launch.rank,
        )
    rank = int(communication.get_rank())
    if rank != launch.rank:
        raise RuntimeError(
            f"MindSpore numbers this process {rank}, the launcher {launch.rank}; give --node_rank to every msrun"
        )


def _dotted(host: str) -> str:
    """The host's address in dotted form, the only one that MindSpore reads. LaunchError for an unknown name."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise LaunchError(
            f"the address of rank 0, {host!r}, is unknown on this host ({error}); give MASTER_ADDR as an IPv4 address"
        ) from None


class HcclWire:
    """comm.Wire over HCCL. `distributed` is `mint.distributed`; buffers_mb: sizes of groups that need their own."""

    def __init__(self, launch: Launch, distributed: Any, buffers_mb: Mapping[str, int] | None = None) -> None:
        self._launch = launch
        self._dist = distributed
        self._buffers_mb = dict(buffers_mb or {})
        self._groups: dict[tuple[int, ...], str] = {}
        self._thread = threading.get_ident()
        self._heart = hccl.Heartbeat(launch.rank, launch.timeout_s)

    def open_group(self, name: str, partition: Sequence[Sequence[int]]) -> str | None:
        """HCCL's name of this rank's group, which its members alone create; groups of the same ranks share one."""
        mine = next(tuple(ranks) for ranks in partition if self._launch.rank in ranks)
        if len(mine) == 1:
            return None
        if mine not in self._groups:
            self._groups[mine] = self._create(name, list(mine))
            with self.waiting(f"group {name} of ranks {list(mine)} to open"):
                self._dist.barrier(group=self._groups[mine])
                ms.runtime.synchronize()
        return self._groups[mine]

    def _create(self, name: str, ranks: list[int]) -> str:
        options = None
        if name in self._buffers_mb:
            from mindspore._c_expression import GroupOptions

            options = GroupOptions()
            options.hccl_config = {"hccl_buffer_size": self._buffers_mb[name]}
        made = self._dist.new_group(ranks, pg_options=options)
        if not made:
            raise RuntimeError(
                f"HCCL could not create group {name!r} of ranks {ranks}; the log names the cause "
                "(usually memory: lower HCCL_BUFFSIZE or use fewer groups)"
            )
        return made

    def all_to_all(self, x: Tensor, group: Group, send: Splits, recv: Splits) -> Tensor:
        self._note(f"all_to_all in {group.name}, send {send}, receive {recv}, rows of {tuple(x.shape[1:])}")
        rows = x.shape[0] if recv is None else sum(recv)
        moved = _movable(x)
        y = _empty((rows, *x.shape[1:]), moved)
        self._dist.all_to_all_single(y, moved, recv, send, group=group.handle)
        return y.astype(x.dtype)

    def all_gather(self, x: Tensor, group: Group) -> Tensor:
        self._note(f"all_gather in {group.name} of {tuple(x.shape)}")
        moved = _movable(x)
        y = _empty((x.shape[0] * group.size, *x.shape[1:]), moved)
        self._dist.all_gather_into_tensor(y, moved, group=group.handle)
        return y.astype(x.dtype)

    def reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        self._note(f"reduce_scatter in {group.name} of {tuple(x.shape)}")
        _check_reducible(x)
        y = _empty((x.shape[0] // group.size, *x.shape[1:]), x)
        self._dist.reduce_scatter_tensor(y, x.contiguous(), group=group.handle)
        return y

    def all_reduce(self, x: Tensor, group: Group) -> Tensor:
        self._note(f"all_reduce in {group.name} of {tuple(x.shape)}")
        _check_reducible(x)
        y = x.copy()
        self._dist.all_reduce(y, group=group.handle)
        return y

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], group: Group
    ) -> list[Tensor]:
        """HCCL takes one block per ordered pair and call: what goes to one peer in one dtype travels as one."""
        self._note(f"exchange in {group.name} to {[p for p, _ in sends]}, from {[p for p, _ in receives]}")
        kinds = [x.dtype for _, x in receives]
        sends, receives = ([(peer, _movable(x)) for peer, x in blocks] for blocks in (sends, receives))
        results: list[Any] = [None] * len(receives)
        for dtype in sorted({str(x.dtype) for _, x in (*sends, *receives)}):
            leaving = _by_peer([(peer, x) for peer, x in sends if str(x.dtype) == dtype])
            places = [n for n, (_, x) in enumerate(receives) if str(x.dtype) == dtype]
            coming: dict[int, list[int]] = {}
            for n in places:
                coming.setdefault(receives[n][0], []).append(n)
            for n, x in self._exchange_blocks(leaving, coming, receives, group):
                results[n] = x.astype(kinds[n])
        return results

    def _exchange_blocks(
        self,
        leaving: Mapping[int, list[Tensor]],
        coming: Mapping[int, list[int]],
        receives: Sequence[tuple[int, Tensor]],
        group: Group,
    ) -> list[tuple[int, Tensor]]:
        buffers = {
            peer: _empty((sum(receives[n][1].size for n in places),), receives[places[0]][1])
            for peer, places in coming.items()
        }
        operations = [
            self._dist.P2POp("isend", mint.cat([x.reshape((-1,)) for x in parts]), group.ranks[peer], group.handle)
            for peer, parts in leaving.items()
        ]
        operations += [
            self._dist.P2POp("irecv", buffer, group.ranks[peer], group.handle) for peer, buffer in buffers.items()
        ]
        for handle in self._dist.batch_isend_irecv(operations):
            handle.wait()
        found = []
        for peer, places in coming.items():
            sizes = [receives[n][1].size for n in places]
            pieces = mint.split(buffers[peer], sizes)
            found += [(n, piece.reshape(receives[n][1].shape)) for n, piece in zip(places, pieces, strict=True)]
        return found

    def gather_to_host(self, x: Tensor | np.ndarray, group: Group) -> np.ndarray:
        """Float64 of the host travels as its bits, which no device computes with."""
        wide = isinstance(x, np.ndarray) and x.dtype == np.float64
        host = x.view(np.int64) if wide else x
        value = asarray(host) if isinstance(host, np.ndarray) else ops.stop_gradient(host)
        gathered = self.all_gather(value.reshape((1, *value.shape)), group)
        with self.waiting(f"the values of {group.name}"):
            found = to_numpy(gathered)
        return found.view(np.float64) if wide else found

    def broadcast(self, x: Tensor, root: int, group: Group) -> Tensor:
        self._note(f"broadcast in {group.name} of {tuple(x.shape)} from {group.ranks[root]}")
        y = _movable(x).copy()
        self._dist.broadcast(y, group.ranks[root], group=group.handle)
        return y.astype(x.dtype)

    def barrier(self) -> None:
        self._note("barrier")
        with self.waiting("all ranks at a barrier"):
            self._dist.barrier()
            ms.runtime.synchronize()

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Inside, the process ends with a message once it has waited longer than HCCL itself would."""
        return self._heart.waiting(what)

    def close(self) -> None:
        self.barrier()
        self._dist.destroy_process_group()

    def _note(self, what: str) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                f"{what} was issued outside the thread that joined the job; HCCL needs one thread for all collectives"
            )
        self._heart.called(what)


def _movable(x: Tensor) -> Tensor:
    """Contiguous, booleans as bytes."""
    return (x.astype(ms.uint8) if x.dtype == ms.bool_ else x).contiguous()


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return mint.zeros(shape, dtype=like.dtype)


def _check_reducible(x: Tensor) -> None:
    if x.dtype in (ms.float64, ms.bool_):
        raise ValueError(f"HCCL sums no {x.dtype}; reduce in float32, or gather and sum on the host")


def _by_peer(blocks: Sequence[tuple[int, Tensor]]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for peer, x in blocks:
        found.setdefault(peer, []).append(x)
    return found
