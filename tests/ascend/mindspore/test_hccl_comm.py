"""How a process joins a job over HCCL, with MindSpore's own calls recorded instead of made."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from twinmoe.ascend import hccl
from twinmoe.backends.protocol import Group, Launch
from twinmoe.backends.registry import LaunchError
from twinmoe.testing.conftest import load_or_skip

HOME = load_or_skip("mindspore-cpu")

from mindspore import communication  # noqa: E402
from twinmoe.ascend.mindspore import hccl_comm, runtime  # noqa: E402
from twinmoe.ascend.mindspore.comm import MindSporeCommunicator  # noqa: E402
from twinmoe.ascend.mindspore.framework import mint  # noqa: E402


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    real = inspect.signature(mint.distributed.init_process_group)

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        made.append(dict(real.bind(*args, **kwargs).arguments))

    def use_npu(index: int, deterministic: bool) -> None:
        made.append(f"device {index}, deterministic {deterministic}")

    for name in ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "HCCL_DETERMINISTIC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runtime, "use_npu", use_npu)
    monkeypatch.setattr(runtime, "device_count", lambda: 8)
    monkeypatch.setattr(communication, "init", lambda: made.append("init"))
    monkeypatch.setattr(communication, "get_rank", lambda: 5)
    monkeypatch.setattr(mint.distributed, "init_process_group", init_process_group)
    return made


LAUNCH = Launch(rank=5, size=16, local_rank=1, local_size=4, address="10.0.0.1", port=8118)


def test_msrun_s_own_variables_are_used(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hccl_comm, "surrounding_launcher", lambda: "msrun")
    comm = hccl_comm.connect(LAUNCH)
    assert (comm.rank, comm.size) == (5, 16)
    assert calls == ["device 1, deterministic True", "init"]


@pytest.mark.parametrize(("agent", "port"), [(False, 8118), (True, 8119)])
def test_other_launchers_meet_at_rank_0(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, agent: bool, port: int
) -> None:
    monkeypatch.setattr(hccl_comm, "surrounding_launcher", lambda: "torchrun")
    hccl_comm.connect(Launch(rank=5, size=16, local_rank=1, address="10.0.0.1", port=8118, agent_store=agent))
    told = {"init_method": f"tcp://10.0.0.1:{port}", "timeout": timedelta(seconds=1926), "world_size": 16, "rank": 5}
    assert calls == ["device 1, deterministic True", told]


def test_rank_0_may_be_given_by_name(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore's reader of addresses takes numbers alone; torchrun and Slurm give names."""
    monkeypatch.setattr(hccl_comm, "surrounding_launcher", lambda: "slurm")
    hccl_comm.connect(Launch(rank=5, size=16, local_rank=1, address="localhost", port=8118))
    assert calls[1]["init_method"] == "tcp://127.0.0.1:8118"
    with pytest.raises(LaunchError, match=r"'nowhere\.invalid', is unknown .* give MASTER_ADDR as an IPv4"):
        hccl_comm.connect(Launch(rank=5, size=16, local_rank=1, address="nowhere.invalid"))


def test_what_hccl_was_told_holds_for_kernels_and_waits(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hearts: list[Any] = []
    monkeypatch.setattr(hccl, "Heartbeat", lambda rank, timeout_s: hearts.append(timeout_s))
    monkeypatch.setattr(hccl_comm, "surrounding_launcher", lambda: "msrun")
    told = {"connect_timeout_s": 1200, "execute_timeout_s": 1800, "deterministic": False}
    for name, value in hccl.environment(hccl.HcclSettings(**told)).items():
        monkeypatch.setenv(name, value)
    hccl_comm.connect(LAUNCH)
    assert calls[0] == "device 1, deterministic False"
    assert hearts == [1890]


def test_a_rank_that_sees_one_device_takes_it(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hccl_comm, "surrounding_launcher", lambda: "msrun")
    monkeypatch.setattr(runtime, "device_count", lambda: 1)
    hccl_comm.connect(LAUNCH)
    assert calls[0] == "device 0, deterministic True"


def test_the_scheduler_takes_no_device(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hccl_comm, "is_scheduler", lambda: True)
    hccl_comm.connect(LAUNCH)
    assert calls == ["init"]


def test_one_process_joins_nothing(calls: list[Any]) -> None:
    assert hccl_comm.connect(Launch()).size == 1
    assert calls == ["device 0, deterministic True"]


def test_ranks_in_another_order_are_refused(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hccl_comm, "surrounding_launcher", lambda: "msrun")
    monkeypatch.setattr(communication, "get_rank", lambda: 6)
    with pytest.raises(RuntimeError, match="numbers this process 6, the launcher 5; give --node_rank"):
        hccl_comm.connect(LAUNCH)


def test_a_second_thread_may_not_issue_collectives() -> None:
    wire = hccl_comm.HcclWire(Launch(size=2), None)
    caught: list[Exception] = []

    def issue() -> None:
        try:
            wire.all_reduce(HOME.ops.asarray(np.ones(2, np.float32)), Group("world", (0, 1), 0, "w"))
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=issue)
    thread.start()
    thread.join()
    assert "HCCL needs one thread for all collectives" in str(caught[0])


def test_a_group_that_hccl_refuses_is_an_error() -> None:
    class Refusing:
        def new_group(self, ranks: list[int], pg_options: Any = None) -> str:
            return ""

    with pytest.raises(RuntimeError, match="could not create group 'expert' of ranks"):
        hccl_comm.HcclWire(Launch(size=2), Refusing()).open_group("expert", [[0, 1]])


def test_a_group_may_have_buffers_of_its_own() -> None:
    seen: list[Any] = []

    class Recording:
        def new_group(self, ranks: list[int], pg_options: Any = None) -> str:
            seen.append(pg_options.hccl_config)
            return "name"

        def barrier(self, group: str) -> None:
            seen.append(group)

    wire = hccl_comm.HcclWire(Launch(size=2), Recording(), {"expert": 512})
    assert wire.open_group("expert", [[0, 1]]) == "name"
    assert seen == [{"hccl_buffer_size": 512}, "name"]


def watched(wire: hccl_comm.HcclWire, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the heartbeat covers from now on."""
    seen: list[str] = []

    @contextmanager
    def waiting(what: str) -> Iterator[None]:
        seen.append(what)
        yield

    monkeypatch.setattr(wire, "waiting", waiting)
    return seen


def test_the_heartbeat_covers_opening_a_group_and_the_waits_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quiet:
        def new_group(self, ranks: list[int], pg_options: Any = None) -> str:
            return "name"

        def barrier(self, group: str) -> None:
            pass

    wire = hccl_comm.HcclWire(Launch(size=2), Quiet())
    seen = watched(wire, monkeypatch)
    comm = MindSporeCommunicator(0, 2, wire)
    comm.group("expert", [[0, 1]])
    with comm.waiting("a step"):
        pass
    assert seen == ["group expert of ranks [0, 1] to open", "a step"]


def test_a_group_that_never_opens_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Stuck:
        def new_group(self, ranks: list[int], pg_options: Any = None) -> str:
            return "name"

        def barrier(self, group: str) -> None:
            deadline = time.monotonic() + 5
            while not told and time.monotonic() < deadline:
                time.sleep(0.01)

    wire = hccl_comm.HcclWire(Launch(size=2), Stuck())
    monkeypatch.setattr(wire, "_heart", hccl.Heartbeat(0, 0.02, told.append))
    wire.open_group("expert", [[0, 1]])
    assert "for group expert of ranks [0, 1] to open" in told[0]


class Mirror:
    """Two ranks that hold the same, as rank 0 sees them. Keeps the dtype of all that travels."""

    def __init__(self) -> None:
        self.dtypes: list[str] = []

    def all_gather_into_tensor(self, y: Any, x: Any, group: Any) -> None:
        self.dtypes.append(str(x.dtype))
        y.copy_(mint.cat([x, x]))

    def P2POp(self, kind: str, x: Any, peer: int, group: Any) -> tuple[str, Any]:
        self.dtypes.append(str(x.dtype))
        return kind, x

    def batch_isend_irecv(self, operations: list[tuple[str, Any]]) -> list[Any]:
        sent = [x for kind, x in operations if kind == "isend"]
        for place, x in zip([x for kind, x in operations if kind == "irecv"], sent, strict=True):
            place.copy_(x)
        return []


def test_float64_of_the_host_travels_as_its_bits() -> None:
    mirror = Mirror()
    wire = hccl_comm.HcclWire(Launch(size=2), mirror)
    values = np.array([0.1, -1e300, np.inf])
    found = wire.gather_to_host(values, Group("world", (0, 1), 0, "w"))
    assert found.dtype == np.float64
    assert found.tolist() == [values.tolist()] * 2
    assert mirror.dtypes == ["Int64"]


def test_an_exchange_takes_booleans_as_the_other_collectives_do() -> None:
    mirror = Mirror()
    wire = hccl_comm.HcclWire(Launch(size=2), mirror)
    x = HOME.ops.asarray(np.array([[True, False], [False, True]]))
    (found,) = wire.exchange([(1, x)], [(1, x)], Group("world", (0, 1), 0, "w"))
    assert found.dtype == x.dtype
    assert found.asnumpy().tolist() == [[True, False], [False, True]]
    assert mirror.dtypes == ["UInt8", "UInt8"]
