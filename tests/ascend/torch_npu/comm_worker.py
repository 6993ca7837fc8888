"""One rank of the job of test_comm.py: python comm_worker.py RANK SIZE PORT. HCCL's rules are asserted, gloo moves."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from twinmoe.ascend.torch_npu.comm import NpuCommunicator
from twinmoe.backends.protocol import Group, Launch

_batch = dist.batch_isend_irecv


def strict_batch(operations: list[dist.P2POp]) -> list[dist.Work]:
    """HCCL takes one block per ordered pair of ranks and call, and none without elements."""
    pairs = [(operation.op, operation.peer) for operation in operations]
    assert len(set(pairs)) == len(pairs)
    assert all(operation.tensor.numel() for operation in operations)
    return _batch(operations)


def exchanges(comm: NpuCommunicator, world: Group) -> None:
    """Two blocks to the next rank, one to oneself, an empty one; integers beside floats."""
    rank = comm.rank
    up, down = (rank + 1) % 3, (rank - 1) % 3
    a, b, own = torch.full((2, 2), float(rank)), torch.arange(3.0) + rank, torch.tensor([rank + 0.5])
    ids, none = torch.arange(2) + rank, torch.zeros(0, 4)
    sends = [(up, a), (rank, own), (up, none), (up, b), (up, ids)]
    receives = [(down, a), (down, none), (rank, own), (down, b), (down, ids)]
    found = comm.exchange(sends, receives, world)
    assert found[0].tolist() == [[down] * 2] * 2
    assert found[1].shape == (0, 4)
    assert found[2].tolist() == [rank + 0.5]
    assert found[3].tolist() == [down, down + 1, down + 2]
    assert found[4].tolist() == [down, down + 1]


def norms(comm: NpuCommunicator, world: Group) -> None:
    """Float64 sums take an all-gather, which HCCL has."""
    x = torch.tensor([0.1, 1.0], dtype=torch.float64, requires_grad=True)
    y = comm.all_reduce(x * (comm.rank + 1), world)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    np.testing.assert_allclose(y.detach().numpy(), [0.6, 6.0])
    np.testing.assert_allclose(gradient.numpy(), [3.0 * (comm.rank + 1)] * 2)
    assert comm.all_reduce(torch.tensor(2.0), world).item() == 6.0
    with pytest.raises(ValueError, match="HCCL sums no float64"):
        comm.reduce_scatter(torch.ones(3, dtype=torch.float64), world)


def main(rank: int, size: int, port: int) -> None:
    comm = NpuCommunicator(Launch(rank=rank, size=size, port=port, timeout_s=60), "gloo", torch.device("cpu"))
    world = comm.group("world", [list(range(size))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", strict_batch)
        exchanges(comm, world)
    print("exchanges", flush=True)
    norms(comm, world)
    print("norms", flush=True)
    comm.close()
    os._exit(0)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
