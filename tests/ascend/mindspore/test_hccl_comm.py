"""How a process joins a job over HCCL, with MindSpore's own calls recorded instead of made."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.protocol import Group, Launch
from twinmoe.testing.conftest import load_or_skip

HOME = load_or_skip("mindspore-cpu")

from mindspore import communication  # noqa: E402
from twinmoe.ascend.mindspore import hccl_comm, runtime  # noqa: E402
from twinmoe.ascend.mindspore.framework import mint  # noqa: E402


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    real = inspect.signature(mint.distributed.init_process_group)

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        made.append(dict(real.bind(*args, **kwargs).arguments))

    monkeypatch.setattr(runtime, "use_npu", lambda local_rank: made.append(f"device {local_rank}"))
    monkeypatch.setattr(communication, "init", lambda: made.append("init"))
    monkeypatch.setattr(communication, "get_rank", lambda: 5)
    monkeypatch.setattr(mint.distributed, "init_process_group", init_process_group)
    return made


LAUNCH = Launch(rank=5, size=16, local_rank=1, local_size=4, address="10.0.0.1", port=8118)


def test_msrun_s_own_variables_are_used(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hccl_comm, "surrounding_launcher", lambda: "msrun")
    comm = hccl_comm.connect(LAUNCH)
    assert (comm.rank, comm.size) == (5, 16)
    assert calls == ["device 1", "init"]


@pytest.mark.parametrize(("agent", "port"), [(False, 8118), (True, 8119)])
def test_other_launchers_meet_at_rank_0(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, agent: bool, port: int
) -> None:
    monkeypatch.setattr(hccl_comm, "surrounding_launcher", lambda: "torchrun")
    hccl_comm.connect(Launch(rank=5, size=16, local_rank=1, address="10.0.0.1", port=8118, agent_store=agent))
    assert calls == ["device 1", {"init_method": f"tcp://10.0.0.1:{port}", "world_size": 16, "rank": 5}]


def test_the_scheduler_takes_no_device(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hccl_comm, "is_scheduler", lambda: True)
    hccl_comm.connect(LAUNCH)
    assert calls == ["init"]


def test_one_process_joins_nothing(calls: list[Any]) -> None:
    assert hccl_comm.connect(Launch()).size == 1
    assert calls == ["device 0"]


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
