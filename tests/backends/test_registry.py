"""Who decides which backend runs, and that nothing falls back in silence."""

from __future__ import annotations

import subprocess
import sys

import pytest
from twinmoe.backends import registry
from twinmoe.backends.registry import FLAG, NAMES, BackendError, Probe, choose, load


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A machine on which the backends in the set work; no flag set."""
    works = {"cpu", "mindspore-cpu"}
    monkeypatch.delenv(FLAG, raising=False)
    monkeypatch.setattr(registry, "probe", lambda name: Probe(name in works, f"{name} was asked"))
    monkeypatch.setattr(registry.Home, "has_device", lambda self: True)
    return works


def test_the_command_line_wins_over_the_flag_and_the_flag_over_the_file(
    machine: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.update(NAMES)
    monkeypatch.setenv(FLAG, "ascend")
    assert choose("cuda", "mindspore-cpu").name == "cuda"
    assert choose(None, "mindspore-cpu").name == "ascend"
    assert FLAG in choose(None, "mindspore-cpu").decided_by
    monkeypatch.delenv(FLAG)
    assert choose(None, "mindspore-cpu").name == "mindspore-cpu"
    assert choose(None, "mindspore-cpu").decided_by == "file"


@pytest.mark.parametrize("best", ["ascend", "ascend-torch", "cuda", "cpu"])
def test_auto_takes_the_npu_then_the_gpu_then_the_host(machine: set[str], best: str) -> None:
    order: list[str] = list(registry.AUTO_ORDER)
    machine.clear()
    machine.update(order[order.index(best) :])
    choice = choose()
    assert choice.name == best
    assert choice.decided_by == "default"
    assert "was asked" in choice.reason


def test_auto_does_not_ask_for_a_device_that_is_not_there(machine: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    machine.update(NAMES)
    monkeypatch.setattr(registry.Home, "has_device", lambda self: not self.device_files)
    assert choose().name == "cpu"
    assert "cuda: no device" in choose().reason


def test_an_explicit_backend_is_obeyed_or_refused_with_what_would_work(machine: set[str]) -> None:
    assert choose("mindspore-cpu").name == "mindspore-cpu"
    with pytest.raises(
        BackendError, match=r"'cuda' .*does not work here.*twinmoe\[cuda\].*cpu or mindspore-cpu or auto"
    ):
        choose("cuda")


def test_an_unknown_backend_is_refused_wherever_it_comes_from(
    machine: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match=r"unknown backend 'npu' \(from the command line\); choose one of auto, cpu"):
        choose("npu")
    monkeypatch.setenv(FLAG, "gpu")
    with pytest.raises(BackendError, match=f"unknown backend 'gpu' .*{FLAG}"):
        choose()


def test_a_machine_without_any_backend_says_what_to_install(machine: set[str]) -> None:
    machine.clear()
    with pytest.raises(BackendError, match=r"no backend works here.*install torch"):
        choose()


def test_a_home_that_breaks_at_import_is_unavailable_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.HOMES, "broken", registry.Home(".no_such_home"))  # type: ignore[arg-type]
    probe = registry.probe("broken")
    assert not probe.available
    assert "no_such_home" in probe.reason


def test_load_gives_the_three_modules_and_why() -> None:
    backend = load("reference", "a test")
    assert (backend.name, backend.decided_by, backend.launcher) == ("reference", "a test", "torchrun")
    assert callable(backend.ops.topk)
    assert callable(backend.comm.connect)
    assert callable(backend.trainer.build)


def test_the_reference_is_not_offered_to_users() -> None:
    assert "reference" not in NAMES
    assert "reference" not in registry.probe_all()


def test_importing_the_registry_imports_no_framework() -> None:
    code = "import sys, twinmoe.backends; print([m for m in ('torch', 'mindspore', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_workers_get_one_thread_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert registry.worker_environment("/bin")["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert registry.worker_environment("/bin")["OMP_NUM_THREADS"] == "3"
    assert registry.worker_environment("/somewhere")["PATH"].startswith("/somewhere:")


def test_workers_get_what_their_backend_wants_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "600")
    found = registry.worker_environment("/bin", "ascend")
    assert (found["HCCL_CONNECT_TIMEOUT"], found["HCCL_EXEC_TIMEOUT"]) == ("600", "1800")
    assert registry.home_environment("reference") == {}
    assert registry.communicator_bytes("reference", [(0, 1)]) == 0
