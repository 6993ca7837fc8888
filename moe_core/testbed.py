"""Several nodes on one machine: network namespaces on a bridge, each link shaped to a rate (Linux, root, iproute2).

Links are virtual and carry addresses of their own; a node's ranks share its link in both directions. Namespaces are
removed when the testbed closes; those of a process that died without closing, by the next testbed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .combinations import ConfigError

_PREFIX = "twinmoe"
_NETWORK = "10.77.0"
_LINK = "net0"
_BURST, _LATENCY = "64kb", "1000ms"
_ORDERLY = 5.0  # seconds that other ranks get once one has failed


@dataclass(frozen=True)
class Shape:
    """nodes x ranks on each; rate of a node's link in tc's words (None: not shaped)."""

    nodes: int
    ranks_per_node: int
    rate: str | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @classmethod
    def parse(cls, text: str, rate: str | None = None) -> Shape:
        """'2x4' is two nodes of four ranks. ConfigError for another form."""
        match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text)
        if match is None:
            raise ConfigError(f"--testbed {text} is not of the form NODESxRANKS; for example --testbed 2x2")
        if rate is not None and not re.fullmatch(r"\d+(\.\d+)?[kmg]bit", rate):
            raise ConfigError(f"--rate {rate} is not a rate; for example --rate 200mbit")
        return cls(int(match[1]), int(match[2]), rate)


def unavailable() -> str | None:
    """Why this machine can't make nodes, in one sentence; None if it can."""
    if sys.platform != "linux" or shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces need Linux with iproute2 (ip, tc); install it or leave --testbed out"
    if os.geteuid() != 0:
        return "network namespaces need root; run as root or leave --testbed out"
    try:
        probe = f"{_PREFIX}_{os.getpid()}_probe"
        _run("ip", "netns", "add", probe)
        _run("ip", "netns", "del", probe)
    except ConfigError as error:
        return str(error)
    return None


@dataclass
class Testbed:
    """A context manager: nodes exist inside it. ConfigError where the machine can't make them."""

    shape: Shape
    _made: list[str] = field(default_factory=list)
    _previous: Any = None

    __test__ = False  # pytest: not a test class

    def __enter__(self) -> Testbed:
        reason = unavailable()
        if reason is not None:
            raise ConfigError(reason)
        _remove_stale()
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, _leave)
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the namespaces, and with them links and bridge."""
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        self._made.clear()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def node_of(self, rank: int) -> int:
        return rank // self.shape.ranks_per_node

    def address(self, node: int) -> str:
        return f"{_NETWORK}.{node + 1}"

    def command(self, rank: int, words: Sequence[str]) -> list[str]:
        """`words` run on the node of a rank."""
        return ["ip", "netns", "exec", self._node(self.node_of(rank)), *words]

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """What a launcher would tell a rank, and gloo which link to use."""
        per_node = self.shape.ranks_per_node
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.shape.ranks),
            "LOCAL_RANK": str(rank % per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": _LINK,
        }

    def _make(self) -> None:
        switch = self._namespace("switch")
        _run("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge0", "up")
        for node in range(self.shape.nodes):
            name, port = self._namespace(str(node)), f"port{node}"
            ends = ["netns", name, "type", "veth", "peer", "name", port, "netns", switch]
            _run("ip", "link", "add", _LINK, *ends)
            _run("ip", "-n", name, "addr", "add", f"{self.address(node)}/24", "dev", _LINK)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge0")
            for where, link in ((name, "lo"), (name, _LINK), (switch, port)):
                _run("ip", "-n", where, "link", "set", link, "up")
            if self.shape.rate is not None:
                for where, link in ((name, _LINK), (switch, port)):
                    shaping = ["tbf", "rate", self.shape.rate, "burst", _BURST, "latency", _LATENCY]
                    _run("tc", "-n", where, "qdisc", "add", "dev", link, "root", *shaping)

    def _namespace(self, what: str) -> str:
        name = f"{_PREFIX}_{os.getpid()}_{what}"
        _run("ip", "netns", "add", name)
        self._made.append(name)
        return name

    def _node(self, node: int) -> str:
        return f"{_PREFIX}_{os.getpid()}_{node}"


def run_ranks(
    testbed: Testbed, words: Sequence[str], environment: Mapping[str, str], port: int, log: Path, timeout_s: float
) -> list[int]:
    """The same command as every rank of the testbed; exit statuses by rank (negative: ended by a signal).

    Output goes to `log`. Ranks keep a pipe as standard input until all have ended. When one fails the others get a
    few seconds; nothing is left running. TimeoutError after timeout_s.
    """
    with log.open("ab") as out:
        ranks = [
            subprocess.Popen(
                testbed.command(rank, words),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**environment, **testbed.environment(rank, port)},
                start_new_session=True,
            )
            for rank in range(testbed.shape.ranks)
        ]
        try:
            _wait(ranks, timeout_s)
        finally:
            _end(ranks)
    return [rank.wait() for rank in ranks]


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            deadline = min(deadline, time.monotonic() + _ORDERLY)
        if time.monotonic() > deadline:
            if any(rank.poll() for rank in ranks):
                return
            raise TimeoutError(f"the ranks of the testbed did not end within {timeout_s} s")
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
        if rank.stdin is not None:
            rank.stdin.close()


def _leave(number: int, _: object) -> None:
    """SIGTERM unwinds like an exception, so that nothing is left behind."""
    raise SystemExit(128 + number)


def _remove_stale() -> None:
    """Namespaces of processes that no longer exist."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        match = re.match(rf"({_PREFIX}_(\d+)_\w+)", line)
        if match and not Path(f"/proc/{match[2]}").exists():
            subprocess.run(["ip", "netns", "del", match[1]], capture_output=True, check=False)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"`{' '.join(words)}` failed ({done.stderr.strip()}); leave --testbed out")
