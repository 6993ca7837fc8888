"""An all-to-all of sends and receives, for gloo between nodes.

There gloo's own goes peer by peer, and the word that a rank is ready to receive waits behind its own data: a slow link
carries one direction after the other. Receives that are posted before anything is sent keep both directions busy, at
the price of more messages.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def exchange(x: Tensor, y: Tensor, send: list[int] | None, recv: list[int] | None, handle: Any) -> None:
    """Rows of x, cut by `send` (None: equally), to the ranks of the group; y takes what they send."""
    for work in post(x, y, send, recv, handle):
        work.wait()


def post(x: Tensor, y: Tensor, send: list[int] | None, recv: list[int] | None, handle: Any) -> list[Any]:
    """The same, under way: what to wait for before y is read or x is written."""
    me, size = dist.get_rank(handle), dist.get_world_size(handle)
    outgoing = x.split(send or [x.shape[0] // size] * size)
    incoming = y.split(recv or [y.shape[0] // size] * size)
    peers = [(me + turn) % size for turn in range(1, size)]
    place = {peer: dist.get_global_rank(handle, peer) for peer in peers}
    waiting = [dist.irecv(incoming[p], place[p], group=handle) for p in peers if incoming[p].shape[0]]
    waiting += [dist.isend(outgoing[p], place[p], group=handle) for p in peers if outgoing[p].shape[0]]
    incoming[me].copy_(outgoing[me])
    return waiting
