"""Ready text that starts a run on several nodes: for torchrun, msrun or Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCHERS = ("torchrun", "msrun", "slurm")


@dataclass(frozen=True)
class Cluster:
    """Nodes and processes on each."""

    nodes: int
    nproc: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.nproc


def launch_text(
    launcher: str,
    cluster: Cluster,
    words: Sequence[str],
    run_dir: str,
    environment: Mapping[str, str] | None = None,
) -> str:
    """A script to run on every node (torchrun, msrun) or to submit once (slurm).

    words: CONFIG and key=value words. run_dir: on a file system that all nodes share. environment: what the backend
    wants set; values that are set already win.
    """
    train = shlex.join(["train", *words, "--run-dir", run_dir])
    sizes = {"nodes": cluster.nodes, "nproc": cluster.nproc, "ranks": cluster.ranks}
    exports = "".join(f'export {name}="${{{name}:-{value}}}"\n' for name, value in (environment or {}).items())
    form = {"torchrun": _TORCHRUN, "msrun": _MSRUN, "slurm": _SLURM}[launcher]
    return form.format(**sizes, train=train, exports=exports, name=shlex.quote(Path(words[0]).stem))


_TORCHRUN = """\
#!/bin/sh
# Run on each of the {nodes} nodes: NODE_RANK is 0 .. {nodes} - 1, MASTER_ADDR the address of node 0.
# The run folder must lie on a file system that all nodes share.
export OMP_NUM_THREADS=1
{exports}torchrun --nnodes={nodes} --nproc-per-node={nproc} --node-rank="$NODE_RANK" \\
  --master-addr="$MASTER_ADDR" --master-port="${{MASTER_PORT:-29500}}" \\
  -m twinmoe.moe_core.cli {train}
"""

_MSRUN = """\
#!/bin/sh
# Run on each of the {nodes} nodes: NODE_RANK is 0 .. {nodes} - 1, MASTER_ADDR the address of node 0.
# The run folder must lie on a file system that all nodes share.
export OMP_NUM_THREADS=1 LOCAL_WORLD_SIZE={nproc}  # msrun does not say how many ranks share a node
{exports}msrun --worker_num={ranks} --local_worker_num={nproc} --node_rank="$NODE_RANK" \\
  --master_addr="$MASTER_ADDR" --master_port="${{MASTER_PORT:-8118}}" --join=True --log_dir=msrun_logs \\
  python -m twinmoe.moe_core.cli {train}
"""

_SLURM = """\
#!/bin/sh
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={nproc}
#SBATCH --signal=TERM@120
# The run folder must lie on a file system that all nodes share; SIGTERM before the time limit saves and ends.
export OMP_NUM_THREADS=1
{exports}srun --kill-on-bad-exit=1 python -m twinmoe.moe_core.cli {train}
"""
