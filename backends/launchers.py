"""What each launcher says about a process, from the variables it sets: torchrun, msrun and Slurm.

Pure functions of a mapping; `registry.py` hands them the real environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from .protocol import Launch

Environ = Mapping[str, str]
LauncherName = Literal["torchrun", "msrun", "slurm"]

_SLURM_PORTS = range(20000, 30000)


class LaunchError(Exception):
    """A launcher's variables are incomplete or contradict each other."""


def launcher_of(environ: Environ) -> LauncherName | None:
    """Which launcher started this process, or None.

    Slurm counts only where `srun` started the process: a batch script sees its job's variables too.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return "torchrun"
    if "MS_ROLE" in environ:
        return "msrun"
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        return "slurm"
    return None


def is_scheduler(environ: Environ) -> bool:
    """msrun runs the command once more as a scheduler, which keeps the job together and has no rank."""
    return environ.get("MS_ROLE") == "MS_SCHED"


def resolve(environ: Environ) -> Launch:
    """The Launch that the variables describe; one process alone where no launcher is around.

    Raises LaunchError with one sentence where a variable is missing or makes no sense.
    """
    readers = {"torchrun": _torchrun, "msrun": _msrun, "slurm": _slurm}
    launcher = launcher_of(environ)
    if launcher is None:
        return Launch()
    launch = readers[launcher](environ)
    if not 0 <= launch.rank < launch.size or not 0 <= launch.local_rank < launch.local_size <= launch.size:
        raise LaunchError(
            f"{launcher} describes rank {launch.rank} of {launch.size} (local {launch.local_rank} of "
            f"{launch.local_size}), which is impossible; unset variables left over from another job"
        )
    return launch


def device_index(local_rank: int, visible: int) -> int:
    """Which of the devices that a process sees is its own; they are numbered from 0 in every process.

    One visible device is the process's own, whatever its local rank: Slurm, a container or a variable as
    ASCEND_RT_VISIBLE_DEVICES hides the others. Otherwise the local rank counts. LaunchError where it is too large.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise LaunchError(
            f"the process with local rank {local_rank} sees {visible} devices; start at most as many processes a node "
            "as it has devices, and show each process all of them or its own alone (ASCEND_RT_VISIBLE_DEVICES)"
        )
    return local_rank


def _number(environ: Environ, key: str, default: int | None = None) -> int:
    text = environ.get(key)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(f"the launcher variable {key} is {text!r}; it must be an integer") from None


def _torchrun(environ: Environ) -> Launch:
    size = _number(environ, "WORLD_SIZE")
    return Launch(
        rank=_number(environ, "RANK"),
        size=size,
        local_rank=_number(environ, "LOCAL_RANK", _number(environ, "RANK")),
        local_size=_number(environ, "LOCAL_WORLD_SIZE", size),
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(environ, "MASTER_PORT", 29500),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _msrun(environ: Environ) -> Launch:
    size = _number(environ, "MS_WORKER_NUM")
    rank = 0 if is_scheduler(environ) else _number(environ, "RANK_ID", _number(environ, "MS_NODE_ID", 0))
    local = 0 if is_scheduler(environ) else _number(environ, "DEVICE_ID", rank)
    return Launch(
        rank=rank,
        size=size,
        local_rank=local,
        local_size=_number(environ, "LOCAL_WORLD_SIZE", size),
        address=environ.get("MS_SCHED_HOST", "127.0.0.1"),
        port=_number(environ, "MS_SCHED_PORT", 8118),
    )


def _slurm(environ: Environ) -> Launch:
    job = _number(environ, "SLURM_JOB_ID", 0)
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    sizes = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"]))
    node = _number(environ, "SLURM_NODEID", 0)
    return Launch(
        rank=_number(environ, "SLURM_PROCID"),
        size=_number(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environ, "SLURM_LOCALID", 0),
        local_size=sizes[min(node, len(sizes) - 1)],
        address=environ.get("MASTER_ADDR", first_host(nodes)),
        port=_number(environ, "MASTER_PORT", _SLURM_PORTS[job % len(_SLURM_PORTS)]),
    )


def expand_counts(text: str) -> list[int]:
    """Slurm's short form of tasks per node: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"tasks per node {text!r} is not of Slurm's form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """First name of Slurm's short form of a host list: "gpu[07-09,12],login1" starts with gpu07."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise LaunchError(f"the host list {nodelist!r} names no host")
    return match[1] + (match[2] or "") + (match[3] or "")
