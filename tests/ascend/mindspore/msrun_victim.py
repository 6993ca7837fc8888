"""A worker of test_msrun's second job: joins MindSpore's job, then rank 1 is killed and rank 0 waits for it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore.communication import init
from twinmoe.ascend.mindspore.framework import mint
from twinmoe.backends import registry
from twinmoe.moe_core import worker
from twinmoe.moe_core.alive import alive


def main() -> None:
    worker._die_with_parent()
    ms.set_device("CPU")
    launch = registry.read_launch()
    init()
    if registry.is_scheduler():
        return
    logs = Path(sys.argv[2]) / "logs"
    with alive(logs, launch.rank):
        if launch.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        (logs / "waits").touch()
        mint.distributed.all_reduce(ms.Tensor(np.ones(2, np.float32)))
        mint.distributed.barrier()


if __name__ == "__main__":
    main()
