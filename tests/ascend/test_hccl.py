"""Settings and heartbeat shared by both Ascend frameworks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from twinmoe.ascend import hccl
from twinmoe.ascend.mindspore import npu
from twinmoe.ascend.torch_npu import backend
from twinmoe.backends import registry
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.run_folder import LOGS
from twinmoe.moe_core.worker import note_failure


def test_environment_has_the_documented_variables() -> None:
    assert hccl.environment(hccl.HcclSettings()) == {
        "HCCL_CONNECT_TIMEOUT": "1200",
        "HCCL_EXEC_TIMEOUT": "1800",
        "HCCL_BUFFSIZE": "200",
        "HCCL_DETERMINISTIC": "true",
    }


def test_a_network_interface_is_named_to_both_transports() -> None:
    found = hccl.environment(hccl.HcclSettings(deterministic=False, network_interface="eth0"))
    assert (found["HCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"]) == ("eth0", "eth0")
    assert found["HCCL_DETERMINISTIC"] == "false"


@pytest.mark.parametrize(("connect", "execute", "message"), [(60, 1800, "120..7200"), (1200, 1200, "must exceed")])
def test_timeouts_that_hide_the_first_error_are_refused(connect: int, execute: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hccl.HcclSettings(connect_timeout_s=connect, execute_timeout_s=execute)


@pytest.mark.parametrize(
    ("timeout", "variables", "seconds"),
    [
        (120.0, {"HCCL_CONNECT_TIMEOUT": "1200", "HCCL_EXEC_TIMEOUT": "1800"}, 1890),
        (120.0, {}, 1926),
        (5000.0, {}, 5000),
        (120.0, {"HCCL_EXEC_TIMEOUT": "60", "HCCL_CONNECT_TIMEOUT": "7200"}, 7280),
        (120.0, {"HCCL_EXEC_TIMEOUT": "0"}, 7 * 24 * 3600),
        (120.0, {"HCCL_EXEC_TIMEOUT": "soon"}, 1926),
    ],
)
def test_we_wait_longer_than_hccl_whose_error_names_the_cause(
    timeout: float, variables: dict[str, str], seconds: float
) -> None:
    assert hccl.patience_s(timeout, variables) == seconds


@pytest.mark.parametrize(
    ("text", "found"), [(None, True), ("true", True), ("strict", True), ("false", False), ("FALSE", False)]
)
def test_kernels_are_as_deterministic_as_hccl(text: str | None, found: bool) -> None:
    assert hccl.is_deterministic({} if text is None else {"HCCL_DETERMINISTIC": text}) is found


@pytest.mark.parametrize("home", ["ascend", "ascend-torch"])
def test_the_defaults_of_a_config_leave_the_first_word_to_hccl(home: str) -> None:
    config = Config()
    variables = registry.home_environment(home, config.communication.model_dump())
    patience = hccl.patience_s(config.train.timeout_s, variables)
    assert patience > config.communication.execute_timeout_s > config.train.timeout_s == 120


def test_a_communicator_costs_two_buffers() -> None:
    assert hccl.buffer_mb(4 * 4096 * 7168 * 2) == 224
    assert hccl.buffer_mb(0) == 1
    seven = [(name, 200) for name in ("world", "expert", "expert_data", "tensor", "head", "intra", "inter")]
    assert hccl.communicator_bytes(dict(seven)) == 2800 * 2**20


def test_a_long_wait_is_reported_with_the_last_collectives() -> None:
    told: list[str] = []
    done = threading.Event()

    def leave(message: str) -> None:
        told.append(message)
        done.set()

    heart = hccl.Heartbeat(3, 0.02, leave)
    for n in range(10):
        heart.called(f"all_to_all number {n}")
    with heart.waiting("the counts of expert"):
        assert done.wait(5)
    assert told[0].startswith("rank 3 has waited 0 s for the counts of expert; another rank failed")
    assert "#10 all_to_all number 9" in told[0]
    assert "#2 " not in told[0]


def test_a_short_wait_is_not() -> None:
    told: list[str] = []
    heart = hccl.Heartbeat(0, 0.2, told.append)
    with heart.waiting("nothing"):
        pass
    threading.Event().wait(0.3)
    assert told == []


def test_a_stuck_process_ends_with_a_message() -> None:
    script = (
        "import time; from twinmoe.ascend.hccl import Heartbeat; heart = Heartbeat(1, 0.1)\n"
        "with heart.waiting('a peer'): time.sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "rank 1 has waited 0 s for a peer" in done.stderr


@pytest.mark.parametrize(("size", "mb"), [({}, 200), ({"HCCL_BUFFSIZE": "64"}, 64), ({"HCCL_BUFFSIZE": "odd"}, 200)])
def test_memory_of_groups_follows_the_environment(size: dict[str, str], mb: int) -> None:
    assert hccl.memory_of_groups(3, size) == 3 * 2 * mb * 2**20


def test_groups_of_the_same_ranks_share_a_communicator_on_mindspore_only() -> None:
    """MindSpore: the job's and two different groups; torch makes one a name."""
    groups = [(0, 1, 2, 3), (0, 1), (0, 1, 2, 3)]
    assert npu.communicator_bytes(groups, {}) == 3 * 400 * 2**20
    assert backend.communicator_bytes(groups, {}) == 3 * 400 * 2**20
    assert npu.communicator_bytes([], {}) == backend.communicator_bytes([], {}) == 0
    assert npu.communicator_bytes(groups[:1] * 5, {}) == 2 * 400 * 2**20
    assert backend.communicator_bytes(groups[:1] * 5, {}) == 5 * 400 * 2**20


@pytest.mark.parametrize("home", ["ascend", "ascend-torch"])
def test_the_config_s_defaults_are_hccl_settings_defaults_and_what_it_says_is_set(home: str) -> None:
    default = Config().communication.model_dump()
    assert hccl.HcclSettings(**default) == hccl.HcclSettings()
    said = {**default, "connect_timeout_s": 300, "buffer_mb": 64, "network_interface": "eth1", "deterministic": False}
    found = registry.home_environment(home, said)
    assert (found["HCCL_CONNECT_TIMEOUT"], found["HCCL_BUFFSIZE"], found["HCCL_SOCKET_IFNAME"]) == ("300", "64", "eth1")
    assert found["HCCL_DETERMINISTIC"] == "false"
    assert registry.communicator_bytes(home, [(0, 1)], said) % (2 * 64 * 2**20) == 0


@pytest.mark.parametrize("home", ["cpu", "cuda", "mindspore-cpu"])
def test_elsewhere_only_the_interface_counts(home: str) -> None:
    if home != "cpu" and importlib.util.find_spec("torch" if home == "cuda" else "mindspore") is None:
        pytest.skip(f"the framework of {home} is not installed")
    assert registry.home_environment(home, Config().communication.model_dump()) == {}
    assert registry.home_environment(home, {"network_interface": "eth1"})["GLOO_SOCKET_IFNAME"] == "eth1"


def test_workers_of_torch_npu_load_it_only_when_asked_and_compute_nothing_on_the_host() -> None:
    extra = backend.worker_environment({}).items() - npu.worker_environment({}).items()
    assert dict(extra) == {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "TORCH_NPU_FALLBACK_CPU_DISABLE": "1"}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("[ERROR] EI0002: 2026-01-01 Notify wait timeout of rank 3", "EI0002: a rank waited in a collective until"),
        ("Communication_Error EI0006 Getting socket times out.", "raise communication.connect_timeout_s"),
        ("EI0015: ranks [3] missing", "communication.network_interface"),
        ("the aicore execution is abnormal, error code 507015", "index or a row count out of range"),
        ("ERR02200 DIST call hccl api failed. EI0019", "end old jobs or set HCCL_IF_BASE_PORT"),
    ],
)
def test_error_codes_are_explained(message: str, told: str) -> None:
    for home in ("ascend", "ascend-torch"):
        assert told in (registry.explained(home, message) or "")


@pytest.mark.parametrize(("home", "message"), [("ascend", "EI00021, 1507015 of 3"), ("cpu", "EI0002"), ("ascend", "")])
def test_other_messages_and_other_devices_are_left_alone(home: str, message: str) -> None:
    assert registry.explained(home, message) is None


def test_the_meaning_of_a_code_is_what_a_failed_rank_leaves_behind(tmp_path: Path) -> None:
    (tmp_path / LOGS).mkdir()
    note_failure(tmp_path, 3, RuntimeError("HcclAllToAll failed, EI0002"), "ascend")
    left = json.loads((tmp_path / LOGS / "rank_3.error.json").read_text())
    for part in ("sentence", "traceback"):
        assert "HcclAllToAll failed" in left[part]
        assert "EI0002: a rank waited in a collective until HCCL_EXEC_TIMEOUT" in left[part].splitlines()[-1]
