"""One process of the job of test_msrun.py, the scheduler included. Prints what held."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore.communication import GlobalComm, create_group, get_group_size, get_rank, init
from mindspore.mint.distributed import distributed
from twinmoe.ascend.mindspore.framework import mint
from twinmoe.backends import registry


def main() -> None:
    ms.set_device("CPU")
    launch = registry.read_launch()
    init()
    if registry.is_scheduler():
        return
    assert registry.surrounding_launcher() == "msrun"
    assert (launch.rank, launch.size) == (get_rank(), get_group_size())
    print("rank", launch.rank, flush=True)
    world = GlobalComm.WORLD_COMM_GROUP
    x = ms.Tensor(np.array([launch.rank + 1.0, 10.0], np.float32))
    mint.distributed.all_reduce(x, group=world)
    assert x.asnumpy().tolist() == [3.0, 20.0]
    create_group("pair", [0, 1])
    blocks = [ms.Tensor(np.zeros(2, np.int64)) for _ in range(2)]
    mint.distributed.all_gather(blocks, ms.Tensor(np.array([launch.rank, 7])), group="pair")
    assert [b.asnumpy().tolist() for b in blocks] == [[0, 7], [1, 7]]
    print("collectives", launch.rank, flush=True)
    # its default group is HCCL's, which the host does not have
    distributed.get_cache_group_rank = lambda *_, **__: launch.rank
    if launch.rank == 0:
        mint.distributed.send(x + 4.0, 1, group=world)
    else:
        came = ms.Tensor(np.zeros(2, np.float32))
        mint.distributed.recv(came, 0, group=world)
        assert came.asnumpy().tolist() == [7.0, 24.0]
    print("point to point", launch.rank, flush=True)


if __name__ == "__main__":
    main()
