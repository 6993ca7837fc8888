"""What MindSpore and torch-npu share about HCCL: environment, buffer sizes, a heartbeat.

Imports no framework. Sources: HCCL's own pages on environment variables and limits.
"""

from __future__ import annotations

import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

MEGABYTE = 2**20
DEFAULT_BUFFER_MB = 200
"""HCCL_BUFFSIZE where nothing is set: per direction and communicator."""
TIMEOUT_RANGE_S = (120, 7200)
"""What HCCL_CONNECT_TIMEOUT accepts."""
OWN_TIMEOUTS_S = (120, 1836)
"""HCCL_CONNECT_TIMEOUT and HCCL_EXEC_TIMEOUT where nothing is set."""
_CONNECT_MORE_S, _EVENT_MORE_S = 20, 30
"""HCCL really waits so much longer for a peer; torch-npu for an event after a collective."""
_MARGIN_S = 60
"""For HCCL's own error to reach the process and its log."""
_FOR_EVER_S = 7 * 24 * 3600
"""What HCCL_EXEC_TIMEOUT=0 comes to here."""


@dataclass(frozen=True)
class HcclSettings:
    """Job-wide HCCL settings, the same on every rank.

    connect_timeout_s: to wait for a peer's first collective (data and checkpoints load before it).
    execute_timeout_s: to wait inside a running one; above connect_timeout_s, so that the first error is the true one.
    buffer_mb: default size of a communicator's buffers; network_interface: host NIC where there are several.
    """

    connect_timeout_s: int = 1200
    execute_timeout_s: int = 1800
    buffer_mb: int = DEFAULT_BUFFER_MB
    deterministic: bool = True
    network_interface: str | None = None

    def __post_init__(self) -> None:
        low, high = TIMEOUT_RANGE_S
        if not low <= self.connect_timeout_s <= high:
            raise ValueError(f"connect_timeout_s={self.connect_timeout_s} is outside HCCL's {low}..{high} seconds")
        if self.execute_timeout_s <= self.connect_timeout_s:
            raise ValueError(
                f"execute_timeout_s={self.execute_timeout_s} must exceed connect_timeout_s={self.connect_timeout_s}; "
                "otherwise a late rank is reported as a hung collective"
            )


def environment(settings: HcclSettings) -> dict[str, str]:
    """Variables for a worker, to be set before its framework starts."""
    variables = {
        "HCCL_CONNECT_TIMEOUT": str(settings.connect_timeout_s),
        "HCCL_EXEC_TIMEOUT": str(settings.execute_timeout_s),
        "HCCL_BUFFSIZE": str(settings.buffer_mb),
        "HCCL_DETERMINISTIC": "true" if settings.deterministic else "false",
    }
    if settings.network_interface is not None:
        variables["HCCL_SOCKET_IFNAME"] = settings.network_interface
        variables["GLOO_SOCKET_IFNAME"] = settings.network_interface
    return variables


def patience_s(timeout_s: float, variables: Mapping[str, str]) -> float:
    """Seconds after which a wait for the device is given up: later than HCCL itself, whose error names the cause.

    timeout_s: what other devices would wait; variables: HCCL's, by name.
    """
    own = zip(("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"), OWN_TIMEOUTS_S, strict=True)
    connect, execute = (int(v) if (v := variables.get(name, "")).isdecimal() else default for name, default in own)
    if execute == 0:
        return max(timeout_s, _FOR_EVER_S)
    return max(timeout_s, connect + _CONNECT_MORE_S + _MARGIN_S, execute + _EVENT_MORE_S + _MARGIN_S)


def is_deterministic(variables: Mapping[str, str]) -> bool:
    """Whether kernels are to be as HCCL was told to be; deterministic where it was told nothing."""
    return variables.get("HCCL_DETERMINISTIC", "true").lower() != "false"


def buffer_mb(payload_bytes: int) -> int:
    """Buffer that holds a collective's payload in one piece; more is sliced, slower but right."""
    return max(1, math.ceil(payload_bytes / MEGABYTE))


def communicator_bytes(buffers_mb: Mapping[str, int]) -> int:
    """Device memory of communicators (name -> buffer): each holds two buffers."""
    return sum(2 * mb * MEGABYTE for mb in buffers_mb.values())


def memory_of_groups(groups: int, environment: Mapping[str, str]) -> int:
    """Device memory of so many communicators with buffers of the size that the environment says, else the default."""
    size = environment.get("HCCL_BUFFSIZE", "")
    mb = int(size) if size.isdecimal() else DEFAULT_BUFFER_MB
    return communicator_bytes({str(group): mb for group in range(groups)})


_HELP: Mapping[str, str] = {
    "EI0001": "a variable of HCCL has a value that it does not take; mend the one that is named",
    "EI0002": "a rank waited in a collective until HCCL_EXEC_TIMEOUT: another one died, is late, or issued other "
    "collectives or sizes; look for the rank whose log has another error or none",
    "EI0003": "a collective got a bad argument; compare row counts and dtypes of the ranks",
    "EI0005": "ranks disagree on a collective; compare row counts, dtypes and HCCL_BUFFSIZE of the ranks",
    "EI0006": "a peer did not come to its first collective within HCCL_CONNECT_TIMEOUT, or the network between devices "
    "is broken; look for the rank that failed first, raise communication.connect_timeout_s, check hccn_tool and TLS",
    "EI0007": "no device memory for a communicator's buffers; lower communication.buffer_mb",
    "EI0008": "nodes have different versions of CANN; use the same image everywhere",
    "EI0010": "the link between two devices of a server failed; check the health of the cards",
    "EI0011": "no memory for a communicator; use fewer groups or lower communication.buffer_mb",
    "EI0012": "the memory of a peer is gone; read that rank's log first",
    "EI0013": "a network link failed or a peer is gone; read that rank's log first, then check the network",
    "EI0014": "the rank table or the TLS settings do not fit the devices; start without a rank table",
    "EI0015": "ranks were missing when a communicator was made, its message names them; name the network card "
    "(communication.network_interface) and start all ranks together",
    "EI0019": "a host port from 60000 on is taken; end old jobs or set HCCL_IF_BASE_PORT",
    "EI0020": "device port 16666 is taken; end old jobs on these NPUs",
    "507015": "a core of the NPU stopped, mostly for an index or a row count out of range, seldom for hardware; rerun "
    "with train.synchronous=true, the process must start anew",
    "507035": "a vector core of the NPU stopped, mostly for an index or a row count out of range, seldom for hardware; "
    "rerun with train.synchronous=true, the process must start anew",
    "507046": "a stream did not end in time, mostly for a collective that hangs; read it as EI0002",
    "107020": "a stream did not end in time, mostly for a collective that hangs; read it as EI0002",
}
_CODE = re.compile(rf"\b({'|'.join(_HELP)})\b")


def explained(text: str) -> str | None:
    """What the first error code of HCCL or of the NPU in a message means and what to do; None without one we know."""
    found = _CODE.search(text)
    return None if found is None else f"{found[1]}: {_HELP[found[1]]}"


def _leave(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


@dataclass
class Heartbeat:
    """Ends a process that waits too long for the device: a stuck collective does not end it by itself.

    `called` notes each collective as it is issued; inside `waiting` the clock runs. `leave` gets a message that
    names the rank, what it waits for and the last collectives.
    """

    rank: int
    timeout_s: float
    leave: Callable[[str], None] = _leave
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=8))
    issued: int = 0

    def called(self, what: str) -> None:
        self.issued += 1
        self.recent.append(f"#{self.issued} {what}")

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        timer = threading.Timer(self.timeout_s, self._report, (what, time.monotonic()))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _report(self, what: str, since: float) -> None:
        last = "; ".join(self.recent) or "none"
        self.leave(
            f"rank {self.rank} has waited {time.monotonic() - since:.0f} s for {what}; another rank failed or issued "
            f"other collectives (compare the ranks' logs); last collectives here: {last}"
        )
