"""Whether all nodes of a job see the same run folder: found out before the first step, not at the first checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..backends.protocol import Communicator, Group
from .combinations import ConfigError

_MARK = ".ranks_meet_here"


def check_shared(comm: Communicator, world: Group, run_dir: Path) -> None:
    """ConfigError on every rank where some do not see the folder of rank 0. Collective: two gathers."""
    if world.size == 1:
        return
    number = int(np.random.default_rng().integers(2**31))
    token = str(int(comm.gather_to_host(np.array([number]), world).reshape(-1)[0]))
    mark = run_dir / _MARK
    if world.index == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        mark.write_text(token, encoding="utf-8")
    comm.barrier()
    sees = mark.exists() and mark.read_text(encoding="utf-8") == token
    blind = np.flatnonzero(comm.gather_to_host(np.array([int(not sees)]), world).reshape(-1))
    if world.index == 0:
        mark.unlink()
    if len(blind):
        raise ConfigError(
            f"ranks {', '.join(map(str, blind))} do not see the run folder {run_dir} of rank 0; "
            "give --run-dir on a file system that all nodes share"
        )
